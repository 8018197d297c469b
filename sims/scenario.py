"""Scenarios as data: what happens in a simulated cluster, and what it has to bear. One yaml file each in `scenarios/`."""

from pathlib import Path
from typing import Annotated, Self

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, ValidationError, model_validator

from p2pkv.core.ids import InstanceId
from p2pkv.core.inventory import LOG_CHANGES
from sims.layout import Layout, Part, Seconds, Share, load_layout

FOLDER = Path(__file__).parent / "scenarios"

Count = Annotated[int, Ge(0), Le(100_000)]
PositiveCount = Annotated[int, Ge(1), Le(100_000)]


class ScenarioError(Exception):
    """No such scenario, or its file is wrong; the text says what to change."""


class Faults(Part):
    """What goes wrong by chance while the workload runs.

    Attributes:
        loss: Share of messages that never arrive.
        repeat: Share of messages that arrive twice.
        delay_s: Shortest and longest time on the way, beside what the layout says. Each message draws its own, so a long one
            lets others overtake it.
        lane_failure: Share of chunks at which a lane breaks off.
        corruption: Share of chunks whose bytes a lane damages; its check must find them.
        engine_failure: Share of stores that an engine begins and doesn't commit in time: one half hangs, the other dies.
    """

    loss: Share = 0.0
    repeat: Share = 0.0
    delay_s: tuple[Seconds, Seconds] = (0.0002, 0.002)
    lane_failure: Share = 0.0
    corruption: Share = 0.0
    engine_failure: Share = 0.0


class Blows(Part):
    """What is done to whole instances, how often in a run. Every other blow waits for a move to reach a phase drawn for it.

    Attributes:
        crashes: An instance ends without a word, and is started again.
        back_s: After an end, until it is started again: some sooner than their peers have noticed, some long after.
        leaves: An instance is asked to leave, and started again.
        cuts: Two instances don't hear each other for a while; neither knows why.
        stalls: An instance stands still for a while, as a stopped process does.
        stops: The same, for so long that the others must think it dead.
        clogs: All that comes to an instance, or from it, arrives up to seconds late, until the end.
        slows: From then on an instance stands still again and again, as on a host that is too busy.
        deafs: An instance doesn't hear another for a while, which hears it.
        set_backs: An instance ends without a word, and is started again with its wall clock set back by an hour.
        group_cuts: A group of the layout and all the others don't hear each other for a while.
        group_deafs: A group of the layout doesn't hear its nearest one for a while, which hears it.
    """

    crashes: Count = 0
    back_s: tuple[Seconds, Seconds] = (0.05, 8.0)
    leaves: Count = 0
    cuts: Count = 0
    stalls: Count = 0
    stops: Count = 0
    clogs: Count = 0
    slows: Count = 0
    deafs: Count = 0
    set_backs: Count = 0
    group_cuts: Count = 0
    group_deafs: Count = 0


class Lives(Part):
    """What must be true of who is thought to live; None for no promise.

    Attributes:
        dead_known_s: By then all know that an instance has crashed.
        silent_known_s: By then all think an instance dead that stands still.
        false_deaths: How often in a run a well instance may declare another dead.
        false_suspicions: How often in a run a well instance may be suspected, each suspicion counted once.
    """

    dead_known_s: Seconds | None = None
    silent_known_s: Seconds | None = None
    false_deaths: Count | None = None
    false_suspicions: Count | None = None


class Prompts(Part):
    """What engines store and users move.

    Attributes:
        count: How many prompts there are.
        families: Prompts of one family begin alike.
        tokens: Shortest and longest; a chunk has four.
    """

    count: PositiveCount = 8
    families: PositiveCount = 3
    tokens: tuple[PositiveCount, PositiveCount] = (1, 30)


class Operations(Part):
    """What engines and users ask for, how often in a run.

    Attributes:
        stores: An engine stores a prompt.
        reads: An engine reads a prompt.
        lookups: An engine looks a prompt up, waits for what comes, and reads it.
        moves: A user moves a prompt, or everything.
        copies: A user copies one.
        pins: A user pins one somewhere, half of the times for some seconds only.
        unpins: A user unpins one somewhere.
        cancelled_share: Share of moves and copies that a user cancels soon afterwards.
        all_share: Share of moves and copies that take everything at the old position.
        one_by_one: Each has time to end before the next begins; otherwise they come at random times.
    """

    stores: Count = 27
    reads: Count = 10
    lookups: Count = 0
    moves: Count = 21
    copies: Count = 7
    pins: Count = 0
    unpins: Count = 0
    cancelled_share: Share = 0.1
    all_share: Share = 0.1
    one_by_one: bool = False


def _layout(value: object) -> object:
    return load_layout(value) if isinstance(value, str) else value


class Scenario(Part):
    """A workload and what it has to bear.

    Attributes:
        description: One line for people.
        instances: How many; a layout says it itself.
        layout: Where they are: the name of one in `topology/`. Without one all are equally near.
        capacity: Chunks that each can hold.
        peer_fetch: Whether lookups fetch from peers what they miss.
        log_changes: Of its inventory, how many an instance can tell a peer that lags.
        duration_s: Virtual time in which everything is asked for.
        prompts: What it is about.
        operations: What is asked for.
        faults: What goes wrong by chance meanwhile.
        blows: What is done to instances meanwhile.
        all_done: Whether every move must end `done`.
        lives: What must be true of who is thought to live.
    """

    description: str
    instances: Annotated[int, Ge(2), Le(128)] = 3
    layout: Annotated[Layout | None, BeforeValidator(_layout)] = None
    capacity: PositiveCount = 40
    peer_fetch: bool = False
    log_changes: PositiveCount = LOG_CHANGES
    duration_s: Annotated[float, Gt(0), Le(3600)] = 20.0
    prompts: Prompts = Prompts()
    operations: Operations = Operations()
    faults: Faults = Faults()
    blows: Blows = Blows()
    all_done: bool = False
    lives: Lives = Lives()

    @model_validator(mode="after")
    def _fits_its_layout(self) -> Self:
        if self.layout is not None and "instances" in self.model_fields_set:
            raise ValueError("instances: the layout says how many there are")
        if self.layout is None and (self.blows.group_cuts or self.blows.group_deafs):
            raise ValueError("blows on groups need a layout")
        return self

    @property
    def names(self) -> tuple[InstanceId, ...]:
        """Its instances."""
        return tuple(f"i{index}" for index in range(self.instances)) if self.layout is None else self.layout.names


def scenario_names() -> list[str]:
    """Names of all scenarios."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_scenario(name: str) -> Scenario:
    """Read `scenarios/NAME.yaml`.

    Raises:
        ScenarioError: There is none of that name, or its file isn't a scenario; all its problems are listed.
    """
    if name not in scenario_names():
        raise ScenarioError(f"There is no scenario {name!r}; there are {', '.join(scenario_names())}.")
    path = FOLDER / f"{name}.yaml"
    return parse_scenario(path.read_text(), path.name)


def parse_scenario(text: str, origin: str) -> Scenario:
    """Turn a scenario's yaml into a scenario; `origin` names it in errors.

    Raises:
        ScenarioError: It isn't one; all its problems are listed.
    """
    try:
        return Scenario.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ScenarioError(f"{origin}: {error}") from error
    except ValidationError as error:
        problems = (f"  {'.'.join(map(str, each['loc'])) or 'all of it'}: {each['msg']}" for each in error.errors())
        raise ScenarioError("\n".join([f"{origin} isn't a scenario:", *problems])) from error

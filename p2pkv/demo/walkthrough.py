"""What the walk-throughs have in common: what the seed does, with whatever engines, and the checks of it."""

import json
import signal
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from p2pkv.core.ids import Location
from p2pkv.demo.programs import Programs
from p2pkv.demo.setting import INSTANCES, free_ports, write_yamls
from p2pkv.demo.stage import Stage
from p2pkv.errors import P2pkvError

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
"""The name in the seed's commands, under which the demo's engines serve their small Llama."""
JOIN_S = 30.0
"""Nodes of one host meet within a second of a start, on an idle machine."""
VIEW_S = 2.0
"""After a change, every node's lookup agrees by then."""


@dataclass(slots=True)
class Prompt:
    """What is asked, and what is known of it once an engine has computed it.

    Attributes:
        name: What the checks call it.
        text: As a user writes it.
        tokens: Its ids.
        answer: What every engine should say to it.
    """

    name: str
    text: str
    tokens: list[int] = field(default_factory=list)
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a prompt.

    Attributes:
        text: The answer.
        computed: Tokens of the prompt that the engine computed.
        loaded: Tokens of the prompt that it loaded.
    """

    text: str
    computed: int
    loaded: int

    @property
    def origin(self) -> str:
        """Where the prompt's tokens came from."""
        return f"{self.loaded} of {self.loaded + self.computed} tokens from the cache"


class Walkthrough(ABC):
    """One run, in `folder`; what differs from engine to engine is in the classes made of it."""

    COMPUTED_ANYHOW = 0
    """How many tokens of a prompt that is held such an engine computes nevertheless."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self._stage = stage
        self._folder = folder
        self._runtime = folder / "run"
        self._ports, self._replaced = free_ports()
        self._engines = [f"http://localhost:{port}" for port in self._ports.engines]
        self._nodes = f"http://localhost:{self._ports.shared}"
        self._prompt = Prompt("the prompt", "Explain the significance of KV cache in language models.")

    async def run(self) -> None:
        """All of it.

        Raises:
            P2pkvError: A program didn't start, or a call wasn't answered.
        """
        for usual, other in self._replaced.items():
            self._stage.show(f"Port {usual} is taken; {other} is used instead.")
        self._runtime.mkdir(mode=0o700)
        self._stage.say("Two instances, one file each")
        self._stage.type(f"export P2PKV_RUNTIME_DIR={self._runtime}")
        configs = write_yamls(self._folder, self._ports)
        for config in configs:
            self._show_file(config)
        with Programs(self._folder, self._runtime) as programs:
            await self._play(programs, configs)

    @abstractmethod
    async def _play(self, programs: Programs, configs: tuple[Path, Path]) -> None:
        """All that takes place once the instances' files are there; `programs` are ended afterwards, if they run still."""

    @abstractmethod
    def _ask(self, index: int, fields: Mapping[str, object]) -> Answer:
        """Post a completion to engine `index` (0 or 1)."""

    def _show_file(self, path: Path) -> None:
        self._stage.type(f"cat {path}")
        self._stage.show(path.read_text(encoding="utf-8").rstrip())

    # --- scenes ---

    def _compute(self, prompt: Prompt) -> None:
        self._stage.say("A completion on engine 1, which computes the prompt's KV cache and keeps it at instance 1")
        computed = self._complete(0, prompt)
        self._stage.check(f"engine 1 computes {prompt.name}", computed.loaded == 0, computed.origin)
        prompt.answer = computed.text
        self._stage.say("The prompt's token ids")
        prompt.tokens = self._stage.post(f"{self._engines[0]}/tokenize", {"model": MODEL, "prompt": prompt.text})["tokens"]
        self._stage.say("Who holds it")
        self._check_holder(INSTANCES[0], prompt)

    def _move_over_http(self, prompt: Prompt) -> None:
        self._stage.say("Move it from engine 1's CPU to engine 2's CPU")
        moved = self._stage.post(f"{self._nodes}/move", self._order(prompt, *INSTANCES))
        count = len(prompt.tokens)
        self._stage.check(
            f"the move takes every token of {prompt.name}", moved["num_tokens"] == count, f"{moved['num_tokens']} of {count}"
        )
        self._stage.say("What the event says")
        self._check_event(
            f"{prompt.name} is moved over HTTP", self._stage.get(f"{self._nodes}/events/{moved['event_id']}"), "handoff"
        )
        self._stage.say("Who holds it now")
        self._check_holder(INSTANCES[1], prompt)
        self._stage.say("The same completion on engine 2, which loads the KV cache that engine 1 computed")
        self._check_loaded(1, prompt)

    def _compute_for_another_tenant(self, prompt: Prompt) -> None:
        self._stage.say("The same on engine 2 again, for another tenant, who shares no cache: all is computed")
        alone = self._complete(1, prompt, cache_salt="another tenant")
        self._stage.check("another tenant finds nothing cached", alone.loaded == 0, alone.origin)
        self._stage.check("the answer without any cache is the same", alone.text == prompt.answer, repr(alone.text))

    def _complete(self, index: int, prompt: Prompt, **more: object) -> Answer:
        return self._ask(index, {"model": MODEL, "prompt": prompt.text, "max_tokens": 10, **more})

    def _order(self, prompt: Prompt, old: str, new: str) -> dict[str, object]:
        positions = {"old_position": [old, Location.LOCAL_CPU], "new_position": [new, Location.LOCAL_CPU]}
        return {**positions, "tokens": prompt.tokens}

    # --- checks ---

    def _check_loaded(self, index: int, prompt: Prompt, when: str = "") -> None:
        """Complete on an engine whose instance holds the prompt."""
        loaded = self._complete(index, prompt)
        what = f"engine {index + 1} loads {'all but the last token of ' if self.COMPUTED_ANYHOW else ''}{prompt.name}{when}"
        is_loaded = (loaded.computed, loaded.loaded) == (self.COMPUTED_ANYHOW, len(prompt.tokens) - self.COMPUTED_ANYHOW)
        self._stage.check(what, is_loaded, loaded.origin)
        self._stage.check(f"engine {index + 1} gives the same answer{when}", loaded.text == prompt.answer, repr(loaded.text))

    def _check_event(self, what: str, event: Mapping[str, Any], lane: str) -> None:
        chunks = event["chunks"]
        is_done = event["state"] == "done" and chunks["found"] == chunks["moved"] > 0 and event["lane"] == lane
        seen = f"{event['state']}, {chunks['moved']} of {chunks['found']} chunks, {event['bytes']} bytes by {event['lane']}"
        self._stage.check(what, is_done, seen)

    def _check_holder(self, instance: str, prompt: Prompt) -> None:
        expected = {instance: [Location.LOCAL_CPU, len(prompt.tokens)]}
        reply = self._stage.post_until(
            f"{self._nodes}/lookup",
            {"tokens": prompt.tokens},
            lambda body: body.get("layout_info") == expected,
            within_s=VIEW_S,
        )
        holders = reply["layout_info"]
        seen = ", ".join(f"{name}: {held[1]} tokens" for name, held in holders.items())
        self._stage.check(f"only {instance} holds {prompt.name}", holders == expected, seen)


async def run_demo(walkthrough: type[Walkthrough], *, as_json: bool = False) -> int:
    """Run a whole walk-through; nothing of it is left running, however it ends.

    Only the websocket is awaited; all else blocks the event loop, which has nothing else to do.

    Args:
        walkthrough: Which one.
        as_json: Print the checks as one JSON object instead of the story.

    Returns:
        The exit code: 0 when all that was checked is true, else 1.
    """
    console = Console(quiet=as_json, highlight=False, soft_wrap=True)
    stage = Stage(console)
    before = signal.signal(signal.SIGTERM, _interrupt)
    problem = None
    try:
        with tempfile.TemporaryDirectory(prefix="p2pkv-demo-") as folder:
            await walkthrough(stage, Path(folder)).run()
    except P2pkvError as error:
        problem = str(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    is_good = problem is None and all(check.is_true for check in stage.checks)
    if as_json:
        typer.echo(json.dumps({"ok": is_good, "problem": problem, "checks": [asdict(check) for check in stage.checks]}))
        return 0 if is_good else 1
    console.print()
    console.print(stage.table())
    if problem is not None:
        console.print(f"[red]The demo could not go on:[/red] {escape(problem)}")
    return 0 if is_good else 1


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt

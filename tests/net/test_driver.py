"""The driver, round a machine that does as it is told."""

from collections.abc import Callable, Iterable
from functools import partial
from math import inf

import pytest
import trio
from trio.testing import MockClock

from p2pkv.core import effects
from p2pkv.core.effects import Effect
from p2pkv.core.events import DialFailed, Event, EventAsked, FetchEnded, LeaveRequested, LinkLost, RouteRefused, SiblingsFound
from p2pkv.core.ids import Address, EventId, LinkId, Location, Position, StageId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.machine import Machine
from p2pkv.core.messages import Message, Ping
from p2pkv.core.records import ChunkCounts, EventRecord, EventState, HandoffAddress, Operation
from p2pkv.errors import ErrorCode, Failure, RouteRefusedError, UnavailableError, UnknownNameError
from p2pkv.net.driver import Driver, EventSink

ADDRESS = Address("127.0.0.1", 8002)
KEY, OTHER_KEY = b"k" * 16, b"o" * 16
FAILURE = Failure(ErrorCode.TRANSFER_FAILED, "it failed")
FETCH = effects.FetchChunks("event", "a", HandoffAddress("boot", "/lane.sock"), b"t" * 32, (), Location.LOCAL_CPU, ())
Reaction = Callable[[Event], list[Effect]]


def record(state: EventState) -> EventRecord:
    position = Position("a", Location.LOCAL_CPU)
    return EventRecord(
        event_id="event",
        state=state,
        old_position=position,
        new_position=position,
        operation=Operation.MOVE,
        chunks=ChunkCounts(),
        num_tokens=0,
        nbytes=0,
        lane=None,
        started_at=0.0,
        finished_at=None,
        coordinator="a",
        error=None,
    )


class ObedientMachine(Machine):
    """Answers events as told, and remembers what happened when."""

    def __init__(self) -> None:
        self.reactions: dict[type[Event], Reaction] = {}
        self.heard: list[Event] = []
        self.woken_at: list[float] = []
        self.deadline = inf
        self.known: EventRecord | None = None

    def handle(self, event: Event, now: float) -> list[Effect]:
        self.heard.append(event)
        reaction = self.reactions.get(type(event))
        return [] if reaction is None else reaction(event)

    def wakeup_at(self) -> float:
        return self.deadline

    def wake(self, now: float) -> list[Effect]:
        self.woken_at.append(now)
        self.deadline = inf
        return []

    def event(self, event_id: EventId) -> EventRecord | None:
        return self.known


class Shell:
    """Memory, links and fetcher in one, which note what they are told."""

    def __init__(self) -> None:
        self.orders: list[object] = []
        self.during_send: Callable[[], None] = lambda: None
        self.fetched_first: list[ChunkKey] = []
        self.fetch_takes_s = 0.0
        self.refusal = ""

    def admit(self, stage: StageId, key: ChunkKey) -> None:
        self.orders.append(("admit", stage, key))

    def drop(self, stage: StageId, key: ChunkKey, worker: int | None = None) -> None:
        self.orders.append(("drop", stage, key, worker))

    def release(self, keys: Iterable[ChunkKey]) -> None:
        self.orders.append(("release", *keys))

    async def dial(self, address: Address, report: EventSink) -> None:
        self.orders.append(("dial", address))
        await trio.sleep(1)
        report(DialFailed(address, "nobody"))

    def send(self, link: LinkId, message: Message) -> None:
        self.orders.append(("send", link, message))
        self.during_send()

    def close(self, link: LinkId, reason: str) -> None:
        self.orders.append(("close", link, reason))

    async def fetch(self, order: effects.FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        fetched.extend(self.fetched_first)
        await trio.sleep(self.fetch_takes_s)
        if self.refusal:
            raise RouteRefusedError(self.refusal)
        fetched.append(OTHER_KEY)
        return None


@pytest.fixture
def machine() -> ObedientMachine:
    return ObedientMachine()


@pytest.fixture
def shell() -> Shell:
    return Shell()


@pytest.fixture
async def driver(machine: ObedientMachine, shell: Shell, nursery: trio.Nursery) -> Driver:
    driver = Driver(machine, memories={Location.LOCAL_CPU: shell}, links=shell, fetcher=shell)
    await nursery.start(driver.run)
    return driver


def on_siblings(machine: ObedientMachine, *orders: Effect) -> None:
    machine.reactions[SiblingsFound] = lambda _: list(orders)


async def test_orders_reach_memory_and_links_in_order(
    driver: Driver, machine: ObedientMachine, shell: Shell, autojump_clock: MockClock
) -> None:
    on_siblings(
        machine,
        effects.AdmitStaged("stage", Location.LOCAL_CPU, KEY),
        effects.SendMessage(3, Ping(1)),
        effects.DropStaged("stage", Location.LOCAL_CPU, KEY, 2),
        effects.ReleaseChunks(Location.LOCAL_CPU, (KEY, OTHER_KEY), effects.ReleaseReason.MOVED),
        effects.CloseLink(3, "enough"),
    )
    driver.handle(SiblingsFound(()))
    assert shell.orders == [
        ("admit", "stage", KEY),
        ("send", 3, Ping(1)),
        ("drop", "stage", KEY, 2),
        ("release", KEY, OTHER_KEY),
        ("close", 3, "enough"),
    ]


async def test_an_event_that_arises_meanwhile_waits_its_turn(
    driver: Driver, machine: ObedientMachine, shell: Shell, autojump_clock: MockClock
) -> None:
    on_siblings(machine, effects.SendMessage(3, Ping(1)), effects.CloseLink(3, "enough"))
    machine.reactions[LinkLost] = lambda _: [effects.ReleaseChunks(Location.LOCAL_CPU, (), effects.ReleaseReason.EVICTED)]
    shell.during_send = lambda: driver.handle(LinkLost(3, "full"))
    driver.handle(SiblingsFound(()))
    assert [order[0] for order in shell.orders if isinstance(order, tuple)] == ["send", "close", "release"]


async def test_the_machine_is_woken_at_its_deadline(
    driver: Driver, machine: ObedientMachine, autojump_clock: MockClock
) -> None:
    started = trio.current_time()
    machine.deadline = started + 10
    driver.handle(SiblingsFound(()))
    await trio.sleep(20)
    assert machine.woken_at == [started + 10]


async def test_a_deadline_that_moves_forward_wakes_earlier(
    driver: Driver, machine: ObedientMachine, autojump_clock: MockClock
) -> None:
    started = trio.current_time()
    machine.deadline = started + 10
    driver.handle(SiblingsFound(()))
    await trio.sleep(1)
    machine.deadline = started + 2
    driver.handle(SiblingsFound(()))
    await trio.sleep(20)
    assert machine.woken_at == [started + 2]


async def test_dialing_takes_its_time_and_ends_in_an_event(
    driver: Driver, machine: ObedientMachine, shell: Shell, autojump_clock: MockClock
) -> None:
    on_siblings(machine, effects.OpenLink(ADDRESS))
    driver.handle(SiblingsFound(()))
    await trio.sleep(2)
    assert shell.orders == [("dial", ADDRESS)]
    assert machine.heard[1:] == [DialFailed(ADDRESS, "nobody")]


async def test_a_fetch_ends_in_one_event(
    driver: Driver, machine: ObedientMachine, shell: Shell, autojump_clock: MockClock
) -> None:
    on_siblings(machine, FETCH)
    driver.handle(SiblingsFound(()))
    await trio.sleep(1)
    assert machine.heard[1:] == [FetchEnded("event", (OTHER_KEY,), None)]


async def test_a_route_that_is_refused_is_told_as_that(
    driver: Driver, machine: ObedientMachine, shell: Shell, autojump_clock: MockClock
) -> None:
    on_siblings(machine, FETCH)
    shell.refusal = "no way"
    driver.handle(SiblingsFound(()))
    await trio.sleep(1)
    assert machine.heard[1:] == [RouteRefused("event", Failure(ErrorCode.TRANSFER_FAILED, "no way"))]


@pytest.mark.parametrize("wait_s", [0, 1])
async def test_a_cancelled_fetch_tells_what_it_brought(
    driver: Driver, machine: ObedientMachine, shell: Shell, wait_s: float, autojump_clock: MockClock
) -> None:
    on_siblings(machine, FETCH)
    machine.reactions[LinkLost] = lambda _: [effects.CancelFetch("event")]
    shell.fetched_first, shell.fetch_takes_s = [KEY], 60
    driver.handle(SiblingsFound(()))
    if wait_s:
        await trio.sleep(wait_s)
    driver.handle(LinkLost(1, "gone"))
    driver.handle(LinkLost(1, "twice"))
    await trio.sleep(100)
    ended = [event for event in machine.heard if isinstance(event, FetchEnded)]
    assert len(ended) == 1
    assert ended[0].fetched == (KEY,)
    assert ended[0].failure is not None
    assert ended[0].failure.code is ErrorCode.CANCELLED


async def test_a_request_gets_its_own_answer(driver: Driver, machine: ObedientMachine, autojump_clock: MockClock) -> None:
    machine.reactions[EventAsked] = lambda event: [effects.Answer(event.request, len(event.event_id))]  # type: ignore[union-attr]
    assert await driver.request(partial(EventAsked, event_id="four")) == 4
    assert await driver.request(partial(EventAsked, event_id="six666")) == 6


async def test_an_answer_may_come_later(
    driver: Driver, machine: ObedientMachine, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    machine.reactions[LinkLost] = lambda _: [
        effects.Answer(event.request, 7) for event in machine.heard if isinstance(event, EventAsked)
    ]
    nursery.start_soon(_later, driver)
    with trio.fail_after(10):
        assert await driver.request(partial(EventAsked, event_id="event")) == 7


async def _later(driver: Driver) -> None:
    await trio.sleep(5)
    driver.handle(LinkLost(1, "now"))


async def test_a_refused_request_raises_its_failure(
    driver: Driver, machine: ObedientMachine, autojump_clock: MockClock
) -> None:
    failure = Failure(ErrorCode.UNKNOWN_EVENT, "no such event")
    machine.reactions[EventAsked] = lambda event: [effects.Answer(event.request, None, failure)]  # type: ignore[union-attr]
    with pytest.raises(UnknownNameError, match="no such event"):
        await driver.request(partial(EventAsked, event_id="event"))


async def test_an_answer_that_nobody_waits_for_is_no_harm(
    driver: Driver, machine: ObedientMachine, autojump_clock: MockClock
) -> None:
    with trio.move_on_after(1):
        await driver.request(partial(EventAsked, event_id="event"))
    on_siblings(machine, effects.Answer(1, None), effects.Answer(99, None))
    driver.handle(SiblingsFound(()))


async def test_waiting_for_an_end_ends_with_the_final_record(
    driver: Driver, machine: ObedientMachine, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    machine.known = record(EventState.RUNNING)
    on_siblings(machine, effects.EventChanged(record(EventState.RUNNING)), effects.EventChanged(record(EventState.PARTIAL)))
    ends: list[EventRecord] = []

    async def wait() -> None:
        ends.append(await driver.wait_end("event"))

    nursery.start_soon(wait)
    nursery.start_soon(wait)
    await trio.sleep(1)
    driver.handle(SiblingsFound(()))
    await trio.sleep(1)
    assert ends == [record(EventState.PARTIAL)] * 2


async def test_an_end_that_is_known_is_not_waited_for(
    driver: Driver, machine: ObedientMachine, autojump_clock: MockClock
) -> None:
    machine.known = record(EventState.DONE)
    with trio.fail_after(1):
        assert await driver.wait_end("event") == machine.known


async def test_watchers_are_told_of_every_change_while_they_watch(
    driver: Driver, machine: ObedientMachine, autojump_clock: MockClock
) -> None:
    changes = [record(EventState.PENDING), record(EventState.RUNNING), record(EventState.DONE)]
    on_siblings(machine, *map(effects.EventChanged, changes))
    first: list[EventRecord] = []
    second: list[EventRecord] = []
    with driver.watch_events(first.append):
        with driver.watch_events(second.append):
            driver.handle(SiblingsFound(()))
        driver.handle(SiblingsFound(()))
    driver.handle(SiblingsFound(()))
    assert (first, second) == (changes * 2, changes)


async def test_after_the_stop_nothing_reaches_the_machine(
    driver: Driver, machine: ObedientMachine, autojump_clock: MockClock
) -> None:
    machine.reactions[LeaveRequested] = lambda _: [effects.Stop(FAILURE)]
    driver.handle(LeaveRequested())
    driver.handle(SiblingsFound(()))
    with trio.fail_after(1):
        assert await driver.wait_stopped() == FAILURE
    assert machine.heard == [LeaveRequested()]


async def test_the_stop_refuses_all_requests_that_wait_or_come(
    driver: Driver, machine: ObedientMachine, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    machine.reactions[LinkLost] = lambda _: [effects.Stop(None)]
    nursery.start_soon(_later, driver)
    for _ in range(2):
        with trio.fail_after(10), pytest.raises(UnavailableError, match="left the cluster"):
            await driver.request(partial(EventAsked, event_id="event"))


async def test_a_bug_in_the_machine_ends_the_node_loudly(
    machine: ObedientMachine, shell: Shell, autojump_clock: MockClock
) -> None:
    def fail(event: Event) -> list[Effect]:
        raise ZeroDivisionError

    machine.reactions[LinkLost] = fail
    driver = Driver(machine, memories={Location.LOCAL_CPU: shell}, links=shell, fetcher=shell)

    async def run_into_it() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(driver.run)
            with pytest.raises(ZeroDivisionError):
                driver.handle(LinkLost(1, "gone"))  # whoever reported the event may carry on
            driver.handle(SiblingsFound(()))
            await trio.sleep_forever()

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        await run_into_it()
    assert machine.heard == [LinkLost(1, "gone")]

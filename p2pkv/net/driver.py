"""Where the core meets clock and network.

The driver hands every event to the machine and performs the effects that come back, in order and without awaiting. An event
that arises while effects are performed waits its turn. Effects that take time run in the driver's own nursery and end in one
event each. A bug in the machine ends the node: half a step may have been taken, and nothing more may be built on that.
"""

import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import Generic, Protocol, TypeVar, TypeVarTuple, assert_never
from weakref import WeakValueDictionary

import trio

from p2pkv.core import effects, events
from p2pkv.core.effects import Answer, AnswerValue, Effect
from p2pkv.core.events import ClientId, Event
from p2pkv.core.ids import Address, EventId, LinkId, Location, RequestId, StageId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.machine import Machine
from p2pkv.core.messages import Message
from p2pkv.core.records import EventRecord
from p2pkv.errors import ErrorCode, Failure, RouteRefusedError, failure_error
from p2pkv.net.logs import logger

_log = logger("driver")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STOPPED = Failure(ErrorCode.LEAVING, "This node has left the cluster; ask another.")

EventSink = Callable[[Event], None]


class Memory(Protocol):
    """What a store does for the driver; see `CpuStore` and `DiskStore`."""

    def admit(self, stage: StageId, key: ChunkKey) -> None:
        """Make a staged chunk resident."""

    def drop(self, stage: StageId, key: ChunkKey, worker: int | None = None) -> None:
        """Free a staged chunk, or one shard of it."""

    def release(self, keys: Iterable[ChunkKey]) -> None:
        """Free resident chunks."""


class Links(Protocol):
    """What the links to peers do for the driver; see `PeerLinks`."""

    async def dial(self, address: Address, report: EventSink) -> None:
        """Open a link and keep it until it is lost, reporting `DialFailed`, or `LinkOpened` and all that follows."""

    def send(self, link: LinkId, message: Message) -> None:
        """Enqueue a message; on a link that is lost already, nothing happens."""

    def close(self, link: LinkId, reason: str) -> None:
        """Close a link after what was sent on it."""


class Fetcher(Protocol):
    """What transfer lanes do for the driver; see `RouteFetcher`."""

    async def fetch(self, order: effects.FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """Stage the chunks of `order`, appending each to `fetched` when it is whole; may be cancelled at any time.

        Cancelled or failed, it leaves the whole chunks staged, and nothing of the others.

        Returns:
            Why some of them didn't come; None when all did.

        Raises:
            RouteRefusedError: The lane couldn't be opened, and nothing was fetched.
        """


class Driver:
    """One node's machine, running.

    Args:
        machine: Nobody else may call its `handle` and `wake`.
        memories: Hold the bytes, each at its location.
        links: Carry messages.
        fetcher: Brings chunks.
    """

    def __init__(self, machine: Machine, *, memories: Mapping[Location, Memory], links: Links, fetcher: Fetcher) -> None:
        self.machine = machine
        self._memories = memories
        self._links = links
        self._fetcher = fetcher
        self._nursery: trio.Nursery | None = None
        self._steps: deque[Callable[[float], list[Effect]]] = deque()
        self._is_stepping = False
        self._armed_at = math.inf
        self._deadline_moved = trio.Event()
        self._request_ids = count(1)
        self._client_ids = count(1)
        self._answers: dict[RequestId, _Promise[Answer]] = {}
        self._ends: WeakValueDictionary[EventId, _Promise[EventRecord]] = WeakValueDictionary()  # as long as someone waits
        self._watchers: list[Callable[[EventRecord], None]] = []
        self._fetches: dict[EventId, trio.CancelScope] = {}
        self._stopped: _Promise[Failure | None] = _Promise()
        self._bug: Exception | None = None

    # --- for doors ---

    def handle(self, event: Event) -> None:
        """Tell the machine what happened, and do what it orders. After the machine has stopped, nothing."""
        self._step(partial(self.machine.handle, event))

    async def request(self, make: Callable[[RequestId], Event]) -> AnswerValue:
        """Ask the machine something and wait for its answer; the caller sets the deadline.

        Args:
            make: Gives the event that asks, for the request's id.

        Raises:
            FailureError: It was refused, or it failed.

        Cancelled, it leaves the request to run its course unwatched.
        """
        if self.is_stopped:
            raise failure_error(STOPPED)
        request = next(self._request_ids)
        answer = self._answers[request] = _Promise()
        try:
            self.handle(make(request))
            return _unwrap(await answer.wait())
        finally:
            del self._answers[request]

    def new_client(self) -> ClientId:
        """The id of a newly attached engine connection."""
        return next(self._client_ids)

    async def wait_end(self, event_id: EventId) -> EventRecord:
        """Wait until an event that this node takes part in is final; the caller sets the deadline."""
        known = self.machine.event(event_id)
        if known is not None and known.state.is_final:
            return known
        end = self._ends.get(event_id)
        if end is None:
            end = self._ends[event_id] = _Promise()
        return await end.wait()

    @contextmanager
    def watch_events(self, told: Callable[[EventRecord], None]) -> Iterator[None]:
        """Tell of every change of an event that this node takes part in or was asked for, until exit.

        Args:
            told: Called amid a step: it must neither raise nor call back, and bounds what it keeps itself.
        """
        self._watchers.append(told)
        try:
            yield
        finally:
            self._watchers.remove(told)

    # --- for the node ---

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the machine's time, its links and its fetches, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await self._keep_time()
            finally:
                self._stop(None)

    async def wait_stopped(self) -> Failure | None:
        """Wait until the machine's work is over: None after leaving, else why it can't go on."""
        return await self._stopped.wait()

    @property
    def is_stopped(self) -> bool:
        """Whether the machine's work is over."""
        return self._stopped.is_kept

    # --- steps ---

    def _step(self, step: Callable[[float], list[Effect]]) -> None:
        self._steps.append(step)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._steps and self._bug is None and not self.is_stopped:
                for effect in self._steps.popleft()(trio.current_time()):
                    self._perform(effect)
        except Exception as bug:
            self._bug = bug  # whoever called may live on, the node must not
            self._deadline_moved.set()
            raise
        finally:
            self._is_stepping = False
        if self.machine.wakeup_at() < self._armed_at:  # a later one is seen when the earlier has passed
            self._deadline_moved.set()

    async def _keep_time(self) -> None:
        while self._bug is None:
            self._armed_at = self.machine.wakeup_at()
            self._deadline_moved = trio.Event()
            with trio.CancelScope(deadline=self._armed_at) as wait:
                await self._deadline_moved.wait()
            if wait.cancelled_caught:
                self._step(self.machine.wake)
        raise self._bug

    def _perform(self, effect: Effect) -> None:
        match effect:
            case effects.SendMessage():
                self._links.send(effect.link, effect.message)
            case effects.OpenLink():
                self._start(self._links.dial, effect.address, self.handle)
            case effects.CloseLink():
                self._links.close(effect.link, effect.reason)
            case effects.AdmitStaged():
                self._memories[effect.location].admit(effect.stage, effect.key)
            case effects.DropStaged():
                self._memories[effect.location].drop(effect.stage, effect.key, effect.worker)
            case effects.ReleaseChunks():
                self._memories[effect.location].release(effect.keys)
            case effects.FetchChunks():
                scope = self._fetches[effect.event_id] = trio.CancelScope()
                self._start(self._fetch, effect, scope)
            case effects.CancelFetch():
                if effect.event_id in self._fetches:
                    self._fetches[effect.event_id].cancel()
            case effects.Answer():
                if effect.request in self._answers:
                    self._answers[effect.request].keep(effect)
            case effects.EventChanged():
                self._tell_event(effect.event)
            case effects.MemberChanged():
                _log.info("member", instance=effect.member.instance, state=effect.member.state.value)
            case effects.InventoryDoubted():
                _log.warning("an inventory isn't believed", instance=effect.instance, reason=effect.reason)
            case effects.Stop():
                self._stop(effect.failure)
            case _:
                assert_never(effect)

    def _stop(self, failure: Failure | None) -> None:
        self._stopped.keep(failure)
        for request, answer in self._answers.items():
            answer.keep(Answer(request, None, STOPPED))

    def _start(self, work: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        assert self._nursery is not None, "effects that take time need a running driver"
        self._nursery.start_soon(work, *args)

    async def _fetch(self, order: effects.FetchChunks, scope: trio.CancelScope) -> None:
        fetched: list[ChunkKey] = []
        failure: Failure | None = Failure(ErrorCode.CANCELLED, "the fetch was cancelled")
        refusal: Failure | None = None
        with scope:
            try:
                failure = await self._fetcher.fetch(order, fetched)
            except RouteRefusedError as error:
                _log.info("a route was refused", event_id=order.event_id, reason=str(error))
                refusal = Failure(ErrorCode.TRANSFER_FAILED, str(error))
        del self._fetches[order.event_id]
        if refusal is not None:
            self.handle(events.RouteRefused(order.event_id, refusal))
        else:
            self.handle(events.FetchEnded(order.event_id, tuple(fetched), failure))

    def _tell_event(self, event: EventRecord) -> None:
        for told in self._watchers:
            told(event)
        if not event.state.is_final:
            return
        _log.info("move ended", event_id=event.event_id, state=event.state.value, chunks=asdict(event.chunks))
        if event.event_id in self._ends:
            self._ends[event.event_id].keep(event)


class _Promise(Generic[T]):
    """A value that will be there; the first one given counts."""

    def __init__(self) -> None:
        self._values: list[T] = []
        self._is_there = trio.Event()

    @property
    def is_kept(self) -> bool:
        return self._is_there.is_set()

    def keep(self, value: T) -> None:
        self._values.append(value)
        self._is_there.set()

    async def wait(self) -> T:
        await self._is_there.wait()
        return self._values[0]


def _unwrap(answer: Answer) -> AnswerValue:
    if answer.failure is not None:
        raise failure_error(answer.failure)
    return answer.value

"""A node of which tests decide what it knows of events, and clients of its `/control`, without sockets."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import trio
import trio.testing
from trio_websocket import WebSocketConnection, wrap_client_stream, wrap_server_stream

from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import Answer, Effect, EventChanged
from p2pkv.core.events import Event, EventAsked, SiblingsFound
from p2pkv.core.ids import Address, EventId, Location, Position
from p2pkv.core.machine import Machine
from p2pkv.core.records import ChunkCounts, EventRecord, EventState, Operation
from p2pkv.net.access import DoorGuard
from p2pkv.net.control import ControlDoor
from p2pkv.net.driver import Driver, Memory
from p2pkv.net.websockets import MAX_ACCEPTED_NBYTES, WEBSOCKET_ERRORS
from p2pkv.store.cpu import CpuStore

HERE = ["a", "LocalCPUBackend"]
PORT = 9000
MOVE_DEADLINE_S = 60.0
CONFIG = MachineConfig(
    instance="a",
    generation=7,
    cluster="p2pkv",
    ws=Address("127.0.0.1", 8002),
    http=f"http://127.0.0.1:{PORT}",
    transfer=None,
    handoff=None,
    zone="here",
    chunk_size=256,
    cpu_limit_nbytes=2**20,
    descriptor_limit=100,
    move_deadline_s=MOVE_DEADLINE_S,
    lease_s=30.0,
    leave_s=2.0,
    peer_fetch=False,
    wall_offset_s=0.0,
)


def event_record(event_id: EventId, state: EventState = EventState.RUNNING, *, moved_count: int = 0) -> EventRecord:
    position = Position("a", Location.LOCAL_CPU)
    return EventRecord(
        event_id=event_id,
        state=state,
        old_position=position,
        new_position=position,
        operation=Operation.MOVE,
        chunks=ChunkCounts(found=1000, moved=moved_count),
        num_tokens=0,
        nbytes=0,
        lane=None,
        started_at=1.0,
        finished_at=None,
        coordinator="a",
        error=None,
    )


class KnowingMachine(Machine):
    """A lone node's machine that also knows of the events it is given, and never answers for those in `withheld`."""

    def __init__(self) -> None:
        super().__init__(CONFIG, Random("control"), trio.current_time())
        self.given: dict[EventId, EventRecord] = {}
        self.withheld: set[EventId] = set()
        self.asked_at: list[float] = []
        self._changed: list[EventRecord] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, EventAsked) and event.event_id in self.withheld:
            return []
        if isinstance(event, EventAsked) and event.event_id in self.given:
            self.asked_at.append(now)
            return [Answer(event.request, self.given[event.event_id])]
        if isinstance(event, SiblingsFound) and self._changed:
            changed, self._changed = self._changed, []
            return [EventChanged(record) for record in changed]
        return super().handle(event, now)

    def change(self, driver: Driver, *records: EventRecord) -> None:
        """Let events change, and the node be told of it."""
        self.given |= {record.event_id: record for record in records}
        self._changed = list(records)
        driver.handle(SiblingsFound(()))


class Unused:
    """Links and lanes of a node that has no peers."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name}: there is nobody")


class Client:
    """One `/control` websocket, seen from its client."""

    receive_s = 30.0

    def __init__(self, websocket: WebSocketConnection) -> None:
        self.websocket = websocket

    async def send(self, **fields: object) -> None:
        await self.websocket.send_message(json.dumps(fields))

    async def receive(self) -> dict[str, Any]:
        with trio.fail_after(self.receive_s):
            message = json.loads(await self.websocket.get_message())
        assert isinstance(message, dict)
        return message

    async def ask(self, **fields: object) -> dict[str, Any]:
        await self.send(**fields)
        return await self.receive()

    async def is_silent(self, for_s: float = 5.0) -> bool:
        """Whether nothing comes."""
        with trio.move_on_after(for_s):
            await self.websocket.get_message()
            return False
        return True


class ControlledNode:
    """A driver and its `/control` door."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.machine = KnowingMachine()
        self.store = CpuStore()
        memory: Memory = self.store
        unused: Any = Unused()
        self.driver = Driver(self.machine, memories={Location.LOCAL_CPU: memory}, links=unused, fetcher=unused)
        self.door = ControlDoor(self.driver, DoorGuard(frozenset({PORT})))
        self._nursery = nursery

    def change(self, event_id: EventId, state: EventState = EventState.RUNNING, *, moved_count: int = 0) -> None:
        self.machine.change(self.driver, event_record(event_id, state, moved_count=moved_count))

    def change_elsewhere(self, event_id: EventId, state: EventState, *, moved_count: int = 0) -> None:
        """The same, where this node isn't told."""
        self.machine.given[event_id] = event_record(event_id, state, moved_count=moved_count)

    async def connect_stream(self, ends: tuple[trio.abc.Stream, trio.abc.Stream] | None = None) -> trio.abc.Stream:
        """A connection to the door; `ends` that hold nothing back make a client whose reading can be told."""
        ours, theirs = ends or trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve, theirs)
        return ours

    async def connect(self, ends: tuple[trio.abc.Stream, trio.abc.Stream] | None = None) -> Client:
        stream: Any = await self.connect_stream(ends)  # trio-websocket says that it wants sockets, and takes any stream
        return Client(await wrap_client_stream(self._nursery, stream, f"localhost:{PORT}", "/control"))

    async def _serve(self, stream: trio.abc.Stream) -> None:
        try:
            async with stream, trio.open_nursery() as nursery:
                request = await wrap_server_stream(nursery, stream, max_message_size=MAX_ACCEPTED_NBYTES)
                await self.door.accept(request)
                nursery.cancel_scope.cancel()
        except* WEBSOCKET_ERRORS:
            pass


@asynccontextmanager
async def open_controlled_node() -> AsyncIterator[ControlledNode]:
    async with trio.open_nursery() as nursery:
        node = ControlledNode(nursery)
        await nursery.start(node.driver.run)
        yield node
        nursery.cancel_scope.cancel()
    node.store.close()


def pushed(event_id: EventId, state: str, moved_count: int = 0) -> tuple[str, str, str, int]:
    """What `essence` is of a push."""
    return ("event", event_id, state, moved_count)


def essence(push: dict[str, Any]) -> tuple[str, str, str, int]:
    """What tests look at in a push."""
    assert "id" not in push
    return (push["type"], push["event_id"], push["state"], push["chunks"]["moved"])

"""The calls: what can be asked of any node, whichever door the question comes through.

Each turns a validated request into a question to the driver, and its answer into a reply. HTTP and `/control` are two skins of
them. A call that is refused, or fails, raises a `FailureError`; `refusal_fields` says how that looks.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import trio
from pydantic import TypeAdapter

from p2pkv.core.directory import Held
from p2pkv.core.effects import AnswerValue
from p2pkv.core.events import CancelRequested, EventAsked, MoveRequested
from p2pkv.core.keys import Identity
from p2pkv.core.records import EventRecord, EventState
from p2pkv.errors import ErrorCode, Failure, FailureError, UnavailableError
from p2pkv.net import instance_calls
from p2pkv.net.driver import Driver
from p2pkv.net.replies import (
    ChangedReply,
    CheckFinishReply,
    EmptyReply,
    EventReply,
    EventsReply,
    FullLookupReply,
    HealthReply,
    InventoryReply,
    LookupReply,
    MembersReply,
    MoveReply,
    QueryInstanceReply,
    QueryWorkerInfoReply,
    call_id,
    event_reply,
    member_reply,
)
from p2pkv.net.requests import (
    CompressBody,
    EmptyBody,
    EventBody,
    HealthBody,
    InventoryBody,
    LookupBody,
    MoveBody,
    PinBody,
    PositionBody,
    QueryInstanceBody,
    QueryWorkerInfoBody,
    parse_position,
)

B = TypeVar("B")
R = TypeVar("R")

ASK_EVERY_S = 0.5
"""How late a node may learn of an event that nobody tells it of."""
BUG_FIELDS = {"detail": "This is a bug of the node. Its log has the traceback.", "error": "internal_error"}
"""What a door answers when a call fails in a way that nobody foresaw."""


@dataclass(frozen=True, slots=True)
class Call(Generic[B, R]):
    """One thing that can be asked of a node.

    Attributes:
        name: Of the call, at every door.
        body: The shape of its request.
        reply: The shape of its answer.
        run: Does it.
        body_adapter: Validates requests.
        reply_adapter: Writes replies.
    """

    name: str
    body: type[B]
    reply: type[R]
    run: Callable[[Driver, B], Awaitable[R]]
    body_adapter: TypeAdapter[B] = field(init=False)
    reply_adapter: TypeAdapter[R] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "body_adapter", TypeAdapter(self.body))
        object.__setattr__(self, "reply_adapter", TypeAdapter(self.reply))

    def dump(self, reply: R) -> dict[str, Any]:
        """The fields of `reply`."""
        fields: dict[str, Any] = self.reply_adapter.dump_python(reply)
        return fields

    @property
    def summary(self) -> str:
        """What it does, for people."""
        return self.run.__doc__ or ""


class MoveFailedError(FailureError):
    """A move ended without success while its request waited: the answer tells of both, the failure and the event."""

    def __init__(self, failure: Failure, event: EventRecord) -> None:
        super().__init__(failure)
        self.event = event


def refusal_fields(failed: FailureError) -> dict[str, object]:
    """What a door answers in place of a reply."""
    fields: dict[str, object] = {"detail": failed.failure.detail, "error": failed.failure.code}
    if isinstance(failed, MoveFailedError):
        fields |= {"event_id": failed.event.event_id, "num_tokens": failed.event.num_tokens, "state": failed.event.state}
    return fields


async def _move(driver: Driver, body: MoveBody) -> MoveReply:
    """Move or copy chunks; answers at the move's end, at the latest after `wait_s` seconds."""
    old_position, new_position = parse_position(body.old_position), parse_position(body.new_position)
    operation, selection = body.operation(), body.selection()
    event = _event_of(
        await driver.request(
            lambda request: MoveRequested(
                request=request,
                old_position=old_position,
                new_position=new_position,
                operation=operation,
                selection=selection,
                tokens=body.tokens,
                identity=Identity(cache_salt=body.cache_salt),
                model=body.model,
                idempotency_key=body.idempotency_key,
            )
        )
    )
    with trio.move_on_after(body.wait_s):
        event = await _end_of(driver, event)
    if event.state in (EventState.FAILED, EventState.CANCELLED):
        failure = event.error or Failure(ErrorCode.CANCELLED, "It was cancelled.")
        raise MoveFailedError(failure, event)
    return MoveReply(event_id=event.event_id, num_tokens=event.num_tokens, state=event.state)


async def _end_of(driver: Driver, event: EventRecord) -> EventRecord:
    """An event when it has ended; one that another node coordinates, as a repeated request's may be, is asked for."""
    if not event.state.is_final and event.coordinator == driver.machine.config.instance:
        return await driver.wait_end(event.event_id)
    while not event.state.is_final:
        await trio.sleep(ASK_EVERY_S)
        with suppress(FailureError):  # nobody may be there to tell at the moment; what was known counts
            event = await ask_event(driver, event.event_id)
    return event


async def _lookup(driver: Driver, body: LookupBody) -> LookupReply:
    """Which instances hold how much of a prompt, as far as this node knows: of each its best location."""
    best: dict[str, tuple[str, int]] = {}
    for held in _holders(driver, body):
        if held.instance not in best or held.num_tokens > best[held.instance][1]:
            best[held.instance] = (held.location, held.num_tokens)
    return LookupReply(event_id=call_id("lookup"), layout_info=best, complete=driver.machine.is_view_complete())


async def _full_lookup(driver: Driver, body: LookupBody) -> FullLookupReply:
    """Which instances hold how much of a prompt, as far as this node knows: of each all its locations."""
    layout: dict[str, list[tuple[str, int]]] = {}
    for held in _holders(driver, body):
        layout.setdefault(held.instance, []).append((held.location, held.num_tokens))
    return FullLookupReply(event_id=call_id("full_lookup"), layout_info=layout, complete=driver.machine.is_view_complete())


def _holders(driver: Driver, body: LookupBody) -> tuple[Held, ...]:
    return driver.machine.lookup(body.tokens, body.model, Identity(cache_salt=body.cache_salt))


async def _check_finish(driver: Driver, body: EventBody) -> CheckFinishReply:
    """The state of an event."""
    return CheckFinishReply(status=(await ask_event(driver, body.event_id)).state)


async def _events(driver: Driver, _: EmptyBody) -> EventsReply:
    """Events that this node takes part in or was asked for, newest first."""
    return EventsReply(events=[event_reply(event) for event in driver.machine.events()])


async def _event(driver: Driver, body: EventBody) -> EventReply:
    """One event, wherever it runs."""
    return event_reply(await ask_event(driver, body.event_id))


async def _cancel(driver: Driver, body: EventBody) -> EventReply:
    """Cancel a move that hasn't begun to hand over; answers with its event, cancelled or not."""
    return event_reply(_event_of(await driver.request(lambda request: CancelRequested(request, body.event_id))))


async def _members(driver: Driver, _: EmptyBody) -> MembersReply:
    """Every instance that this node knows, itself included, by name."""
    machine = driver.machine
    return MembersReply(members=[member_reply(each) for each in machine.members()], instance=machine.config.instance)


async def _livez(_driver: Driver, _: EmptyBody) -> EmptyReply:
    """Whether the node runs."""
    return EmptyReply()


async def _readyz(driver: Driver, _: EmptyBody) -> EmptyReply:
    """Whether the node takes moves."""
    if driver.machine.is_leaving:
        raise UnavailableError(Failure(ErrorCode.LEAVING, "This node is leaving the cluster; ask another."))
    return EmptyReply()


async def ask_event(driver: Driver, event_id: str) -> EventRecord:
    """An event's record, wherever it runs.

    Raises:
        FailureError: Nobody who can be reached knows it.
    """
    return _event_of(await driver.request(lambda request: EventAsked(request, event_id)))


def _event_of(answer: AnswerValue) -> EventRecord:
    assert isinstance(answer, EventRecord), answer  # the core's promise for these requests
    return answer


MOVE = Call("move", MoveBody, MoveReply, _move)
LOOKUP = Call("lookup", LookupBody, LookupReply, _lookup)
FULL_LOOKUP = Call("full_lookup", LookupBody, FullLookupReply, _full_lookup)
HEALTH = Call("health", HealthBody, HealthReply, instance_calls.health)
QUERY_INSTANCE = Call("query_instance", QueryInstanceBody, QueryInstanceReply, instance_calls.query_instance)
QUERY_WORKER_INFO = Call("query_worker_info", QueryWorkerInfoBody, QueryWorkerInfoReply, instance_calls.query_worker_info)
CLEAR = Call("clear", PositionBody, ChangedReply, instance_calls.clear)
PIN = Call("pin", PinBody, ChangedReply, instance_calls.pin)
UNPIN = Call("unpin", PinBody, ChangedReply, instance_calls.unpin)
COMPRESS = Call("compress", CompressBody, EmptyReply, instance_calls.compress)
DECOMPRESS = Call("decompress", CompressBody, EmptyReply, instance_calls.compress)
INVENTORY = Call("inventory", InventoryBody, InventoryReply, instance_calls.inventory)
CHECK_FINISH = Call("check_finish", EventBody, CheckFinishReply, _check_finish)
EVENTS = Call("events", EmptyBody, EventsReply, _events)
EVENT = Call("event", EventBody, EventReply, _event)
CANCEL = Call("cancel", EventBody, EventReply, _cancel)
MEMBERS = Call("members", EmptyBody, MembersReply, _members)
LIVEZ = Call("livez", EmptyBody, EmptyReply, _livez)
READYZ = Call("readyz", EmptyBody, EmptyReply, _readyz)

CALLS: Mapping[str, Call[Any, Any]] = {
    call.name: call
    for call in (
        MOVE,
        LOOKUP,
        FULL_LOOKUP,
        HEALTH,
        QUERY_INSTANCE,
        QUERY_WORKER_INFO,
        CLEAR,
        PIN,
        UNPIN,
        COMPRESS,
        DECOMPRESS,
        INVENTORY,
        CHECK_FINISH,
        EVENTS,
        EVENT,
        CANCEL,
        MEMBERS,
        LIVEZ,
        READYZ,
    )
}
"""By name."""

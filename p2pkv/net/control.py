"""The websocket `/control`: the calls as JSON, one object a message, and events pushed as they change.

`{"id", "type": call, ...fields}` is answered by `{"id", "type": call, ...reply}`, or by `{"id", "type": "error", "detail",
"error"}`; what has no readable id is answered with id null. Requests of one socket run at the same time, at most
`MAX_IN_FLIGHT`, and answers come as they are ready. `watch` pushes `{"type": "event", ...}`, without an id.

Nobody waits for a client. What it doesn't take waits in a bounded queue, of its pushes only the newest for each event once it
lags, and after `STALL_S` it is disconnected. A client that is silent may stay.
"""

import traceback
from collections.abc import Hashable
from functools import cache
from itertools import count
from typing import Annotated, Any

import trio
from annotated_types import Len
from pydantic import AllowInfNan, ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as validated
from pydantic_core import to_json
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest

from p2pkv.core.ids import EventId
from p2pkv.core.records import EventRecord, EventState
from p2pkv.errors import AccessDeniedError, ErrorCode, Failure, FailureError, UnavailableError
from p2pkv.net.access import Access, DoorGuard
from p2pkv.net.calls import ASK_EVERY_S, BUG_FIELDS, CALLS, EVENT, MOVE, Call, ask_event, refusal_fields
from p2pkv.net.driver import Driver
from p2pkv.net.logs import logger
from p2pkv.net.replies import event_reply
from p2pkv.net.requests import MAX_TEXT_LENGTH, STRICT, WaitS, WatchBody
from p2pkv.net.validation import MAX_BODY_NBYTES, parse_body, refusal, take_body
from p2pkv.net.websockets import end_name, headers_of

CONTROL_PATH = "/control"
WATCH = "watch"
MAX_SOCKETS = 256
"""Open at once. They share `MAX_CONNECTIONS` of the websocket door with peers, to whom most of it belongs."""
MAX_IN_FLIGHT = 64
"""Requests of one socket that are being answered. A client that wants more opens another socket, or waits."""
MAX_WATCHES = 256
"""Single events followed by one socket; each is asked for every `ASK_EVERY_S`. Watching all has no such cost."""
LAGGING_MESSAGES = 1024
"""From here on a client's queue keeps one push for each event instead of one for each of its states."""
QUEUE_MESSAGES = 16_384
"""Of a client's queue: a push for each of the 10,000 events that a node keeps, and replies. A full queue ends the socket."""
QUEUE_NBYTES = 64 * 2**20
"""Replies in it: ten of the longest, lists of 10,000 events."""
STALL_S = 5.0
"""A client that takes longer for one message is disconnected."""
FLUSH_S = 0.5
"""For what is queued when a socket is closed, and for the closing handshake; a leaving node has 2 s in all."""
WENT_AWAY, NO_TEXT = 1001, 1003
"""Codes of RFC 6455, section 7.4.1."""

JsonScalar = str | bool | int | Annotated[float, AllowInfNan(False)] | None

_log = logger("control")


class ControlDoor:
    """All `/control` sockets of a node."""

    def __init__(self, driver: Driver, guard: DoorGuard) -> None:
        self._driver = driver
        self._guard = guard
        self._sockets: dict[_Socket, None] = {}
        self._socket_ended = trio.Event()

    async def accept(self, request: WebSocketRequest) -> None:
        """Accept a client's websocket and serve it until it ends."""
        access = self._guard.access(headers_of(request))
        if access is Access.NONE and (refusal := access.refuse(WATCH)) is not None:
            await request.reject(refusal.status, extra_headers=[(b"www-authenticate", b"Bearer")], body=refusal.reason.encode())
            return
        if len(self._sockets) >= MAX_SOCKETS:
            await request.reject(503, body=f"{MAX_SOCKETS} websockets are open here already; close one.".encode())
            return
        websocket = await request.accept()
        peer = end_name(websocket.remote)  # at its end it may have none any more
        socket = _Socket(websocket, self._driver, access)
        self._sockets[socket] = None
        try:
            await socket.serve()
        finally:
            del self._sockets[socket]
            self._socket_ended.set()
            self._socket_ended = trio.Event()
            _log.info("a control socket ended", peer=peer, reason=socket.end)

    async def close_all(self, reason: str) -> None:
        """Close every socket after what was queued for it; takes `FLUSH_S` at most."""
        for socket in self._sockets:
            socket.close(WENT_AWAY, reason)
        while self._sockets:
            await self._socket_ended.wait()


class _Socket:
    """One client's websocket."""

    def __init__(self, websocket: WebSocketConnection, driver: Driver, access: Access) -> None:
        self._websocket = websocket
        self._driver = driver
        self._access = access
        self._scope = trio.CancelScope()
        self._queue = _Queue()
        self._in_flight_count = 0
        self._watches_all = False
        self._watched: dict[EventId, EventRecord] = {}  # each as it was pushed last
        self._close_code: int | None = None
        self.end = "the connection broke"

    async def serve(self) -> None:
        """Answer requests and push events until the websocket ends.

        Raises:
            ExceptionGroup: Of `ConnectionClosed`: the client ended it.
        """
        with self._driver.watch_events(self._tell), self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, nursery)
                await self._write()
                nursery.cancel_scope.cancel()

    def close(self, code: int, reason: str) -> None:
        """Send what is queued, then close, within `FLUSH_S`. The first reason given is the one told."""
        if self._close_code is None:
            self._close_code, self.end = code, reason
            self._queue.end()
            self._scope.deadline = trio.current_time() + FLUSH_S

    def _abort(self, reason: str) -> None:
        self.end = reason
        self._scope.cancel()

    # --- out ---

    async def _write(self) -> None:
        while (message := await self._queue.next_message()) is not None:
            text = message if isinstance(message, str) else _text({"type": EVENT.name, **EVENT.dump(event_reply(message))})
            with trio.move_on_after(STALL_S) as stall:
                await self._websocket.send_message(text)
            if stall.cancelled_caught:
                self._abort(f"it didn't take a message within {STALL_S:g} s")
        assert self._close_code is not None
        await self._websocket.aclose(self._close_code, self.end)

    def _answer(self, request_id: object, kind: str, fields: dict[str, Any]) -> None:
        self._queue.put_reply(_text({"id": request_id, "type": kind, **fields}))
        self._check_room()

    def _refuse(self, request_id: object, failed: FailureError) -> None:
        self._answer(request_id, "error", refusal_fields(failed))

    def _push(self, event: EventRecord) -> None:
        self._queue.put_push(event)
        self._check_room()

    def _check_room(self) -> None:
        if self._queue.is_full:
            self._abort("it doesn't read what it is sent")

    # --- in ---

    async def _read(self, nursery: trio.Nursery) -> None:
        while self._close_code is None:
            try:
                message = await self._websocket.get_message()
            except ConnectionClosed as closed:
                self.end = str(closed.reason or self.end)
                raise
            if isinstance(message, bytes):
                self.close(NO_TEXT, "Send JSON as text messages.")
            else:
                await self._take(message.encode(), nursery)

    async def _take(self, message: bytes, nursery: trio.Nursery) -> None:
        request_id: object = None
        try:
            if len(message) > MAX_BODY_NBYTES:
                raise refusal(f"The message has {len(message)} bytes; at most {MAX_BODY_NBYTES} are taken.")
            taken = await take_body(message)
            envelope = parse_body(_envelope_adapter(), taken)
            request_id = envelope.id
            adapter = _request_adapters().get(envelope.type)
            if adapter is None:
                raise refusal(f"There is no type {envelope.type!r}; types are {', '.join(_request_adapters())}.")
            if (denied := self._access.refuse(envelope.type)) is not None:
                raise AccessDeniedError(Failure(ErrorCode.FORBIDDEN, denied.reason))
            if self._in_flight_count >= MAX_IN_FLIGHT:
                raise _busy(f"{MAX_IN_FLIGHT} requests of this socket wait for their answer; wait for one.")
            body = parse_body(adapter, taken)
        except FailureError as failed:
            self._refuse(request_id, failed)
            return
        self._in_flight_count += 1
        if envelope.type == WATCH:
            nursery.start_soon(self._watch, request_id, body, nursery)
        else:
            nursery.start_soon(self._call, request_id, CALLS[envelope.type], body)

    async def _call(self, request_id: object, call: Call[Any, Any], body: object) -> None:
        try:
            self._answer(request_id, call.name, call.dump(await call.run(self._driver, body)))
        except FailureError as failed:
            self._refuse(request_id, failed)
        except Exception:  # noqa: BLE001 - as over HTTP: answered and logged; a bug of the machine ends the node by itself
            _log.error("call failed", call=call.name, traceback=traceback.format_exc())
            self._answer(request_id, "error", BUG_FIELDS)
        finally:
            self._in_flight_count -= 1

    # --- watches ---

    async def _watch(self, request_id: object, body: WatchBody, nursery: trio.Nursery) -> None:
        try:
            if body.event_id is None:
                self._watches_all = True
                self._answer(request_id, WATCH, {})
                return
            event = await ask_event(self._driver, body.event_id)
            if len(self._watched) >= MAX_WATCHES and event.event_id not in self._watched:
                raise _busy(f"{MAX_WATCHES} events are watched on this socket; watch all of them.")
        except FailureError as failed:
            self._refuse(request_id, failed)
            return
        finally:
            self._in_flight_count -= 1
        self._answer(request_id, WATCH, {})
        self._push(event)
        if not event.state.is_final and event.event_id not in self._watched:
            self._watched[event.event_id] = event
            nursery.start_soon(self._keep_asking, request_id, event.event_id)

    def _tell(self, event: EventRecord) -> None:
        """Push what has changed, if it is watched."""
        is_news = self._is_news(event)
        if is_news or self._watches_all:
            self._push(event)
        if is_news:
            self._watched[event.event_id] = event
            if event.state.is_final:
                del self._watched[event.event_id]

    def _is_news(self, event: EventRecord) -> bool:
        return event.event_id in self._watched and self._watched[event.event_id] != event

    async def _keep_asking(self, request_id: object, event_id: EventId) -> None:
        """Learn of an event wherever it runs: its source doesn't tell this node, unless that asked for the move."""
        try:
            with trio.fail_after(self._driver.machine.config.move_deadline_s):
                while event_id in self._watched:
                    await trio.sleep(ASK_EVERY_S)
                    event = await ask_event(self._driver, event_id)
                    if self._is_news(event):
                        self._tell(event)
        except FailureError as failed:
            self._refuse(request_id, failed)
        except trio.TooSlowError:
            detail = f"The event {event_id!r} didn't end by this node's deadline for moves."
            self._refuse(request_id, UnavailableError(Failure(ErrorCode.DEADLINE_EXCEEDED, detail)))
        finally:
            self._watched.pop(event_id, None)


class _Queue:
    """What waits to be sent: replies, and events to push, in order."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, str | EventRecord] = {}
        self._reply_numbers = count()
        self._reply_nbytes = 0
        self._has_ended = False
        self._changed = trio.Event()

    @property
    def is_full(self) -> bool:
        """Whether the client is given up."""
        return len(self._waiting) > QUEUE_MESSAGES or self._reply_nbytes > QUEUE_NBYTES

    def put_reply(self, text: str) -> None:
        """Enqueue a reply."""
        self._reply_nbytes += len(text)
        self._put(next(self._reply_numbers), text)

    def put_push(self, event: EventRecord) -> None:
        """Enqueue an event, in place of what waits of it: of the same state, or of any if the client lags."""
        if len(self._waiting) >= LAGGING_MESSAGES:
            for state in EventState:
                self._waiting.pop((event.event_id, state), None)
        self._put((event.event_id, event.state), event)

    def end(self) -> None:
        """Let nothing more in."""
        self._has_ended = True
        self._changed.set()

    async def next_message(self) -> str | EventRecord | None:
        """Take what has waited longest; None when all is taken and nothing more will come."""
        while not self._waiting and not self._has_ended:
            self._changed = trio.Event()
            await self._changed.wait()
        if not self._waiting:
            return None
        message = self._waiting.pop(next(iter(self._waiting)))
        if isinstance(message, str):
            self._reply_nbytes -= len(message)
        return message

    def _put(self, key: Hashable, message: str | EventRecord) -> None:
        if not self._has_ended:
            self._waiting[key] = message
            self._changed.set()


@validated(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True))
class _Envelope:
    """What every message has."""

    id: JsonScalar
    type: Annotated[str, Len(0, MAX_TEXT_LENGTH)]


@cache
def _envelope_adapter() -> TypeAdapter[_Envelope]:
    return TypeAdapter(_Envelope)


@cache
def _request_adapters() -> dict[str, TypeAdapter[Any]]:
    """By type, what validates a whole message: the request of a call, in its envelope."""
    bodies = {name: call.body for name, call in CALLS.items()} | {WATCH: WatchBody}
    return {name: _message_adapter(name, body) for name, body in bodies.items()}


def _message_adapter(name: str, body: type[object]) -> TypeAdapter[Any]:
    fields: dict[str, Any] = {"__module__": __name__, "__annotations__": dict(_Envelope.__annotations__)}
    if name == MOVE.name:  # a socket needs no answer that waits: it can watch
        fields["__annotations__"]["wait_s"] = WaitS
        fields["wait_s"] = 0.0
    message = type(f"{body.__name__}Message", (body,), fields)
    return TypeAdapter(validated(frozen=True, slots=True, kw_only=True, config=STRICT)(message))


def _text(message: dict[str, object]) -> str:
    return to_json(message).decode()


def _busy(detail: str) -> UnavailableError:
    return UnavailableError(Failure(ErrorCode.INSTANCE_UNREACHABLE, detail))

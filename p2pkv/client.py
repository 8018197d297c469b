"""Remote control of any node, from a trio program: the calls, and events as they change.

Calls go over HTTP. `wait` and `watch` use the websocket `/control` of the node that answers there, and where that can't be had,
or is lost, they ask over HTTP every `POLL_S`. Nothing here has a deadline but connecting and a call's answer: use
`trio.fail_after`.
"""

import json
import math
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from typing import Any, TypeVar

import httpx2
import trio
from pydantic import TypeAdapter, ValidationError
from trio_websocket import ConnectionClosed, WebSocketConnection

from p2pkv.cluster_key import access_token
from p2pkv.config import parse_address
from p2pkv.core.records import EventState
from p2pkv.errors import ErrorCode, Failure, NodeUnreachableError, P2pkvError, failure_error
from p2pkv.http_paths import event_path
from p2pkv.net.replies import (
    ChangedReply,
    ErrorReply,
    EventReply,
    EventsReply,
    FullLookupReply,
    HealthReply,
    LookupReply,
    MemberReply,
    MembersReply,
    MoveReply,
)
from p2pkv.net.websockets import WEBSOCKET_ERRORS, dial_websocket

CONNECT_S = 2.0
CLOSE_S = 1.0
ANSWER_S = 30.0
"""For any call; a move that waits for its end has `wait_s` on top."""
POLL_S = 0.2

Position = tuple[str, str]
"""`(instance, location)`."""
R = TypeVar("R")


@asynccontextmanager
async def open_client(url: str, token: str | None = None) -> AsyncIterator["Client"]:
    """A client of the node at `url`, which answered on entry.

    Args:
        url: Of a node's HTTP door, or of the port that the nodes of a host share: `http://localhost:9000`.
        token: The bearer token that the node wants, if it wants one; left out, as `P2PKV_TOKEN` or the configuration that the
            environment names gives it.

    Raises:
        ConfigError: No token can be had from the configuration that the environment names.
        NodeUnreachableError: No node answers there.
    """
    token = access_token(os.environ) if token is None else token
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        # No proxy: a node is reached directly or not at all.
        http = httpx2.AsyncClient(
            base_url=url, headers=headers, timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S), trust_env=False
        )
    except httpx2.InvalidURL as error:
        raise NodeUnreachableError(f"{url} is no address of a node: {error}") from error
    async with http:
        client = Client(http, headers)
        await client.members()
        yield client


class Client:
    """Calls to one node; `open_client` makes it. Each raises what `p2pkv.errors` has for the node's refusal."""

    def __init__(self, http: httpx2.AsyncClient, headers: Mapping[str, str]) -> None:
        self._http = http
        self._headers = headers

    async def move(
        self,
        old_position: Position,
        new_position: Position,
        tokens: Sequence[int] = (),
        *,
        copy: bool = False,
        everything: bool = False,
        cache_salt: str = "",
        model: str | None = None,
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> MoveReply:
        """Start a move, or a copy; `wait` tells how it ended.

        Args:
            old_position: Of the source.
            new_position: Of the target.
            tokens: The prompt's token ids; the longest prefix held is moved.
            copy: Leave the source as it is.
            everything: All that is at the old position, instead of `tokens`.
            cache_salt: The salt that the prompt was stored with.
            model: Whose cache; only needed when an instance serves several.
            wait_s: How long the answer may wait for the end, at most 600 s.
            idempotency_key: A retry with the same key, through any node, is answered with the first one's event.

        Raises:
            FailureError: It was refused, or failed within `wait_s`.
        """
        body = {
            "old_position": old_position,
            "new_position": new_position,
            "tokens": list(tokens),
            "copy": copy,
            "all": everything,
            "cache_salt": cache_salt,
            "model": model,
            "wait_s": wait_s,
            "idempotency_key": idempotency_key,
        }
        return await self._call(MoveReply, "POST", "/move", body, answer_s=ANSWER_S + wait_s)

    async def lookup(self, tokens: Sequence[int], *, model: str | None = None, cache_salt: str = "") -> LookupReply:
        """Each holder's longest prefix of a prompt, at its best location."""
        return await self._call(LookupReply, "POST", "/lookup", _prompt(tokens, model, cache_salt))

    async def full_lookup(self, tokens: Sequence[int], *, model: str | None = None, cache_salt: str = "") -> FullLookupReply:
        """Each holder's longest prefix of a prompt, at each of its locations."""
        return await self._call(FullLookupReply, "POST", "/full_lookup", _prompt(tokens, model, cache_salt))

    async def clear(self, position: Position) -> ChangedReply:
        """Forget everything at a position that isn't pinned; tells how many tokens that were."""
        instance, location = position
        return await self._call(ChangedReply, "POST", "/clear", {"instance_id": instance, "location": location})

    async def pin(
        self,
        position: Position,
        tokens: Sequence[int],
        *,
        ttl_s: float | None = None,
        model: str | None = None,
        cache_salt: str = "",
    ) -> ChangedReply:
        """Keep the longest prefix of a prompt held at a position from eviction; tells how many tokens are pinned now.

        Args:
            position: Where.
            tokens: The prompt's token ids.
            ttl_s: How long it lasts, at most ten years; until `unpin` when left out. Of several pins the longest counts.
            model: Whose cache; only needed when an instance serves several.
            cache_salt: The salt that the prompt was stored with.
        """
        return await self._pin("/pin", position, ttl_s, _prompt(tokens, model, cache_salt))

    async def unpin(
        self,
        position: Position,
        tokens: Sequence[int],
        *,
        ttl_s: float | None = None,
        model: str | None = None,
        cache_salt: str = "",
    ) -> ChangedReply:
        """End the pins of a prompt at a position, now or in `ttl_s` seconds; tells how many tokens were pinned."""
        return await self._pin("/unpin", position, ttl_s, _prompt(tokens, model, cache_salt))

    async def _pin(self, path: str, position: Position, ttl_s: float | None, prompt: dict[str, Any]) -> ChangedReply:
        instance, location = position
        body = {"instance_id": instance, "location": location, "ttl_s": ttl_s, **prompt}
        return await self._call(ChangedReply, "POST", path, body)

    async def health(self, instance: str) -> HealthReply:
        """How an instance's workers are."""
        return await self._call(HealthReply, "POST", "/health", {"instance_id": instance})

    async def members(self) -> list[MemberReply]:
        """Every instance that the node knows, by name."""
        return (await self._members()).members

    async def events(self) -> list[EventReply]:
        """The events that the node knows, newest first."""
        return (await self._call(EventsReply, "GET", "/events")).events

    async def event(self, event_id: str) -> EventReply:
        """One event, wherever it runs."""
        return await self._call(EventReply, "GET", event_path(event_id))

    async def cancel(self, event_id: str) -> EventReply:
        """Cancel a move that hasn't begun to hand over; answers with its event, cancelled or not."""
        return await self._call(EventReply, "DELETE", event_path(event_id))

    async def wait(self, event_id: str) -> EventReply:
        """Wait for an event's end, and tell how it ended: a move that failed is no error here."""
        async with self.watch(event_id) as changes:
            event = await anext(changes)
            while not EventState(event.state).is_final:
                event = await anext(changes)
        return event

    @asynccontextmanager
    async def watch(self, event_id: str | None = None) -> AsyncIterator["Changes"]:
        """Follow one event, from its state now to its end, or all that the node is told of, as they change from now on.

        A client that reads too slowly misses changes that others have followed, but no event's last one.

        Raises:
            FailureError: The event isn't known.
            NodeUnreachableError: The node is gone; in the iteration too.
        """
        async with AsyncExitStack() as stack:
            websocket = await self._open_control(stack, event_id)
            known = await self.events() if websocket is None and event_id is None else []
            yield Changes(self, event_id, websocket, known)

    async def _open_control(self, stack: AsyncExitStack, event_id: str | None) -> WebSocketConnection | None:
        """The websocket on which the node pushes what is watched; None if it can't be had."""
        reply = await self._members()
        door = next(member.ws for member in reply.members if member.instance == reply.instance)
        try:
            websocket = await stack.enter_async_context(_control_socket(door, self._headers))
            await websocket.send_message(json.dumps({"id": 0, "type": "watch", "event_id": event_id}))
            answer = json.loads(await websocket.get_message())
        except WEBSOCKET_ERRORS:  # out of reach from here, or full
            return None
        _check(answer)
        return websocket

    async def _members(self) -> MembersReply:
        return await self._call(MembersReply, "GET", "/members")

    async def _call(
        self, reply: Callable[..., R], method: str, path: str, body: dict[str, Any] | None = None, *, answer_s: float = ANSWER_S
    ) -> R:
        url = self._http.base_url
        try:
            answer = await self._http.request(method, path, json=body, timeout=httpx2.Timeout(answer_s, connect=CONNECT_S))
            if answer.is_success:
                parsed: R = _adapter(reply).validate_json(answer.content)
                return parsed
            refusal = _adapter(ErrorReply).validate_json(answer.content)
        except httpx2.TransportError as error:
            raise NodeUnreachableError(f"no node answers at {url}: {str(error) or type(error).__name__}") from error
        except ValidationError as error:
            raise NodeUnreachableError(f"what answers at {url} is no node") from error
        raise _error_of(refusal)


class Changes:
    """Events as they change, one after the other; `Client.watch` makes it."""

    def __init__(
        self, client: Client, event_id: str | None, websocket: WebSocketConnection | None, known: Sequence[EventReply]
    ) -> None:
        self._client = client
        self._event_id = event_id
        self._websocket = websocket
        self._known = {event.event_id: event for event in known}
        self._polled: deque[EventReply] = deque()
        self._poll_at = -math.inf
        self._has_ended = False

    def __aiter__(self) -> "Changes":
        return self

    async def __anext__(self) -> EventReply:
        """The next change; after the end of the one event that is watched there is none."""
        if self._has_ended:
            raise StopAsyncIteration
        event = await self._pushed() or await self._next_polled()
        self._has_ended = event.event_id == self._event_id and EventState(event.state).is_final
        return event

    async def _pushed(self) -> EventReply | None:
        """What the websocket tells next; None where there is none any more."""
        if self._websocket is None:
            return None
        try:
            message = json.loads(await self._websocket.get_message())
        except ConnectionClosed as closed:
            self._websocket = None
            if self._event_id is None:
                raise NodeUnreachableError("the node has ended the websocket: watch again, or another node") from closed
            return None
        _check(message)
        event: EventReply = _adapter(EventReply).validate_python(message)
        return event

    async def _next_polled(self) -> EventReply:
        while not self._polled:
            await trio.sleep_until(self._poll_at)
            self._poll_at = trio.current_time() + POLL_S
            one = self._event_id
            events = await self._client.events() if one is None else [await self._client.event(one)]
            self._polled.extend(event for event in reversed(events) if self._known.get(event.event_id) != event)
            self._known = {event.event_id: event for event in events}
        return self._polled.popleft()


@asynccontextmanager
async def _control_socket(door: str, headers: Mapping[str, str]) -> AsyncIterator[WebSocketConnection]:
    """A websocket to `/control` at `door`; one of `WEBSOCKET_ERRORS` if there is none."""
    shown = [(name.encode(), value.encode()) for name, value in headers.items()]
    only: BaseException
    try:
        async with dial_websocket([parse_address(door.removeprefix("ws://"))], "/control", shown) as websocket:
            yield websocket
            with trio.move_on_after(CLOSE_S):
                await websocket.aclose()
        return
    except BaseExceptionGroup as group:
        only = group
    while isinstance(only, BaseExceptionGroup) and len(only.exceptions) == 1:  # whoever watches knows of no nursery
        only = only.exceptions[0]
    raise only


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _check(message: dict[str, Any]) -> None:
    """Raise the error that a message of the websocket is, if it is one."""
    if message["type"] == "error":
        raise _error_of(_adapter(ErrorReply).validate_python(message))


def _error_of(refusal: ErrorReply) -> P2pkvError:
    try:
        code = ErrorCode(refusal.error)
    except ValueError:  # the door's own, such as a page's: no call fails like that
        return P2pkvError(f"{refusal.detail} ({refusal.error})")
    return failure_error(Failure(code, refusal.detail))


def _prompt(tokens: Sequence[int], model: str | None, cache_salt: str) -> dict[str, Any]:
    return {"tokens": list(tokens), "model": model, "cache_salt": cache_salt}

"""The calls of the HTTP shim: each turns a request into a question to the driver, and its answer into a reply."""

import secrets
from typing import Annotated

import trio
from fastapi import APIRouter, Depends, FastAPI, Request

from p2pkv.core.effects import AnswerValue
from p2pkv.core.events import CancelRequested, EventAsked, MoveRequested
from p2pkv.core.keys import Identity, pack_tokens
from p2pkv.core.records import EventRecord, EventState
from p2pkv.errors import ErrorCode, Failure, UnavailableError
from p2pkv.net.driver import Driver
from p2pkv.net.http.bodies import body_documentation, json_body
from p2pkv.net.http.errors import MoveFailedError, add_error_handlers
from p2pkv.net.http.replies import (
    CheckFinishReply,
    EmptyReply,
    ErrorReply,
    EventReply,
    EventsReply,
    LookupReply,
    MembersReply,
    MoveReply,
    event_reply,
    member_reply,
)
from p2pkv.net.http.requests import CheckFinishBody, LookupBody, MoveBody, parse_position

_router = APIRouter()


async def _driver_of(request: Request) -> Driver:
    driver = request.app.state.driver
    assert isinstance(driver, Driver)
    return driver


TheDriver = Annotated[Driver, Depends(_driver_of)]


def build_app(driver: Driver) -> FastAPI:
    """The shim of the node that `driver` drives. It serves no pages: those that show an API load foreign scripts."""
    app = FastAPI(
        title="p2pkv",
        description="Moves KV caches between LLM engines. The same calls on every node.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={422: {"model": ErrorReply}, "4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
    app.state.driver = driver
    app.include_router(_router)
    add_error_handlers(app)
    return app


@_router.post("/move", openapi_extra=body_documentation(MoveBody))
async def move(driver: TheDriver, body: Annotated[MoveBody, Depends(json_body(MoveBody))]) -> MoveReply:
    """Move or copy chunks; answers at the move's end, at the latest after `wait_s` seconds."""
    old_position, new_position = parse_position(body.old_position), parse_position(body.new_position)
    operation, selection = body.operation(), body.selection()
    event = _event(
        await driver.request(
            lambda request: MoveRequested(
                request=request,
                old_position=old_position,
                new_position=new_position,
                operation=operation,
                selection=selection,
                tokens=pack_tokens(body.tokens),
                identity=Identity(cache_salt=body.cache_salt),
                model=body.model,
            )
        )
    )
    with trio.move_on_after(body.wait_s):
        event = await driver.wait_end(event.event_id)
    if event.state in (EventState.FAILED, EventState.CANCELLED):
        failure = event.error or Failure(ErrorCode.CANCELLED, "It was cancelled.")
        raise MoveFailedError(failure, event)
    return MoveReply(event_id=event.event_id, num_tokens=event.num_tokens, state=event.state)


@_router.post("/lookup", openapi_extra=body_documentation(LookupBody))
async def lookup(driver: TheDriver, body: Annotated[LookupBody, Depends(json_body(LookupBody))]) -> LookupReply:
    """Which instances hold how much of a prompt, as far as this node knows."""
    best: dict[str, tuple[str, int]] = {}
    for held in driver.machine.lookup(pack_tokens(body.tokens), body.model, Identity(cache_salt=body.cache_salt)):
        if held.instance not in best or held.num_tokens > best[held.instance][1]:
            best[held.instance] = (held.location, held.num_tokens)
    return LookupReply(event_id=f"lookup~{secrets.token_hex(8)}", layout_info=best, complete=True)


@_router.post("/check_finish", openapi_extra=body_documentation(CheckFinishBody))
async def check_finish(
    driver: TheDriver, body: Annotated[CheckFinishBody, Depends(json_body(CheckFinishBody))]
) -> CheckFinishReply:
    """The state of an event."""
    return CheckFinishReply(status=(await _ask_event(driver, body.event_id)).state)


@_router.get("/events")
async def events(driver: TheDriver) -> EventsReply:
    """Events that this node takes part in or was asked for, newest first."""
    return EventsReply(events=[event_reply(event) for event in driver.machine.events()])


@_router.get("/events/{event_id}")
async def event(driver: TheDriver, event_id: str) -> EventReply:
    """One event, wherever it runs."""
    return event_reply(await _ask_event(driver, event_id))


@_router.delete("/events/{event_id}")
async def cancel_event(driver: TheDriver, event_id: str) -> EventReply:
    """Cancel a move that hasn't begun to hand over; answers with its event, cancelled or not."""
    return event_reply(_event(await driver.request(lambda request: CancelRequested(request, event_id))))


@_router.get("/members")
async def members(driver: TheDriver) -> MembersReply:
    """Every instance that this node knows, itself included, by name."""
    return MembersReply(members=[member_reply(member) for member in driver.machine.members()])


@_router.get("/livez")
async def livez() -> EmptyReply:
    """Whether the node runs."""
    return EmptyReply()


@_router.get("/readyz")
async def readyz(driver: TheDriver) -> EmptyReply:
    """Whether the node takes moves."""
    if driver.machine.is_leaving:
        raise UnavailableError(Failure(ErrorCode.LEAVING, "This node is leaving the cluster; ask another."))
    return EmptyReply()


async def _ask_event(driver: Driver, event_id: str) -> EventRecord:
    return _event(await driver.request(lambda request: EventAsked(request, event_id)))


def _event(answer: AnswerValue) -> EventRecord:
    assert isinstance(answer, EventRecord), answer  # the core's promise for these requests
    return answer

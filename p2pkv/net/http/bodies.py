"""Request bodies: read with limits, then validated straight from their bytes.

They are parsed on the event loop: the parser holds the GIL from beginning to end (0.12 s for the longest request allowed,
1,048,576 tokens), so a thread would stall the loop just as long.
"""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio
from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from p2pkv.core.keys import MAX_TOKENS
from p2pkv.errors import ErrorCode, Failure, InvalidRequestError
from p2pkv.net.http.requests import MAX_TEXT_LENGTH

MAX_BODY_NBYTES = 16 * 2**20
"""`MAX_TOKENS` token ids of ten digits with a comma and a space each take 12 MiB."""
MAX_SEPARATOR_COUNT = 8 * MAX_TEXT_LENGTH
"""No valid request has more colons, or more commas beside those between tokens: all its texts together are shorter."""
BODY_DEADLINE_S = 30.0
"""A body must be in by then; the slowest link that still gets `MAX_BODY_NBYTES` through has half a MiB/s."""
SHOWN_PROBLEMS = 5

B = TypeVar("B")


def json_body(shape: type[B]) -> Callable[[Request], Awaitable[B]]:
    """A dependency that gives a call its body, validated as `shape`."""
    adapter = TypeAdapter(shape)

    async def read(request: Request) -> B:
        _check_content_type(request.headers.get("content-type"))
        body = await _read_body(request)
        _check_separators(body)
        try:
            return adapter.validate_json(body)
        except ValidationError as error:
            raise _refusal(_sentence(error)) from error

    return read


def body_documentation(shape: type[object]) -> dict[str, Any]:
    """`openapi_extra` of a call whose body is a `shape`."""
    schema = TypeAdapter(shape).json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _refusal(detail: str) -> InvalidRequestError:
    return InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, detail))


def _check_content_type(content_type: str | None) -> None:
    """A web page can send any other type to any address without asking; JSON it can't."""
    if content_type is None or content_type.partition(";")[0].strip().lower() != "application/json":
        raise _refusal("The body must be JSON: send it with 'Content-Type: application/json'.")


async def _read_body(request: Request) -> bytes:
    """The whole body; what exceeds `MAX_BODY_NBYTES` is read and thrown away, so that the client gets its answer."""
    body, nbytes = bytearray(), 0
    try:
        with trio.fail_after(BODY_DEADLINE_S):
            async for part in request.stream():
                nbytes += len(part)
                if nbytes <= MAX_BODY_NBYTES:
                    body += part
    except trio.TooSlowError as error:
        raise _refusal(f"The body wasn't complete after {BODY_DEADLINE_S:g} s.") from error
    except ClientDisconnect as error:
        raise _refusal("The body ended early.") from error
    if nbytes > MAX_BODY_NBYTES:
        raise _refusal(f"The body has {nbytes} bytes; at most {MAX_BODY_NBYTES} are taken, and {MAX_TOKENS} tokens.")
    return bytes(body)


def _check_separators(body: bytes) -> None:
    """Refuse what can't be valid before the parser makes an object of each of millions of tokens or fields."""
    if body.count(b",") > MAX_TOKENS + MAX_SEPARATOR_COUNT:
        raise _refusal(f"A request takes at most {MAX_TOKENS} tokens.")
    if body.count(b":") > MAX_SEPARATOR_COUNT:
        raise _refusal("The request has too many fields.")


def _sentence(error: ValidationError) -> str:
    """The first problems found, each with its place: `tokens[3]: Input should be greater than or equal to 0`."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    sentences = []
    for problem in problems[:SHOWN_PROBLEMS]:
        place = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in problem["loc"])
        sentences.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(sentences) + (f"; and {more} more." if more > 0 else ".")

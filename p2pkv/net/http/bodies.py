"""What an HTTP request says: its JSON body, read with limits, or the fields in its path and query."""

from typing import Any, TypeVar

import trio
from fastapi import Request
from pydantic import TypeAdapter
from starlette.requests import ClientDisconnect

from p2pkv.core.keys import MAX_TOKENS
from p2pkv.net.validation import MAX_BODY_NBYTES, parse_body, parse_texts, refusal, take_body

BODY_DEADLINE_S = 30.0
"""A body must be in by then; the slowest link that still gets `MAX_BODY_NBYTES` through has half a MiB/s."""

B = TypeVar("B")


async def read_request(request: Request, adapter: TypeAdapter[B]) -> B:
    """The fields of `request`: of a POST its body, else its path's and its query's.

    Raises:
        InvalidRequestError: They aren't what `adapter` takes, or didn't arrive.
    """
    if request.method == "POST":
        _check_content_type(request.headers.get("content-type"))
        return parse_body(adapter, await take_body(await _read_body(request)))
    named = [*request.path_params.items(), *request.query_params.multi_items()]
    if len({name for name, _ in named}) < len(named):
        raise refusal("A field is given twice.")
    return parse_texts(adapter, dict(named))


def documentation(method: str, path: str, adapter: TypeAdapter[Any]) -> dict[str, Any]:
    """`openapi_extra` of a call that takes what `adapter` does."""
    schema = adapter.json_schema()
    if method == "POST":
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    parameters = [
        {
            "name": name,
            "in": "path" if f"{{{name}}}" in path else "query",
            "required": name in schema.get("required", ()),
            "schema": field,
        }
        for name, field in schema.get("properties", {}).items()
    ]
    return {"parameters": parameters} if parameters else {}


def _check_content_type(content_type: str | None) -> None:
    """A web page can send any other type to any address without asking; JSON it can't."""
    if content_type is None or content_type.partition(";")[0].strip().lower() != "application/json":
        raise refusal("The body must be JSON: send it with 'Content-Type: application/json'.")


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
        raise refusal(f"The body wasn't complete after {BODY_DEADLINE_S:g} s.") from error
    except ClientDisconnect as error:
        raise refusal("The body ended early.") from error
    if nbytes > MAX_BODY_NBYTES:
        raise refusal(f"The body has {nbytes} bytes; at most {MAX_BODY_NBYTES} are taken, and {MAX_TOKENS} tokens.")
    return bytes(body)

"""How failures look over HTTP: `{"detail": sentence, "error": code}` with a status, whoever refused.

Also the framework's own refusals and our bugs: a bug is logged with its traceback and answered without it.
"""

import traceback
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from p2pkv.errors import ErrorCode, FailureError
from p2pkv.net.calls import BUG_FIELDS, refusal_fields
from p2pkv.net.logs import logger

NOT_FOUND = "not_found"
METHOD_NOT_ALLOWED = "method_not_allowed"

STATUS: Mapping[ErrorCode, int] = {
    ErrorCode.INVALID_REQUEST: 422,
    ErrorCode.PROTOCOL_ERROR: 422,
    ErrorCode.UNKNOWN_INSTANCE: 404,
    ErrorCode.UNKNOWN_LOCATION: 404,
    ErrorCode.UNKNOWN_EVENT: 404,
    ErrorCode.NAMESPACE_MISMATCH: 409,
    ErrorCode.INSTANCE_ID_IN_USE: 409,
    ErrorCode.INSTANCE_UNREACHABLE: 503,
    ErrorCode.LEAVING: 503,
    ErrorCode.TRANSFER_FAILED: 503,
    ErrorCode.CANCELLED: 503,
    ErrorCode.DEADLINE_EXCEEDED: 503,
    ErrorCode.STORE_FULL: 507,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_IMPLEMENTED: 501,
}

_log = logger("http")


def error_reply(status: int, *, error: str, detail: str) -> JSONResponse:
    """A refusal by the framework or the guard, in the same shape as the calls' own."""
    return JSONResponse({"detail": detail, "error": error}, status_code=status)


async def _answer_failure(_: Request, failed: Exception) -> JSONResponse:
    assert isinstance(failed, FailureError)
    return JSONResponse(refusal_fields(failed), status_code=STATUS[failed.failure.code])


async def _answer_framework(request: Request, refused: Exception) -> JSONResponse:
    assert isinstance(refused, HTTPException)
    if refused.status_code == 404:
        detail = f"There is no {request.url.path!r} here. GET /openapi.json lists what is."
        return error_reply(404, error=NOT_FOUND, detail=detail)
    if refused.status_code == 405:
        allowed = (refused.headers or {}).get("Allow", "")
        reply = error_reply(405, error=METHOD_NOT_ALLOWED, detail=f"{request.url.path} takes {allowed}, not {request.method}.")
        reply.headers["Allow"] = allowed
        return reply
    return error_reply(refused.status_code, error=ErrorCode.INVALID_REQUEST, detail=str(refused.detail))


async def _answer_bug(request: Request, bug: Exception) -> JSONResponse:
    trace = "".join(traceback.format_exception(bug))
    _log.error("call failed", method=request.method, path=request.url.path, traceback=trace)
    return error_reply(500, **BUG_FIELDS)


def add_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every failure in our shape."""
    app.add_exception_handler(FailureError, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_framework)
    app.add_exception_handler(Exception, _answer_bug)

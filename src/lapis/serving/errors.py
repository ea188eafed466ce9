"""Refusals in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the status that clients expect."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lapis.errors import LapisError
from lapis.serving.engine.engine import QueueFull

TYPES = {429: "rate_limit_error"}  # else "invalid_request_error", or from 500 on "server_error"
LONGEST = 1000  # characters of a message


class ApiError(HTTPException):
    """A refusal: what, value, remedy. param: the field that it is about. code: a word that programs look at."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def refusal(error: LapisError) -> ApiError:
    """What lapis refuses, as a client's mistake; a full queue as one to be tried again."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.seconds)})
    return ApiError(400, str(error))


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The object that tells of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message[:LONGEST], "type": kind, "param": param, "code": code}}


def handle_errors(app: FastAPI) -> None:
    """Makes an app tell every error in this shape. A bug is a 500 that says nothing of this machine."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
        message = error.detail
        if error.status_code == 404 and not isinstance(error, ApiError):
            message = f"there is no {request.method} {request.url.path[:200]} here"
        return JSONResponse(body_of(error.status_code, message, param, code), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        param, message = _first(error.errors())
        return JSONResponse(body_of(400, message, param), 400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body_of(500, f"a fault of the server's own ({type(error).__name__})"), 500)

    @app.exception_handler(LapisError)
    async def lapis_refused(request: Request, error: LapisError) -> JSONResponse:
        answer = refusal(error)
        for served in request.app.state.engine.models.values():
            answer.detail = served.hides(answer.detail)
        return await refused(request, answer)


def _first(errors: Sequence[Any]) -> tuple[str | None, str]:
    """The field and the words of the first thing that is wrong with a body."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    value = first.get("input")
    shown = f" ({value!r:.60})" if isinstance(value, (int, float, str)) else ""
    return field[:100] or None, f"{field[:100] or 'the body'}{shown}: {first['msg']}"

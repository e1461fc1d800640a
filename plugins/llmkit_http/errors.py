"""APIError and the envelope that every error is answered in: OpenAI's, all four fields always."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

log = logging.getLogger("llmkit.http")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ClientGone(Exception):
    """The client has closed its connection, so there is nobody to answer."""


class APIError(HTTPException):
    """An answer other than success: `message` says what was wrong and what to do.

    An HTTPException, because FastAPI lets only these through where it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def envelope(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.envelope, self.status_code, self.headers)

    def event(self) -> bytes:
        """The error as the last event of a stream that has begun."""
        return b"data: " + json.dumps(self.envelope).encode() + b"\n\n"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def unavailable(message: str, seconds: int = 1) -> APIError:
    """The server cannot take requests now; try again in `seconds`."""
    return APIError(503, message, headers={"Retry-After": str(seconds)})


def as_api_error(error: Exception) -> APIError:
    """What the client learns of an exception; one that nobody foresaw is logged and not shown."""
    if isinstance(error, APIError):
        return error
    log.error("unexpected error", exc_info=error)
    return APIError(500, "The server failed to answer; its log says why.")


def install(app: FastAPI) -> None:
    """Answer all errors of the app in the envelope."""

    @app.exception_handler(APIError)
    async def _api(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(ClientGone)
    async def _gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nginx's number for it; it reaches nobody but the metrics

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return _from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"Unknown path: {request.method} {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, str(error.detail))
        return APIError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()


def _from_validation(error: RequestValidationError) -> APIError:
    """Pydantic's first complaint, with the bare name of the parameter."""
    errors = error.errors()
    first = errors[0]
    path = [part for part in first["loc"] if part not in ("body", "path", "query")]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return bad_request(f"The body is not JSON: {reason} (at character {path[0] if path else '?'})")
    if not path:
        return bad_request("The body must be a JSON object, sent with Content-Type: application/json")
    param = str(path[0])
    alternatives = [other for other in errors if other["loc"][1:2] == first["loc"][1:2]]
    if first["type"] == "value_error":  # our own validators': whole sentences
        return bad_request(str(first["ctx"]["error"]), param)
    where = ".".join(str(part) for part in path[1:] if isinstance(part, int))
    reason = first["msg"][:1].lower() + first["msg"][1:]
    if len(alternatives) > 1:
        reason += " (or another form of it)"
    return bad_request(f"{param}{f'[{where}]' if where else ''}: {reason}", param)

"""Error envelopes: vLLM's many forms of an error in the one that the embedded server answers with."""

from __future__ import annotations

import ast
import json
import re
from http import HTTPStatus
from typing import Any

Envelope = dict[str, dict[str, str | None]]

PARAMETER_TAIL = re.compile(r"\s*\(parameter=[^()]*\)$")  # vLLM repeats in the message what stands in `param`
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
CONTEXT = re.compile(r"maximum context length|maximum model length|longer than the maximum model")


def envelope(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Envelope:
    """{"error": {"message", "type", "param", "code"}}, the type by the status."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def normalise(status: int, body: bytes, *, method: str, path: str) -> Envelope:
    """What vLLM answered with an error status, as an envelope with all four fields."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body.decode("utf-8", "replace").strip() or HTTPStatus(status).phrase
    if isinstance(found, dict) and "detail" in found:
        found = found["detail"]
    if isinstance(found, dict):
        found = found.get("error", found)
    if not isinstance(found, dict):
        found = {"message": found if isinstance(found, str) else json.dumps(found)}
    message, param = str(found.get("message") or HTTPStatus(status).phrase), found.get("param")
    if status in (404, 405) and message == HTTPStatus(status).phrase:
        return envelope(status, f"Unknown path: {method} {path}" if status == 404 else f"{path} does not take {method}")
    if status == 404 and param == "model":
        return envelope(status, message, param="model", code="model_not_found")
    if "json_invalid" in message or "JSON decode error" in message:
        return envelope(status, f"The body is not JSON: {_validation(message)[0]}")
    if "validation error" in message:
        message, field = _validation(message)
        param = field or param
    message = PARAMETER_TAIL.sub("", message)
    if CONTEXT.search(message):
        chat = "chat" in path or "responses" in path or "messages" in path
        return envelope(400, message, param="messages" if chat else "prompt", code="context_length_exceeded")
    return envelope(status, message, param=_bare(param))


def _bare(param: Any) -> str | None:
    """`body.messages.0.role` -> `messages`: the field of the request, whatever was wrong inside of it."""
    parts = [part for part in str(param or "").split(".") if part and part != "body"]
    return parts[0] if parts else None


def _validation(message: str) -> tuple[str, str | None]:
    """One sentence, and the parameter, from vLLM's list of what pydantic found: a line for each, a dict's repr."""
    for line in message.splitlines()[1:]:
        try:
            found = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError):
            continue
        if isinstance(found, dict) and found.get("msg"):
            context = found.get("ctx")
            detail = context.get("error") if isinstance(context, dict) else None
            text = str(found["msg"]).removeprefix("Value error, ")
            if found.get("type") == "json_invalid":
                return str(detail or text), None
            field = _bare(found.get("loc"))
            return (f"{field}: {text}" if field else text), field
    return message, None

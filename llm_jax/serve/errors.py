"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}.

Nothing here repeats more of a request than a short, escaped piece, and nothing of the server's inside.
"""

import json
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

_TYPES = {
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip
_LONGEST_VALUE = 60

# Of a union each part complains in its own way.
_UNIONS = {
    "prompt": "expected a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "expected a text of 1 to 256 characters, or up to 16 of them",
    "content": 'expected a text, or a list of {"type": "text", "text": ...}',
}

logger = logging.getLogger("llm_jax.serve")


class ApiError(Exception):
    """A request that is refused. param: the field that is wrong; code: for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> bytes:
        content = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": content}).encode("ascii")

    def response(self) -> Response:
        headers = {"retry-after": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, "application/json")


def handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return ApiError(404, f"there is nothing at {shown(request.url.path)}").response()
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        logger.error("a request failed: %s", type(error).__name__, exc_info=error)
        return ApiError(500, "the server failed on this request").response()


def shown(value: Any) -> str:
    """A value of a request, short and in ASCII."""
    text = ascii(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong; the fields of a union all complain, once is enough."""
    errors = error.errors()
    own = [
        one for one in errors if one["type"] == "value_error"
    ]  # says more than a wrong type does
    first = (own or errors)[0]
    kind, path = first["type"], [str(part) for part in first["loc"][1:]]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is no JSON: {reason} at character {first['loc'][-1]}")
    if kind == "string_unicode":
        return ApiError(400, f"lone surrogate in {shown(first.get('input'))}")
    if not path and kind == "value_error":
        return ApiError(400, first["msg"].removeprefix("Value error, "))
    if not path:
        return ApiError(400, "expected a JSON object, sent as application/json")
    param = path[0]
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {shown('.'.join(path))}", param=param)
    if kind == "missing":
        return ApiError(400, f"{'.'.join(path)} is missing", param=param)
    union = next((name for name in _UNIONS if name in path), None)
    if union is not None and kind != "value_error":
        return ApiError(400, f"{param}: {_UNIONS[union]}", param=param)
    reason = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    told = "" if isinstance(value, dict | list) else f", not {shown(value)}"
    return ApiError(400, f"{param}: {reason[:1].lower()}{reason[1:]}{told}", param=param)

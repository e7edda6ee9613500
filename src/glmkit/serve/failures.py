"""From any exception to the answer a client gets, in OpenAI's form. What is not the client's to know stays inside."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from glmkit.errors import QueueFullError, TokenizerError, UsageError
from glmkit.translation import Language, translate

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A refusal or failure with everything that OpenAI's error object says.

    Args:
        status: HTTP status.
        message: For a person: what was found, what was expected.
        type: OpenAI's kind of error; None: the usual one of the status.
        param: The field of the request it is about.
        code: For programs, such as "model_not_found".
        headers: More headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def told_in(self, language: Language) -> APIError:
        """The same error with its message in another language; what programs read stays.

        Args:
            language: The client's, see `glmkit.translation.accepted_language`.
        """
        message = translate(self.message, language)
        if message == self.message:
            return self
        headers = {**self.headers, "Content-Language": language}
        return APIError(self.status, message, self.type, self.param, self.code, headers)

    def body(self) -> dict[str, Any]:
        """The error object, for an answer or for an event of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """The error object as JSON. Text that UTF-8 cannot carry comes as escapes."""
        return json.dumps(self.body(), ensure_ascii=True).encode()


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer with a status of 400 or above holds."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request was refused; the message says why"},
    "5XX": {"model": ErrorBody, "description": "The server could not answer"},
}
"""Errors of every route, for the OpenAPI document: `FastAPI(responses=RESPONSES)`."""


def describe_failure(error: BaseException, request_id: str = "") -> APIError:
    """Says what a client is told about an exception.

    Args:
        error: What was raised.
        request_id: Id that the log names as well.

    Returns:
        The error; for what is not the client's fault it holds nothing but the id.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFullError):
        return APIError(429, error.message, code="queue_full", headers=retry_after(2))
    if isinstance(error, UsageError | TokenizerError):
        return APIError(400, str(error))
    if isinstance(error, RequestValidationError):
        return _describe_validation(error)
    if isinstance(error, HTTPException):
        return APIError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RecursionError):
        return APIError(400, "the JSON is nested too deeply", code="nested_too_deeply")
    about = f"; request {request_id}" if request_id else ""
    return APIError(500, f"the server failed on this request{about}", code="internal_error")


def failure_response(error: BaseException, request_id: str = "", language: Language = "en") -> Response:
    """The whole answer to a failed request.

    Args:
        error: What was raised.
        request_id: Id that the log names as well.
        language: The client's.
    """
    told = describe_failure(error, request_id).told_in(language)
    return Response(told.encoded(), told.status, headers=told.headers, media_type="application/json")


def refusal(param: str, message: str) -> APIError:
    """What a client is told about a field that does not fit.

    Args:
        param: The field.
        message: What is wrong with it.
    """
    return APIError(400, f"{param}: {message}", param=param)


def server_closing() -> APIError:
    """What a client is told whose request comes, or still runs, while the server closes."""
    return APIError(503, "the server is closing", code="server_closing", headers=retry_after(5))


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to try again.

    Args:
        seconds: From now; rounded up, at least 1.
    """
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _describe_validation(error: RequestValidationError) -> APIError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place)[:200] or None
    message = str(first["msg"])[:500]
    more = len(error.errors()) - 1
    also = f" (and {more} more)" if more else ""
    return APIError(400, f"{param}: {message}{also}" if param else f"{message}{also}", param=param)

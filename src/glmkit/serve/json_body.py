"""Request bodies: JSON as RFC 8259 means it and no looser, then a shape of `shapes.py`; errors name the field.

Python's own reader takes NaN, keys that occur twice and halves of characters. What two readers understand in two ways
is refused here, before anything else looks at it.
"""

from __future__ import annotations

import asyncio
import email.message
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from glmkit.serve.failures import APIError

MAX_DEPTH = 100
_MAX_DIGITS = 300  # of a whole number: more do not fit into a float
_SMALL_BYTES = 32_768  # read at once; what is larger is read in a thread
_INVALID = "invalid_request_error"
_MAX_NAMED = 8  # ignored fields that the response names

Shape = TypeVar("Shape", bound=BaseModel)


async def read_body(
    request: Request, shape: type[Shape], refused: Mapping[str, str] | None = None
) -> tuple[Shape, dict[str, str]]:
    """Reads a request's body.

    Args:
        request: The request.
        shape: What it should be.
        refused: Fields that are refused unless they are null, and why.

    Returns:
        The body, and headers for the response: `x-ignored-fields` has the names of fields that are not known here.

    Raises:
        APIError: 415 for anything but JSON in UTF-8, 400 for what is no JSON or not of this shape.
    """
    _check_type(request)
    body = await request.body()
    if len(body) <= _SMALL_BYTES:
        return _read(body, shape, refused or {})
    return await asyncio.to_thread(_read, body, shape, refused or {})


def _check_type(request: Request) -> None:
    header = email.message.Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind, charset = header.get_content_type(), header.get_param("charset", "utf-8")
    if not request.headers.get("content-type") or not (kind == "application/json" or kind.endswith("+json")):
        raise APIError(415, "the body must be JSON: send the header Content-Type: application/json", _INVALID)
    if not isinstance(charset, str) or charset.lower().strip('"') not in ("utf-8", "utf8"):
        raise APIError(415, "the body must be JSON in UTF-8", _INVALID)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise APIError(415, "a compressed body is not read: send it as it is", _INVALID)


def _read(body: bytes, shape: type[Shape], refused: Mapping[str, str]) -> tuple[Shape, dict[str, str]]:
    value = parse_json(body)
    if not isinstance(value, dict):
        raise APIError(400, f"the body is a JSON {_kind(value)}; expected an object", _INVALID)
    for name, why in refused.items():
        if value.get(name) is not None:
            raise APIError(400, f"{name} is not offered: {why}", _INVALID, param=name, code="unsupported_parameter")
    try:
        read = shape.model_validate(value)
    except ValidationError as error:
        raise _refusal(value, error) from None
    ignored = [name for name in value if name not in shape.model_fields]
    return read, {"x-ignored-fields": ", ".join(map(_printable, ignored[:_MAX_NAMED]))} if ignored else {}


def parse_json(body: bytes) -> Any:
    """Reads JSON strictly.

    Args:
        body: UTF-8 without a byte order mark.

    Returns:
        Its value.

    Raises:
        APIError: 400: it is no JSON; or it is nested deeper than MAX_DEPTH, has a key twice, a number that is not
            finite or has more than 300 digits, or half a surrogate pair.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_pairs,
            parse_constant=_refuse_constant,
            parse_int=_whole_number,
            parse_float=_finite_number,
        )
        _check_values(value)
    except UnicodeDecodeError:
        raise APIError(400, "the body is not UTF-8", _INVALID) from None
    except RecursionError:
        raise APIError(400, f"the body is nested deeper than {MAX_DEPTH} levels", _INVALID) from None
    except json.JSONDecodeError as error:
        raise APIError(400, f"the body is no JSON: {error.msg} at character {error.pos}", _INVALID) from None
    except ValueError as error:
        raise APIError(400, f"the body is refused: {error}", _INVALID) from None
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits, at most {_MAX_DIGITS} are read")
    return int(digits)


def _finite_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large for a float")
    return number


def _check_values(value: Any) -> None:
    """Refuses deep nesting and lone surrogates; level by level, so that depth costs no stack."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text has half a surrogate pair") from None


def _refusal(value: Any, error: ValidationError) -> APIError:
    """What is wrong with a body. With several forms allowed it is the one that was meant: more than its type fits."""

    def nearness(one: Any) -> tuple[bool, int]:
        return not one["type"].endswith("_type"), len(one["loc"])

    found = max(error.errors(include_url=False, include_input=False), key=nearness)
    param = _path(value, found["loc"], missing=found["type"] == "missing")
    if found["type"].startswith("union_tag_"):
        param += ".role"  # the one field that tells shapes apart
    message = found["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return APIError(400, f"{param}: {message}" if param else message, _INVALID, param=param or None)


def _path(value: Any, location: Iterable[Any], missing: bool) -> str:
    """The location as clients write it, messages[0].content, without pydantic's names of alternatives."""
    path, parts = "", list(location)
    for number, part in enumerate(parts):
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            path, value = f"{path}.{_printable(str(part))}" if path else _printable(str(part)), value[part]
        elif missing and number == len(parts) - 1:
            path, value = f"{path}.{part}" if path else str(part), None
    return path


def _printable(name: str) -> str:
    """A client's name in a header or message: short, and of harmless letters."""
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64])


def _kind(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")

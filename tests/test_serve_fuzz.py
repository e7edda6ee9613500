"""Requests that no client would send, from the OpenAPI document and from raw bytes: refused, and nothing breaks."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import glmkit
from glmkit.chat.following import Served, serve
from glmkit.serve.app import create_app
from glmkit.serve.settings import Settings
from serving import Listening, ask, quiet

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
GOOD = {"model": "glm-nano", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    one = serve(glmkit.load("glm-nano", config={"seq_length": 64}), "glm-nano", max_running=4)
    yield one
    one.close()


@pytest.fixture(scope="module")
def app(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return create_app(served, Settings(allowed_hosts=("testserver",), store=tmp_path_factory.mktemp("store")), quiet())


OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/chat/completions"),
    ("GET", "/v1/chat/completions/{completion_id}"),
    ("DELETE", "/v1/chat/completions/{completion_id}"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/"),
    ("GET", "/live"),
    ("GET", "/ready"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def document(app: Any) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def try_operation(app: Any, document: Any, method: str, path: str, mode: GenerationMode, examples: int) -> None:
    """Sends requests made from the document, and a good one behind each kind of answer."""
    seen: set[tuple[int, str]] = set()
    operation = document[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @seed(examples)
    def check(case: Any) -> None:
        answer = case.call(timeout=120)  # the machine may be busy
        case.validate_response(answer, checks=CHECKS)
        code = str(answer.json()["error"]["code"]) if answer.status_code >= 400 and method != "HEAD" else ""
        if (answer.status_code, code) not in seen:
            seen.add((answer.status_code, code))
            assert ask(app, "POST", "/v1/chat/completions", json=GOOD).status_code == 200

    with suppress(Unsatisfiable):  # nothing is wrong with a request that has no parts
        check()


def test_all_operations_are_tried(app: Any) -> None:
    document = app.openapi()["paths"]
    assert {(method.upper(), path) for path in document for method in document[path]} == set(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("examples", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_requests_made_from_the_document(
    app: Any, document: Any, method: str, path: str, mode: GenerationMode, examples: int
) -> None:
    try_operation(app, document, method, path, mode, examples)


# --- raw bytes ---

GET = b"GET /live HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps(GOOD).encode()

REFUSED_BYTES: dict[str, tuple[bytes, bytes]] = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 50 + b"\r\n\r\n", b"400"),
    "no host": (b"GET /live HTTP/1.1\r\n\r\n", b"400"),
    "two hosts": (GET + b"Host: localhost\r\n\r\n", b"400"),
    "HTTP/1.0 without a host": (b"GET /live HTTP/1.0\r\n\r\n", b"403"),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
    "absolute target": (b"GET http://evil.com/live HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
    "connect": (b"CONNECT evil.com:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
    "bad chunk size": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", b"400"),
    "huge chunk size": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n", b"400"),
    "length and chunks": (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", b"400"),
    "negative length": (POST + b"Content-Length: -3\r\n\r\n", b"400"),
    "other coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", b"400"),
    "long line": (GET + b"X: " + b"y" * 65_536 + b"\r\n\r\n", b"4"),
    "10,000 headers": (GET + b"".join(b"X-%d: y\r\n" % n for n in range(10_000)) + b"\r\n", b"4"),
    "folded header": (GET + b"X: y\r\n z\r\n\r\n", b"200"),
    "NUL in a header": (GET + b"X: \x00\r\n\r\n", b"400"),
    "bare line feeds": (b"GET /live HTTP/1.1\nHost: localhost\n\n", b"200"),
    "space in the target": (b"GET /live x HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
    "1 GB declared": (POST + b"Content-Length: 1073741824\r\n\r\n{", b"413"),
    "length of 30 digits": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{", b"4"),
    "no body": (POST + b"\r\n", b"400"),
    "empty body": (POST + b"Content-Length: 0\r\n\r\n", b"400"),
    "compressed": (POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", b"415"),
    "wrong charset": (
        POST.replace(b"json", b"json; charset=gbk") + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
        b"415",
    ),
    "text": (POST.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}", b"415"),
}


PIECES = (b"\r\n", b"\x00", b"\xff", b": ", b"\r\n\r\n", b"0")


def is_well(app: Any) -> bool:
    return ask(app, "POST", "/v1/chat/completions", json=GOOD).status_code == 200


def send_all(app: Any, cases: list[bytes], seconds: float = 1.5) -> list[bytes]:
    """What comes back for each, on connections of their own at the same time."""

    async def send() -> list[bytes]:
        async with Listening(app, Settings()) as server:
            return list(await asyncio.gather(*(server.send(case, seconds) for case in cases)))

    return asyncio.run(send())


def test_raw_requests_are_refused_plainly(app: Any) -> None:
    answers = send_all(app, [sent for sent, _ in REFUSED_BYTES.values()])
    got = {
        name: (expected, answer[:60])
        for (name, (_, expected)), answer in zip(REFUSED_BYTES.items(), answers)
        if not answer.startswith(b"HTTP/1.1 " + expected)
    }
    assert got == {}
    assert is_well(app)


def test_requests_behind_one_another_are_answered_in_order(app: Any) -> None:
    good = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    (answer,) = send_all(app, [(GET + b"\r\n") * 3 + good + GET + b"Connection: close\r\n\r\n"], 10)
    assert answer.count(b"HTTP/1.1 200") == 5
    assert answer.count(b"chat.completion") == 1


@pytest.mark.parametrize("count", [150, pytest.param(5_000, marks=pytest.mark.slow)])
def test_broken_requests_break_nothing(app: Any, count: int) -> None:
    chance = random.Random(count)
    good = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    cases = []
    for _ in range(count):
        case = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(len(case))
            way = chance.randrange(4)
            if way == 0:
                case[place] = chance.randrange(256)
            elif way == 1:
                del case[place : place + chance.randint(1, 20)]
            elif way == 2:
                case[place:place] = chance.choice(PIECES) * chance.randint(1, 5)
            else:
                case = case[: place + 20]
            if len(case) < 30:
                break
        cases.append(bytes(case))
    for start in range(0, count, 50):
        for answer in send_all(app, cases[start : start + 50], 0.7):
            assert not answer or answer.startswith(b"HTTP/1.1 ")
            assert not answer.startswith(b"HTTP/1.1 5") or answer.startswith(b"HTTP/1.1 501")
        assert is_well(app)


# --- JSON ---

JSON_BODIES: dict[str, bytes] = {
    "deep arrays": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "unclosed": b"[" * 100_000,
    "10 MB of digits": b'{"model": "glm-nano", "max_tokens": ' + b"9" * 7_000_000 + b"}",
    "a key twice": b'{"model": "a", "model": "glm-nano", "messages": []}',
    "NaN": b'{"model": "glm-nano", "temperature": NaN}',
    "Infinity": b'{"model": "glm-nano", "temperature": -Infinity}',
    "1e400": b'{"model": "glm-nano", "temperature": 1e400}',
    "byte order mark": b"\xef\xbb\xbf" + BODY,
    "UTF-16": BODY.decode().encode("utf-16"),
    "UTF-32": BODY.decode().encode("utf-32"),
    "trailing bytes": BODY + b"x",
    "half a character": BODY.replace(b"\\u4f60", b"\\ud83d"),
    "half a character in a key": b'{"\\udc00": 1}',
    "not UTF-8": BODY[:-3] + b"\xff" + BODY[-3:],
    "array": b"[]",
    "string": b'"glm-nano"',
    "null": b"null",
    "spaces": b" " * 100_000,
    "comment": b"{/* */}",
}


@pytest.mark.parametrize("name", JSON_BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/"])
def test_what_is_no_json_is_refused(app: Any, path: str, name: str) -> None:
    answer = ask(app, "POST", path, content=JSON_BODIES[name], headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_server_is_well_after_all_that(app: Any) -> None:
    assert is_well(app)

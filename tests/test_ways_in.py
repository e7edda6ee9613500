"""A-01, A-08, A-09: every route of the API and of the web app is decided, and both answer the same Hosts and Origins.

The routes come from the applications themselves: one that nobody decided about fails here. The tables are sent over
real connections, because what a Host is depends on the HTTP parser too.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")

import glmkit
from glmkit.chat.following import serve
from glmkit.chat.messages import Message
from glmkit.chat.store import ConversationStore
from glmkit.serve import app as api
from glmkit.serve.settings import ApiKey, Settings
from glmkit.tools.examples import SAFE_TOOLS
from glmkit.tools.registry import Registry
from glmkit.web import app as web
from glmkit.web.desk import Desk
from glmkit.web.gate import TOKEN_HEADER, Access
from glmkit.web.interpreters import Interpreters
from glmkit.web.login import COOKIE, Passwords, Sessions
from glmkit.web.models import Models
from scripted import scripted
from serving import KEY, WRONG_KEYS, Listening, ask, quiet

NAMED = "chat.example.org"
PAGE = "https://page.example.org"


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    one = serve(glmkit.load("glm-nano"), "glm-nano", max_running=2, max_waiting=4)
    yield one
    one.close()


def make_web(folder: Path, passwords: Passwords | None) -> tuple[Any, Sessions]:
    models = Models.of({"glm-nano": scripted(lambda prompt: Message("assistant", "好"), 0.0)})
    desk = Desk(ConversationStore(folder), models, Registry(SAFE_TOOLS), [], Interpreters(None, None, "off"), [])
    sessions = Sessions()
    return web.create_app(desk, Access(sessions, passwords, frozenset({NAMED})), "en"), sessions


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The web app with a password."""
    return make_web(tmp_path_factory.mktemp("talks"), Passwords(["ann:correct-horse"]))[0]


# --- routes ---

API_ROUTES = {
    **dict.fromkeys(["GET /live", "HEAD /live", "GET /health", "HEAD /health"], "open"),
    **dict.fromkeys(["GET /ready", "HEAD /ready", "GET /metrics"], "key"),
    **dict.fromkeys(["GET /openapi.json", "HEAD /openapi.json"], "key"),
    **dict.fromkeys(["GET /v1/models", "GET /v1/models/{model_id:path}", "POST /tokenize", "POST /"], "key"),
    **dict.fromkeys(["GET /v1/chat/completions", "POST /v1/chat/completions", "POST /v1/completions"], "key"),
    **dict.fromkeys([f"{method} /v1/chat/completions/{{completion_id}}" for method in ("GET", "DELETE")], "key"),
}
"""All routes of the API and what each needs. A new one goes in here, with a reason if it is open."""


def test_every_route_of_the_api_is_decided_and_needs_its_key(served: Any) -> None:
    app = api.create_app(served, Settings(api_keys=(ApiKey.of(KEY),)), quiet())
    found = {f"{method} {route.path}" for route in app.routes for method in getattr(route, "methods", None) or ["?"]}
    assert found == set(API_ROUTES)
    for route, needs in API_ROUTES.items():
        method, path = re.sub(r"{[^}]*}", "x", route).split(" ")
        for kind, headers in WRONG_KEYS.items():
            for place in (path, f"{path}?api_key={KEY}&key={KEY}"):
                status = ask(app, method, place, headers=headers).status_code
                assert (status == 401) is (needs == "key"), (route, kind, status)


WEB_ROUTES = {
    **dict.fromkeys(["GET /live", "GET /login", "POST /login"], "open"),
    "GET /glm/{name}": "open for page.css, which the page to sign in needs",
    **dict.fromkeys(["GET /figures/{id}/{name}", "GET /files/{id}/{name}", "GET /export/{file}"], "signed in"),
    "GET /logout": "signed in",
}
"""The web app's own routes; gradio's all need that somebody signed in, the page itself among them."""

OF_GRADIO = [
    "/gradio_api/" + path
    for path in (
        *("queue/join", "queue/data", "upload", "upload_progress", "file=/etc/passwd", "file/etc/passwd", "call/x"),
        *("call/x/y", "run/x", "api/x", "info", "reset", "cancel", "stream/x/y/z/playlist.m3u8", "component_server"),
        *("startup-events", "heartbeat/x", "proxy=http://evil.com", "token", "login_check", "app_id", "dev/reload"),
    )
]
"""Of the routes that gradio adds where nobody sees them in the application."""

OPEN_ON_THE_WEB = {"/live", "/login", "/glm/page.css", "/favicon.ico"}
WRONG_COOKIES = {
    "none": "",
    "wrong": f"{COOKIE}=wrong",
    "empty": f"{COOKIE}=",
    "another name": "session=TOKEN",
    "a letter more": f"{COOKIE}=TOKENx",
    "quoted": f'{COOKIE}="x"',
    "not a cookie": f"{COOKIE}",
    "not ASCII": f"{COOKIE}=ключ",
    "long": f"{COOKIE}=" + "k" * 60_000,
}


def paths_of(routes: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(getattr(route, "app", None), "routes", None)
        path = prefix + getattr(route, "path", "")
        if inner:
            yield from paths_of(inner, path)
        else:
            yield from ((method, path or "/") for method in getattr(route, "methods", None) or ["GET"])


def test_every_route_of_the_web_app_is_decided_and_needs_somebody_signed_in(tmp_path: Path) -> None:
    app, sessions = make_web(tmp_path, Passwords(["ann:correct-horse"]))
    token = sessions.begin("ann")
    own = {f"{method} {route.path}" for route in app.routes for method in getattr(route, "methods", None) or []}
    assert own == set(WEB_ROUTES)
    every = sorted({(method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in paths_of(app.routes)})
    every += [(method, path) for path in OF_GRADIO for method in ("GET", "POST")]
    assert len(every) >= 70

    async def work() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:7860") as client:
            for method, path in every:
                if path in OPEN_ON_THE_WEB:
                    continue
                for kind, cookie in WRONG_COOKIES.items():
                    headers = {"cookie": cookie.replace("TOKEN", token).encode()} if cookie else {}
                    answer = await client.request(method, f"{path}?{COOKIE}={token}", headers=headers)
                    told = answer.headers.get("location") if answer.status_code == 303 else answer.status_code
                    assert told in ("/login", 401), (method, path, kind, told)
            for method, path in every:  # signed in, but not from the page: nothing is changed
                if method not in ("GET", "HEAD") and path != "/login":
                    for given in ({}, {TOKEN_HEADER: "wrong"}, {TOKEN_HEADER: sessions.form_token("")}):
                        headers = {"cookie": f"{COOKIE}={token}", "content-type": "application/json", **given}
                        answer = await client.request(method, path, headers=headers, content=b"{}")
                        assert answer.status_code in (403, 405), (method, path, given)

    asyncio.run(work())


# --- Host and Origin ---

HOSTS = {
    "localhost": True,
    "LOCALHOST": True,
    "localhost:8000": True,
    "127.0.0.1": True,
    "127.0.0.1:8000": True,
    "127.0.0.1:65535": True,
    "[::1]": True,
    "[::1]:8000": True,
    "192.168.1.5:8000": True,
    "[::ffff:127.0.0.1]": True,
    "chat.example.org": True,
    "CHAT.example.org:443": True,
    "127.1": False,
    "0x7f.0.0.1": False,
    "2130706433": False,
    "0.0.0.0": False,
    "[::]": False,
    "::1": False,
    "[127.0.0.1]": False,
    "": False,
    ":8000": False,
    "evil.com": False,
    "evil.com:8000": False,
    "localhost.evil.com": False,
    "localhost.": False,
    "127.0.0.1.evil.com": False,
    "example.org": False,
    "chat.example.org.evil.com": False,
    "evil.com#localhost": False,
    "localhost@evil.com": False,
    "evil.com@localhost": False,
    "localhost:99999": False,
    "localhost:": False,
    "localhost:80:80": False,
    "localhost evil.com": False,
    "localhost,evil.com": False,
    "localhost/x": False,
    "lоcalhost": False,  # with a Cyrillic letter
    "null": False,
}

WHOLE_REQUESTS = {
    b"GET /live HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n": False,
    b"GET /live HTTP/1.1\r\n": False,
    b"GET /live HTTP/1.1\r\nHost: evil.com\r\nX-Forwarded-Host: localhost\r\nX-Forwarded-For: 127.0.0.1\r\n": False,
    b"GET http://localhost/live HTTP/1.1\r\nHost: evil.com\r\n": False,
    b"GET http://evil.com/live HTTP/1.1\r\nHost: evil.com\r\n": False,
    b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Host: evil.com\r\n": True,
}

ORIGINS = {
    None: True,
    "http://localhost:8000": True,
    "https://localhost:8000": True,  # a proxy in front speaks TLS
    "null": False,
    "": False,
    "http://localhost": False,
    "http://localhost:8001": False,
    "http://127.0.0.1:8000": False,
    "file://": False,
    "https://evil.com": False,
    "https://page.example.org.evil.com": False,
    "https://evilpage.example.org": False,
    "http://page.example.org": False,
    "https://page.example.org:444": False,
    "https://page.example.org/": False,
    "http://localhost:8000.evil.com": False,
    "http://evil.com/localhost:8000": False,
    "http://evil.com@localhost:8000": False,
    "chrome-extension://localhost:8000": False,
}


def statuses(app: Any, heads: list[bytes]) -> list[int]:
    """What real connections get for whole heads of requests; 0: nothing."""

    async def send() -> list[bytes]:
        async with Listening(app, Settings()) as server:
            return list(await asyncio.gather(*(server.send(head + b"Connection: close\r\n\r\n") for head in heads)))

    return [int(answer[9:12] or 0) for answer in asyncio.run(send())]


@pytest.fixture(params=["API", "web app"])
def app(request: pytest.FixtureRequest, served: Any, locked: Any) -> Any:
    if request.param == "web app":
        return locked
    return api.create_app(served, Settings(allowed_hosts=(NAMED,), cors_origins=(PAGE,)), quiet())


def test_hosts(app: Any) -> None:
    heads = [b"GET /live HTTP/1.1\r\nHost: " + host.encode() + b"\r\n" for host in HOSTS] + list(WHOLE_REQUESTS)
    expected = [*HOSTS.values(), *WHOLE_REQUESTS.values()]
    assert len(HOSTS) >= 30
    found = statuses(app, heads)
    wrong = [
        (head, status)
        for head, allowed, status in zip(heads, expected, found, strict=True)
        if (status == 200) is not allowed or status not in (200, 400, 403)
    ]
    assert wrong == []


def test_origins(app: Any) -> None:
    heads = []
    for origin in ORIGINS:
        line = "" if origin is None else f"Origin: {origin}\r\n"
        heads.append(f"GET /live HTTP/1.1\r\nHost: localhost:8000\r\n{line}".encode())
    both = b"GET /live HTTP/1.1\r\nHost: localhost:8000\r\nOrigin: http://localhost:8000\r\nOrigin: null\r\n"
    found = statuses(app, [*heads, both])
    assert dict(zip([*ORIGINS, "two"], (status == 200 for status in found))) == {**ORIGINS, "two": False}
    assert set(found) == {200, 403}


def test_a_page_that_was_named_may_use_the_api_only(served: Any, locked: Any) -> None:
    head = f"GET /live HTTP/1.1\r\nHost: localhost:8000\r\nOrigin: {PAGE}\r\n".encode()
    named = api.create_app(served, Settings(cors_origins=(PAGE,)), quiet())
    assert [*statuses(named, [head]), *statuses(locked, [head])] == [200, 403]

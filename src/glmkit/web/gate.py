"""What every request of the page passes first: right host, right origin, signed in, and the headers of every answer.

Everything is closed but what `_OPEN` names. A page of another site can neither send here (Host, Origin, a token that
only our page knows) nor show us (frame-ancestors), and nothing that a model writes can load or run anything (the
policy).
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any

from glmkit.serve.origins import host_is_allowed, origin_is_allowed
from glmkit.web.login import COOKIE, Passwords, Sessions

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
TOKEN_HEADER = "x-glm-token"
MAX_BODY_BYTES = 8 * 2**20
_OPEN = frozenset({"/login", "/live", "/glm/page.css", "/favicon.ico"})
_READING = frozenset({"GET", "HEAD"})
_CONTENT_TYPES = ("application/json", "multipart/form-data")
_MARK = "<head>"
# gradio compiles the small functions of a page's events in the browser, which takes 'unsafe-eval'; inline scripts of
# the page carry the nonce, and all others are dead.
_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "manifest-src 'self'; media-src 'none'; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
FILE_POLICY = "default-src 'none'; sandbox; frame-ancestors 'none'"  # of files that code has written
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Access:
    """Who may come in.

    Args:
        sessions: Those who signed in.
        passwords: Who may; None: everybody who reaches the server, which then listens on this machine only.
        hosts: Names in the Host header beside localhost and IP addresses, in lower case.
    """

    sessions: Sessions
    passwords: Passwords | None = None
    hosts: frozenset[str] = frozenset()


class Gate:
    """The middleware.

    Args:
        app: What stands behind it.
        access: Who may come in.
    """

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _Headers(scope)
        refused = self._refuse(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        cookie = headers.cookie()
        user = self.access.sessions.user(cookie) if self.access.passwords is not None else ""
        scope["glm.user"] = user or ""
        if scope["path"] == "/":
            headers.remove(b"accept-encoding")  # the page is changed below
        page = _Answer(send, self._page_head(cookie if user else "") if scope["path"] == "/" else _MARK)
        await self.app(scope, _limited(receive), page.send)

    def _refuse(self, scope: Message, headers: _Headers) -> tuple[int, str, dict[bytes, bytes]] | None:
        """Why a request is not let in: status, reason and further headers; None if it is."""
        hosts, origins, path = headers.all("host"), headers.all("origin"), str(scope["path"])
        if len(hosts) != 1 or not host_is_allowed(hosts[0], self.access.hosts):
            return 403, "this server does not answer for that Host", {}
        if origins and (len(origins) > 1 or not origin_is_allowed(origins[0], hosts[0], scope["scheme"], ())):
            return 403, "pages of that Origin may not use this server", {}
        cookie = headers.cookie()
        if self.access.passwords is not None and path not in _OPEN and self.access.sessions.user(cookie) is None:
            if scope["method"] in _READING and path == "/":
                return 303, "", {b"location": b"/login"}
            return 401, "sign in first", {}
        if scope["method"] in _READING or path == "/login":
            return None
        if scope["method"] != "POST":
            return 405, "no such method", {b"allow": b"GET, HEAD, POST"}
        kind = (headers.all("content-type") or [""])[0].partition(";")[0].strip().lower()
        if kind not in _CONTENT_TYPES:
            return 415, "expected application/json", {}
        session = cookie if self.access.passwords is not None else ""
        given = headers.all(TOKEN_HEADER)
        if len(given) != 1 or not self.access.sessions.is_form_token(session, given[0]):
            return 403, "this request does not come from the page; reload it", {}
        length = (headers.all("content-length") or ["0"])[0]
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            return 413, f"the request has more than {MAX_BODY_BYTES} bytes", {}
        return None

    def _page_head(self, cookie: str) -> str:
        """What the page gets into its head: its token, its looks and its script, before any other script."""
        token = self.access.sessions.form_token(cookie)
        return (
            f'<head><meta name="glm-token" content="{token}"><link rel="stylesheet" href="/glm/page.css">'
            '<script src="/glm/page.js"></script>'
        )


class _Headers:
    """The headers of a request."""

    def __init__(self, scope: Message) -> None:
        self._scope = scope

    def all(self, name: str) -> list[str]:
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self._scope["headers"] if key.lower() == wanted]

    def remove(self, name: bytes) -> None:
        self._scope["headers"] = [(key, value) for key, value in self._scope["headers"] if key.lower() != name]

    def cookie(self) -> str:
        for line in self.all("cookie"):
            try:
                found = SimpleCookie(line).get(COOKIE)
            except CookieError:
                continue
            if found is not None:
                return found.value
        return ""


class _Answer:
    """The answer to a request, with the headers that all have; the page itself with a nonce in each of its scripts."""

    def __init__(self, send: Send, page_head: str) -> None:
        self._send, self._page_head = send, page_head
        self._start: Message | None = None
        self._body = b""
        self._nonce = secrets.token_urlsafe(16)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message.get("headers", [])]
            given = {name for name, _ in headers}
            headers += [(name, value) for name, value in _HEADERS.items() if name not in given]
            if b"content-security-policy" not in given:
                headers.append((b"content-security-policy", _POLICY.format(nonce=self._nonce).encode()))
            message = {**message, "headers": headers}
            if any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers):
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_page()
            return
        await self._send(message)

    async def _send_page(self) -> None:
        assert self._start is not None
        text = self._body.decode("utf-8", "replace")
        if _MARK in text:
            text = text.replace(_MARK, self._page_head, 1).replace("<script", f'<script nonce="{self._nonce}"')
        body = text.encode()
        headers = [(name, value) for name, value in self._start["headers"] if name not in (b"content-length", b"etag")]
        headers += [(b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _limited(receive: Receive) -> Receive:
    """A body that says nothing about its length is cut off where it gets too long."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return message if received <= MAX_BODY_BYTES else {"type": "http.disconnect"}

    return limited


async def _answer(send: Send, status: int, text: str, further: dict[bytes, bytes]) -> None:
    body = text.encode()
    headers = {
        **_HEADERS,
        b"content-security-policy": FILE_POLICY.encode(),
        b"content-type": b"text/plain; charset=utf-8",
    }
    headers |= {b"content-length": str(len(body)).encode(), b"cache-control": b"no-store"} | further
    await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": body})

"""One request on its way in and its answer on its way out, as ASGI messages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from glmkit.serve.failures import APIError, failure_response
from glmkit.serve.traffic import Record
from glmkit.translation import Language, accepted_language

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_DISCARD_SECONDS = 1.0  # a refused body is read so long, so that its sender sees the answer and no reset
_SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}


class Exchange:
    """One request and what was sent for it so far.

    Args:
        scope: Its ASGI scope.
        receive: Where its body comes from.
        send: Where its answer goes.
        record: What is known about it.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send, record: Record) -> None:
        self.scope = scope
        self.receive = receive
        self.record = record
        self.headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            self.headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        self.cross_origin: str | None = None
        self.body_is_read = False
        self._send = send
        self._started = self._ended = self._streams = False

    @property
    def declared_bytes(self) -> int:
        """What Content-Length says."""
        declared = self.headers.get("content-length", ["0"])[0]
        return int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else 0

    @property
    def language(self) -> Language:
        """In which language errors are told: what Accept-Language likes best."""
        return accepted_language(",".join(self.headers.get("accept-language", [])))

    async def send(self, message: Message) -> None:
        """Sends a message of the route, with the headers that every answer has.

        Args:
            message: An ASGI message.
        """
        if message["type"] == "http.response.start":
            self._started = True
            self.record.status = message["status"]
            headers = list(message.get("headers", []))
            given = {name.lower() for name, _ in headers}
            self._streams = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
            headers += [(name, value) for name, value in _SECURITY_HEADERS.items() if name not in given]
            headers.append((b"x-request-id", self.record.id.encode()))
            if self.cross_origin is not None:
                headers += [
                    (b"access-control-allow-origin", self.cross_origin.encode()),
                    (b"access-control-expose-headers", b"x-request-id, retry-after"),
                    (b"vary", b"Origin"),
                ]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)
        if not self._ended:
            await asyncio.sleep(0)  # what is sent to nobody takes no time; a route that only sends would stop the loop

    def replay(self, body: bytes) -> Receive:
        """What the route receives: the body that was read, then nothing until it is cancelled.

        Args:
            body: The body.
        """
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if left:
                return left.pop()
            await asyncio.Event().wait()
            raise AssertionError("an event that nobody sets")

        return receive

    async def fail(self, error: APIError) -> None:
        """Tells an error in whatever form is still possible.

        Args:
            error: The error.
        """
        if not self._started:
            await self._answer(error)
        elif self._streams and not self._ended:
            event = b"data: " + error.told_in(self.language).encoded() + b"\n\n"
            await self.send({"type": "http.response.body", "body": event})
        # An answer that is cut elsewhere is left unfinished: the connection closes, and its reader notices.

    async def refuse(self, error: APIError) -> None:
        """Answers a request whose body may not have been read; then the connection closes, when its sender has seen it.

        Args:
            error: Why it is refused.
        """
        if self.body_is_read:
            await self.fail(error)
            return
        expects_body = self.declared_bytes > 0 or "transfer-encoding" in self.headers
        await self._answer(error, last=not expects_body)
        if expects_body:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._discard_body(), _DISCARD_SECONDS)
            await self.send({"type": "http.response.body", "body": b""})

    async def _discard_body(self) -> None:
        while (message := await self.receive())["type"] == "http.request" and message.get("more_body"):
            pass

    async def _answer(self, error: APIError, last: bool = True) -> None:
        response = failure_response(error, language=self.language)
        headers = list(response.raw_headers)
        if not last:
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": response.body, "more_body": not last})

    async def answer_preflight(self) -> None:
        """Answers what a browser asks before a request of another origin."""
        headers = [
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
            (b"content-length", b"0"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})

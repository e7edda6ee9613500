"""Servers for tests: one without a model, on a free port of this machine, and raw connections to it."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from types import SimpleNamespace, TracebackType
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from glmkit.errors import QueueFullError
from glmkit.serve.health import add_health
from glmkit.serve.logs import Journal
from glmkit.serve.protection import add_protection, admit
from glmkit.serve.server import http_server
from glmkit.serve.settings import Settings

LOCAL = "http://localhost"
CANARY = "canary-7f3a-lives-in-no-log"
KEY = "key-0123456789abcdef"
OTHER_KEY = "key-fedcba9876543210"
BEARER = {"Authorization": f"Bearer {KEY}"}

WRONG_KEYS: dict[str, list[tuple[str, bytes]]] = {
    "none": [],
    "wrong": [("Authorization", b"Bearer wrong-wrong-wrong")],
    "prefix": [("Authorization", f"Bearer {KEY[:-1]}".encode())],
    "and a space": [("Authorization", f"Bearer {KEY} ".encode())],
    "two spaces": [("Authorization", f"Bearer  {KEY}".encode())],
    "longer": [("Authorization", f"Bearer {KEY}x".encode())],
    "other scheme": [("Authorization", f"Basic {KEY}".encode())],
    "lower-case scheme": [("Authorization", f"bearer {KEY}".encode())],
    "no scheme": [("Authorization", KEY.encode())],
    "twice": [("Authorization", f"Bearer {KEY}".encode()), ("Authorization", f"Bearer {KEY}".encode())],
    "another header": [("X-Api-Key", KEY.encode())],
    "1 MB": [("Authorization", b"Bearer " + b"k" * 2**20)],
    "not ASCII": [("Authorization", "Bearer ключ-鍵-🔑".encode())],
    "empty": [("Authorization", b"Bearer ")],
}
"""Headers that are not the key's."""


@functools.cache
def quiet() -> Journal:
    """A log that nobody reads."""
    return Journal(os.open(os.devnull, os.O_WRONLY))


class Listening:
    """`async with Listening(app, settings) as server:` serves on a free port of the loopback address.

    Args:
        app: An ASGI application.
        settings: Limits and deadlines of connections.
    """

    def __init__(self, app: Any, settings: Settings) -> None:
        self._server = http_server(app, settings)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Listening:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        await self._task

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Opens a connection without sending anything."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def get(self, path: str) -> httpx.Response:
        """Gets a path on a connection of its own."""
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(self.url + path)

    async def send(self, data: bytes, seconds: float = 5.0) -> bytes:
        """Sends bytes as they are.

        Args:
            data: What to send.
            seconds: How long to wait for the end of the answer.

        Returns:
            Everything that came back until the server closed, or until the time was over.
        """
        reader, writer = await self.connect()
        came = bytearray()
        try:
            writer.write(data)
            while part := await asyncio.wait_for(reader.read(65536), seconds):
                came += part
        except (asyncio.TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
        return bytes(came)


class FakeEngine:
    """As much of an engine as the protection asks: room, and what it is doing."""

    def __init__(self, max_running: int = 2, max_waiting: int = 4) -> None:
        self.places = 0
        self.broken: str | None = None
        self.max_running, self.max_waiting = max_running, max_waiting

    def check_room(self, places: int = 1) -> None:
        if self.places + places > self.max_running + self.max_waiting:
            raise QueueFullError("full", hint="later")

    def state(self) -> Any:
        return SimpleNamespace(
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            broken=self.broken,
            busy=False,
            last_progress=0.0,
        )


def fake_app(settings: Settings, engine: FakeEngine | None = None, journal: Journal | None = None) -> FastAPI:
    """Routes that do what routes of a server do, without a model."""
    engine = engine or FakeEngine()
    app = FastAPI(docs_url=None, redoc_url=None)
    app.state.begun = app.state.cancelled = 0

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.get("/item/{name}")
    async def item(name: str) -> dict[str, str]:
        return {"name": name}

    @app.post("/wait")
    async def wait(request: Request) -> None:
        record = admit(request, engine)  # type: ignore[arg-type]
        app.state.begun += 1
        if request.headers.get("x-piece"):
            record.note_piece()
        engine.places += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            app.state.cancelled += 1
            raise
        finally:
            engine.places -= 1

    @app.post("/stream")
    async def stream(request: Request) -> StreamingResponse:
        record = admit(request, engine)  # type: ignore[arg-type]

        async def events() -> Any:
            app.state.begun += 1
            try:
                while True:
                    record.note_piece()
                    yield "data: piece\n\n"
                    await asyncio.sleep(0.01)
            finally:
                app.state.cancelled += 1

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/flood")
    async def flood(request: Request) -> StreamingResponse:
        async def parts() -> Any:
            try:
                while True:
                    yield b"x" * 65536
            finally:
                app.state.cancelled += 1

        return StreamingResponse(parts(), media_type="application/octet-stream")

    @app.post("/fail")
    async def fail(request: Request) -> None:
        raise RuntimeError(f"{CANARY} {(await request.body()).decode()}")

    add_health(app, settings, {})
    add_protection(app, settings, journal=journal or quiet())
    return app


def client(app: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL, **options)


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client(app) as session:
            return await session.request(method, path, **options)

    return asyncio.run(send())


class Lines:
    """What a log says."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.journal = Journal(self._write)

    def text(self) -> str:
        self.journal.close()
        os.close(self._write)
        with os.fdopen(self._read, encoding="utf-8") as file:
            return file.read()

"""The process: a port that answers from the first moment, a model that is loaded beside it, and an orderly end.

port open -> /live 200, /ready 503 -> model loaded -> answers -> SIGTERM: /ready 503, no more requests, running ones
finish within the drain time -> the rest is told so and ends -> port closed, exit code 0
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fastapi import FastAPI

from glmkit.errors import MissingDependencyError, UsageError
from glmkit.serve.failures import server_closing
from glmkit.serve.health import loading_app
from glmkit.serve.logs import Journal
from glmkit.serve.protection import add_protection
from glmkit.serve.settings import Settings
from glmkit.serve.traffic import Traffic

try:
    import uvicorn

    from glmkit.serve.connection import connection_class
except ImportError:
    raise MissingDependencyError("uvicorn", "serve") from None

_TICK_SECONDS = 0.05
_LEAVE_SECONDS = 1.0  # for what was told to end, to be over
_BACKLOG = 128
_SPARE_DESCRIPTORS = 24  # for files and pipes beside connections


@dataclass(frozen=True)
class Service:
    """What is served once it is loaded.

    Args:
        app: The application, protected by `add_protection`.
        models: What answers, by name; each has an `engine` and is closed at the end (`glmkit.chat.following.Served`).
    """

    app: FastAPI
    models: Mapping[str, Any]


def run(load: Callable[[Journal], Service], settings: Settings) -> NoReturn:
    """Serves until SIGTERM or Ctrl-C.

    A second signal ends it without waiting for running requests. While the model is being loaded the first one does.

    When everything is closed the process ends here, with exit code 0, or 1 after the engine broke, so that a supervisor
    starts it again. It ends at once: native libraries take seconds to be taken down, and crash while one of their
    threads is still loading or computing.

    Args:
        load: Loads the model and builds the application; called in a thread, with the log.
        settings: Address, limits and deadlines.

    Raises:
        UsageError: The address cannot be listened on.
        GlmkitError: The model cannot be loaded.
    """
    listener = listen(settings.host, settings.port)
    journal = Journal()
    journal.take_loggers()
    process = _Process(listener, settings, journal)
    code = asyncio.run(process.serve(load))
    journal.close()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def listen(host: str, port: int) -> socket.socket:
    """Opens a port.

    Args:
        host: Address.
        port: TCP port; 0 takes a free one.

    Raises:
        UsageError: It cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="another --port; --port 0 takes a free one",
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The address of a port, as people type it.

    Args:
        listener: The port.
    """
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def possible_connections(wanted: int) -> int:
    """How many connections this process may have open, by its limit of file descriptors.

    Args:
        wanted: The most.
    """
    try:
        import resource

        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):
        return wanted
    return max(4, min(wanted, files - opened - _SPARE_DESCRIPTORS))


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: they would end the process by the signal instead of a code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: Any, settings: Settings) -> uvicorn.Server:
    """The HTTP side alone: connections with their limits and deadlines, no signals.

    Args:
        app: An ASGI application.
        settings: Limits and deadlines.

    Returns:
        A server; `await server.serve(sockets=[…])` runs it until its `should_exit` is set.
    """
    most = possible_connections(settings.max_connections)
    config = uvicorn.Config(
        app,
        interface="asgi3",
        http=connection_class(settings, most),
        # So many are accepted in one go, before those in excess are closed; there have to be descriptors for them.
        backlog=_BACKLOG if most == settings.max_connections else _SPARE_DESCRIPTORS // 2,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(settings.idle_seconds)),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_graceful_shutdown=1,
    )
    return _Server(config)


class _Process:
    def __init__(self, listener: socket.socket, settings: Settings, journal: Journal) -> None:
        self._listener = listener
        self._settings = settings
        self._journal = journal
        self._app = loading_app(settings)
        add_protection(self._app, settings, journal=journal)
        self._stops = 0
        self._models: Mapping[str, Any] = {}

    async def serve(self, load: Callable[[Journal], Service]) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        server = http_server(self._answer, self._settings)
        serving = asyncio.ensure_future(server.serve(sockets=[self._listener]))
        url = url_of(self._listener)
        self._journal.write({"event": "listening", "url": url, "prompts_are_logged": self._settings.log_prompts})
        try:
            return await self._serve_until_stopped(load, serving, url)
        finally:
            server.should_exit = True
            await serving
            await self._close_models()
            self._journal.write({"event": "closed"})

    async def _serve_until_stopped(
        self, load: Callable[[Journal], Service], serving: asyncio.Future[None], url: str
    ) -> int:
        began = time.monotonic()
        loading = _in_thread(lambda: load(self._journal))
        while not loading.done():
            if self._stops or serving.done():
                loading.cancel()
                return 0
            await asyncio.wait({loading}, timeout=_TICK_SECONDS)
        service = loading.result()
        self._models = service.models
        async with service.app.router.lifespan_context(service.app):
            self._app = service.app
            seconds = round(time.monotonic() - began, 2)
            self._journal.write({"event": "ready", "models": list(service.models), "seconds": seconds})
            _say(f"{', '.join(service.models)}: {url}/v1 (Ctrl-C ends it)")
            while not self._stops and not serving.done() and not self._broken():
                await asyncio.sleep(_TICK_SECONDS)
            traffic: Traffic = service.app.state.traffic
            await self._drain(traffic)
        return 1 if self._broken() else 0

    def _stop(self) -> None:
        self._stops += 1

    def _broken(self) -> bool:
        return any(served.engine.state().broken is not None for served in self._models.values())

    async def _drain(self, traffic: Traffic) -> None:
        traffic.draining = True
        self._journal.write({"event": "closing", "in_flight": traffic.in_flight, "broken": self._broken()})
        await self._wait_for(traffic, self._settings.drain_seconds, lambda: self._stops > 1 or self._broken())
        traffic.end_all(server_closing())
        await self._wait_for(traffic, _LEAVE_SECONDS, lambda: False)

    async def _wait_for(self, traffic: Traffic, seconds: float, hurries: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while traffic.in_flight and time.monotonic() < end and not hurries():
            await asyncio.sleep(_TICK_SECONDS)

    async def _close_models(self) -> None:
        closing = [_in_thread(served.close) for served in self._models.values()]
        if closing:
            await asyncio.wait(closing, timeout=_LEAVE_SECONDS)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


def _in_thread(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Does something in a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def do() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=do, name="glmkit work", daemon=True).start()
    return future


def _say(text: str) -> None:
    """Tells whoever started the server; nobody may be there to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)

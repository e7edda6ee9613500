"""What every request passes before a route sees it, and what ends it: refused unless all of this allows it.

    shape of the request -> Host -> Origin -> key -> room -> body, within its limits -> route, within its deadlines

A route runs as a task of its own. When its client leaves, its time is over or the server closes, the task is cancelled;
leaving `async with following:` then frees the engine's row. Nothing a route raises goes further than this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from glmkit.errors import QueueFullError
from glmkit.serve.budgets import Budgets
from glmkit.serve.exchange import Exchange, Message, Receive, Send
from glmkit.serve.failures import APIError, describe_failure, failure_response, retry_after, server_closing
from glmkit.serve.logs import Journal, describe_error
from glmkit.serve.origins import host_is_allowed, origin_is_allowed
from glmkit.serve.settings import Settings, is_loopback, matching_key
from glmkit.serve.traffic import Buffer, Record, Traffic, too_large
from glmkit.translation import accepted_language

if TYPE_CHECKING:  # the engine brings torch, and the port has to answer before that is imported
    from glmkit.engine.scheduler import BatchEngine

OPEN_PATHS = frozenset({"/live", "/health"})
"""Paths that need no key; they say nothing but a status."""

_WHILE_DRAINING = OPEN_PATHS | {"/ready", "/metrics"}
_CANCEL_SECONDS = 5.0  # a cancelled route may clean up so long


def add_protection(
    app: FastAPI, settings: Settings, engines: Sequence[BatchEngine] = (), journal: Journal | None = None
) -> None:
    """Puts everything in this module around an application; call it when all its routes are there.

    Args:
        app: The application. `app.state.traffic` has its requests afterwards.
        settings: Limits, keys and deadlines.
        engines: What answers; a POST is refused before its body is read while all of them are full.
        journal: The log; None writes to stderr.
    """
    journal = journal or Journal()
    meters = getattr(app.state, "meters", None)
    observers = (journal,) if meters is None else (journal, meters)
    budgets = Budgets(settings.requests_per_minute, settings.tokens_per_minute)
    traffic = Traffic(observers, 16 * settings.max_body_bytes, budgets)
    app.state.traffic, app.state.settings = traffic, settings
    app.add_exception_handler(HTTPException, _answer_failure)
    app.add_exception_handler(RequestValidationError, _answer_failure)
    app.add_middleware(Protection, settings=settings, traffic=traffic, engines=tuple(engines), journal=journal)


async def _answer_failure(request: Request, error: Exception) -> Any:
    language = accepted_language(request.headers.get("accept-language", ""))
    return failure_response(error, request.state.record.id, language)


def admit(request: Request, engine: BatchEngine, places: int = 1) -> Record:
    """Lets a request ask an engine for answers. Call it before the prompt is tokenised.

    The request has to note its first piece within `Settings.waiting_seconds` from its arrival.

    Args:
        request: The request.
        engine: Which engine.
        places: How many answers.

    Returns:
        The request's record: its id, the owner of its cache, and what to tell it.

    Raises:
        APIError: 429: its key has its share already, or has used its budget of the minute.
        QueueFullError: The engine is full.
    """
    record: Record = request.state.record
    settings: Settings = request.app.state.settings
    engine.check_room(places)
    state = engine.state()
    waiting = state.max_waiting // 2 if len(settings.api_keys) > 1 else state.max_waiting
    traffic: Traffic = request.app.state.traffic
    traffic.take_share(record, places, state.max_running + waiting)
    traffic.budgets.take_request(record.owner)
    return record


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Protection:
    """The middleware.

    Args:
        app: What is protected.
        settings: Limits, keys and deadlines.
        traffic: Where requests are counted.
        engines: What answers.
        journal: The log.
    """

    def __init__(
        self, app: Any, settings: Settings, traffic: Traffic, engines: tuple[BatchEngine, ...], journal: Journal
    ) -> None:
        self.app = app
        self.settings = settings
        self.traffic = traffic
        self.engines = engines
        self.journal = journal
        names = {name.lower() for name in settings.allowed_hosts}
        self.hosts = names | ({settings.host.lower()} if _is_name(settings.host) else set())
        self.origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            with self.traffic.request(scope["method"]) as record:
                scope.setdefault("state", {})["record"] = record
                await self._serve(Exchange(scope, receive, send, record))

    async def _serve(self, exchange: Exchange) -> None:
        scope, record = exchange.scope, exchange.record
        try:
            if self._is_preflight(exchange):
                await exchange.answer_preflight()
                return
            self._check(exchange)
            with self.traffic.buffer() as buffer:
                body = await self._read_body(exchange, buffer)
                if body is None:
                    record.status, record.outcome = 499, "aborted"
                    return
                if self.settings.log_prompts and body:
                    self.journal.write(
                        {"event": "body", "id": record.id, "body": body[:65536].decode(errors="replace")}
                    )
                await self._run(exchange, body)
        except Exception as error:
            record.outcome = "refused"
            await exchange.refuse(describe_failure(error, record.id))
        finally:
            route = scope.get("route")
            if record.outcome != "refused":
                record.route = str(getattr(route, "path", "unmatched"))

    # --- before the route ---

    def _is_preflight(self, exchange: Exchange) -> bool:
        """Checks what holds for preflights too; they carry no key."""
        scope, headers = exchange.scope, exchange.headers
        if not scope["path"].startswith("/"):
            raise APIError(400, "the request's target has to be a path", code="bad_target")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise APIError(400, "a request has a Content-Length or a Transfer-Encoding, not both", code="bad_framing")
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not host_is_allowed(hosts[0], self.hosts):
            raise APIError(
                403,
                "this server does not answer for that Host; start it with --allowed-host NAME if it should",
                code="host_not_allowed",
            )
        origins = headers.get("origin", [])
        if not origins:
            return False
        if len(origins) > 1 or not origin_is_allowed(origins[0], hosts[0], scope["scheme"], self.origins):
            raise APIError(
                403,
                "web pages of that Origin may not use this server; start it with --cors-origin ORIGIN if they should",
                code="origin_not_allowed",
            )
        exchange.cross_origin = origins[0] if origins[0] in self.origins else None
        return scope["method"] == "OPTIONS" and "access-control-request-method" in headers

    def _check(self, exchange: Exchange) -> None:
        scope, headers, record = exchange.scope, exchange.headers, exchange.record
        if self.settings.api_keys and scope["path"] not in OPEN_PATHS:
            record.owner = self._check_key(headers.get("authorization", []))
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.settings.max_header_bytes:
            raise APIError(
                431, f"the headers are longer than {self.settings.max_header_bytes} bytes", code="headers_too_large"
            )
        if self.traffic.draining and scope["path"] not in _WHILE_DRAINING:
            raise server_closing()
        if scope["method"] == "POST" and self.engines:
            self._check_room()
        if exchange.declared_bytes > self.settings.max_body_bytes:
            raise too_large(self.settings.max_body_bytes)

    def _check_key(self, presented: Sequence[str]) -> str:
        scheme, _, key = presented[0].partition(" ") if len(presented) == 1 else ("", "", "")
        found = matching_key(self.settings.api_keys, key.encode("latin-1"))
        if found is None or scheme != "Bearer":
            raise APIError(
                401,
                "this server needs an API key: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found.owner

    def _check_room(self) -> None:
        full: APIError | None = None
        for engine in self.engines:
            try:
                engine.check_room(1)
                return
            except QueueFullError as error:
                full = describe_failure(error)
        if full is not None:
            raise full

    async def _read_body(self, exchange: Exchange, buffer: Buffer) -> bytes | None:
        """The whole body; None if the client left before its end."""

        async def read() -> bytes | None:
            while True:
                message = await exchange.receive()
                if message["type"] == "http.disconnect":
                    return None
                buffer.add(message.get("body", b""), self.settings.max_body_bytes)
                if not message.get("more_body", False):
                    exchange.body_is_read = True
                    return buffer.whole()

        try:
            return await asyncio.wait_for(read(), self.settings.body_seconds)
        except asyncio.TimeoutError:
            raise APIError(
                408, f"the body did not arrive within {self.settings.body_seconds:g} seconds", code="body_timeout"
            ) from None

    # --- the route ---

    async def _run(self, exchange: Exchange, body: bytes) -> None:
        record = exchange.record
        route = asyncio.create_task(self.app(exchange.scope, exchange.replay(body), exchange.send))
        gone = asyncio.create_task(_disconnection(exchange.receive))
        try:
            ended = await self._watch(record, route, gone)
            if route.done():
                await self._conclude(exchange, route)
                return
            route.cancel()
            await asyncio.wait({route}, timeout=_CANCEL_SECONDS)
            if ended is None:
                record.outcome = "aborted"
                record.status = record.status or 499
            else:
                record.outcome = ended.code or "ended"
                await exchange.fail(ended)
        finally:
            for task in (route, gone):
                task.cancel()
            await asyncio.wait({route, gone}, timeout=_CANCEL_SECONDS)

    async def _watch(self, record: Record, route: asyncio.Task[None], gone: asyncio.Task[None]) -> APIError | None:
        """Waits until the route is done or has to end: with an error to tell, or None if nobody is there to be told."""
        assert record.end_early is not None
        settings = self.settings
        while True:
            limit = settings.request_seconds - record.seconds
            if not record.pieces:
                limit = min(limit, max(settings.waiting_seconds - record.seconds, 0.05 if not record.waits else 0.0))
            # Before its first piece a request is looked at again: only then is it known whether it waits for one.
            ends: set[asyncio.Future[Any]] = {route, gone, record.end_early}
            done, _ = await asyncio.wait(ends, timeout=max(limit, 0.0), return_when=asyncio.FIRST_COMPLETED)
            if route in done or gone in done:
                return None
            if record.end_early in done:
                return record.end_early.result()
            if record.seconds >= settings.request_seconds:
                about = f"the answer took longer than {settings.request_seconds:g} seconds"
                return APIError(504, about, code="request_timeout")
            if record.waits and record.seconds >= settings.waiting_seconds:
                about = f"no answer began within {settings.waiting_seconds:g} seconds"
                return APIError(503, about, code="waiting_timeout", headers=retry_after(5))

    async def _conclude(self, exchange: Exchange, route: asyncio.Task[None]) -> None:
        error: BaseException | None = asyncio.CancelledError() if route.cancelled() else route.exception()
        while inner := getattr(error, "exceptions", None):  # one of a group: of a stream's own tasks
            error = inner[0]
        if error is None:
            return
        told = describe_failure(error, exchange.record.id)
        if told.status >= 500 and not isinstance(error, APIError):
            exchange.record.outcome = "failed"
            self.journal.write({"event": "failure", "id": exchange.record.id, **describe_error(error)})
        await exchange.fail(told)


def _is_name(host: str) -> bool:
    return not is_loopback(host) and any(letter.isalpha() for letter in host) and ":" not in host

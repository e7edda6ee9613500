"""Whether the server lives, whether it can answer, and figures for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from glmkit.errors import MissingDependencyError
from glmkit.serve.failures import APIError, retry_after
from glmkit.serve.settings import Settings
from glmkit.serve.traffic import Record

if TYPE_CHECKING:  # the engine brings torch, and the port has to answer before that is imported
    from glmkit.engine.scheduler import BatchEngine, EngineState

_FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_SECONDS = (0.005, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


def add_health(app: FastAPI, settings: Settings, engines: Mapping[str, BatchEngine] | None) -> None:
    """Adds `/live`, `/ready`, `/health` and `/metrics`.

    Args:
        app: The application.
        settings: How long an engine may make no progress.
        engines: What answers, by its name; None while nothing is loaded.
    """
    meters = app.state.meters = Meters(engines or {})

    def reason() -> str | None:
        traffic = getattr(app.state, "traffic", None)
        if engines is None:
            return "the model is being loaded"
        if traffic is not None and traffic.draining:
            return "the server is closing"
        return next(filter(None, (why_not_ready(engine.state(), settings) for engine in engines.values())), None)

    async def live() -> Response:
        return Response()

    async def health() -> Response:
        return Response(status_code=200 if reason() is None else 503)

    async def ready() -> Response:
        why = reason()
        return JSONResponse({"ready": why is None, "reason": why}, 200 if why is None else 503)

    async def metrics() -> Response:
        text, kind = await asyncio.to_thread(meters.text)
        return Response(text, media_type=kind)

    for path, route in {"/live": live, "/health": health, "/ready": ready}.items():
        app.add_api_route(path, route, methods=["GET"], tags=["health"], response_class=Response)
        app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False, response_class=Response)
    app.add_api_route("/metrics", metrics, methods=["GET"], tags=["health"], response_class=Response)


def why_not_ready(state: EngineState, settings: Settings) -> str | None:
    """Says why an engine cannot be counted on.

    What counts is progress, not output: a long prompt is read in parts, and each part is progress. A model that reads
    whole prompts in one call (ChatGLM-6B, GLM) makes none in between; there `Settings.stall_seconds` has to be longer
    than its longest prompt takes.

    Args:
        state: Its state.
        settings: Has `stall_seconds`.

    Returns:
        The reason, or None if it works.
    """
    if state.broken is not None:
        return "the engine broke; start the server again"
    if state.busy and time.monotonic() - state.last_progress > settings.stall_seconds:
        return f"the engine has work and made no progress for {settings.stall_seconds:g} seconds"
    return None


class Meters:
    """Figures of one application, in a registry of its own. Labels are routes, statuses, outcomes and served names.

    Args:
        engines: What answers, by its name.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self, engines: Mapping[str, BatchEngine]) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise MissingDependencyError("prometheus-client", "serve") from None
        self._prometheus: Any = prometheus
        self._registry = registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "glmkit_http_requests",
            "Requests that are over",
            ["method", "route", "status", "outcome"],
            registry=registry,
        )
        self._seconds = prometheus.Histogram(
            "glmkit_http_request_seconds",
            "From a request's head to its end",
            ["route"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._first = prometheus.Histogram(
            "glmkit_first_token_seconds",
            "From a request's head to the first piece of its answer",
            buckets=_FIRST_SECONDS,
            registry=registry,
        )
        self._gaps = prometheus.Histogram(
            "glmkit_inter_token_seconds",
            "From one piece of an answer to the next",
            buckets=_GAP_SECONDS,
            registry=registry,
        )
        registry.register(_EngineFigures(engines))

    def piece(self, seconds: float, first: bool) -> None:
        """Counts a piece of an answer.

        Args:
            seconds: Since the request came or the last piece.
            first: Whether it is the first.
        """
        (self._first if first else self._gaps).observe(seconds)

    def end(self, record: Record) -> None:
        """Counts a request that is over.

        Args:
            record: The request.
        """
        method = record.method if record.method in _METHODS else "other"
        self._requests.labels(method, record.route, str(record.status), record.outcome).inc()
        self._seconds.labels(record.route).observe(record.seconds)

    def text(self) -> tuple[bytes, str]:
        """What Prometheus reads.

        Returns:
            The text and its media type.
        """
        return self._prometheus.generate_latest(self._registry), self._prometheus.CONTENT_TYPE_LATEST


class _EngineFigures:
    """An engine's counts at one moment: started = finished + aborted + failed + running + prefilling + waiting."""

    _COUNTS = ("started", "finished", "aborted", "failed", "prompt_tokens", "generated_tokens", "prefix_hit_tokens")
    _LEVELS = (
        "running",
        "waiting",
        "prefilling",
        "cache_tokens_used",
        "cache_tokens_idle",
        "cache_tokens_total",
        "tokens_per_second",
    )

    def __init__(self, engines: Mapping[str, BatchEngine]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        states = {name: engine.state() for name, engine in self._engines.items()}
        for names, kind in ((self._COUNTS, CounterMetricFamily), (self._LEVELS, GaugeMetricFamily)):
            for name in names:
                family = kind(f"glmkit_engine_{name}", f"Engine: {name.replace('_', ' ')}", labels=["model"])
                for model, state in states.items():
                    family.add_metric([model], getattr(state, name))
                yield family

    def describe(self) -> Iterable[Any]:
        return ()


def loading_app(settings: Settings) -> FastAPI:
    """What answers while the model is loaded: the health routes, and 503 for everything else.

    Args:
        settings: Keys and limits hold already.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_health(app, settings, None)

    async def wait(request: Request) -> Response:
        raise APIError(503, "the model is being loaded", code="loading", headers=retry_after(5))

    app.add_api_route("/{path:path}", wait, methods=["GET", "POST", "DELETE", "HEAD"])
    return app

"""Hundreds of requests with random cancels, straight to the engine and over HTTP: none is lost and nothing hangs.

`python bench/serving.py --soak 10000` is the long form; its counts and checks are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import glmkit
from glmkit.chat.following import Served, serve
from glmkit.engine.sampling import SamplingOptions
from glmkit.engine.scheduler import BatchEngine

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("the measurements are not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from serving_server import Server  # noqa: E402
from serving_soak import soak, soak_over_http  # noqa: E402

# Growth per 1,000 requests: a cache that is not freed is 0.8 MB a request. The long form reports the slope itself.
MOST_MEGABYTES = 150.0


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = serve(glmkit.load("glm-nano"), "nano", max_running=8, max_waiting=12)
    yield served
    served.close()


def test_requests_straight_to_the_engine(served: Served) -> None:
    found = soak(served.engine, served.tokenizer, 200, longest=8)
    assert (found.answered + found.cancelled, found.lost) == (200, 0)
    assert found.cancelled > 10
    assert found.refused > 0  # 24 readers, 20 places: the queue was full at times
    assert found.slope_megabytes < MOST_MEGABYTES


def test_requests_over_http(served: Served) -> None:
    with Server(served) as server:
        found = soak_over_http(server.url, served.engine, "nano", 100, longest=8)
    assert (found.answered + found.cancelled, found.lost) == (100, 0)
    assert found.cancelled > 2
    assert found.slope_megabytes < MOST_MEGABYTES


def test_a_lost_request_is_noticed(served: Served) -> None:
    """The soak's own check: an engine that took one request more than were sent does not pass."""
    with pytest.raises(RuntimeError, match="of which the engine took 17"):
        soak(_Shared(served.engine), served.tokenizer, 16, longest=3)  # type: ignore[arg-type]


class _Shared:
    """An engine that somebody else asks something, once the soak has begun."""

    def __init__(self, engine: BatchEngine) -> None:
        self._engine, self._asked = engine, False

    def __getattr__(self, name: str) -> Any:
        if name == "stream" and not self._asked:
            self._asked = True
            list(self._engine.stream([64, 65], SamplingOptions(temperature=0.0), stop_ids=(), max_new_tokens=2))
        return getattr(self._engine, name)

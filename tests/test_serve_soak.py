"""Hundreds of requests with random cancels, straight to the engine and over HTTP: none is lost and nothing hangs.

`python bench/serving.py --soak 10000` is the long form; its counts and checks are the same.
"""

from __future__ import annotations

import json
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

from serving_faults import Clients, Watched, soak_with_faults  # noqa: E402
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
    found = soak(served.engine, served.tokenizer, 120, longest=8)
    assert (found.answered + found.cancelled, found.lost) == (120, 0)
    assert found.cancelled > 1
    assert found.refused > 0  # 24 readers, 20 places: the queue was full at times
    assert found.slope_megabytes < MOST_MEGABYTES


def test_requests_over_http(served: Served) -> None:
    with Server(served) as server:
        found = soak_over_http(server.url, served.engine, "nano", 60, longest=8)
    assert (found.answered + found.cancelled, found.lost) == (60, 0)
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


@pytest.mark.slow
@pytest.mark.parametrize("kill_seconds", [None, 8.0])
def test_a_server_process_among_faulty_clients(tmp_path: Path, kill_seconds: float | None) -> None:
    """`python bench/serving.py --soak-seconds 3600` is the long form."""
    found = soak_with_faults(tmp_path, 30.0, kill_seconds=kill_seconds)
    assert found.problems == []
    assert found.ends["answered"] > 50
    assert found.ends["through a proxy: cut"] > 5
    assert (found.kills > 0) is (kill_seconds is not None)
    assert (tmp_path / "curve.jsonl").read_text()


@pytest.mark.parametrize(
    ("came", "problem"),
    [
        (b"HTTP/1.1 500 \r\n\r\n{}", "500"),
        (b"", "b''"),
        (b"HTTP/1.1 429 \r\n\r\n{}", "429"),  # without Retry-After
        (b"HTTP/1.1 200 \r\n\r\ndata: {}\n\n", "200"),  # a stream without its end
    ],
)
def test_what_should_not_be_is_noticed(came: bytes, problem: str) -> None:
    watched = Watched()
    clients = Clients(None, [], watched, 0.0, 1)  # type: ignore[arg-type]
    clients._judge("answered", {"stream": True}, came, frozenset({200}))
    assert len(watched.problems) == 1
    assert problem in watched.problems[0]


def test_a_greedy_answer_that_changes_is_noticed() -> None:
    watched = Watched()
    clients = Clients(None, [], watched, 0.0, 1)  # type: ignore[arg-type]
    body = {"stream": False, "temperature": 0.0, "messages": [{"role": "user", "content": "a"}]}
    for text in ("红色的裙", "红色", "红色的裙子", "蓝色"):
        answer = {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}
        clients._judge("answered", body, b"HTTP/1.1 200 \r\n\r\n" + json.dumps(answer).encode(), frozenset({200}))
    assert watched.problems == ["a: '红色的裙子' became '蓝色'"]
    assert watched.over == 4

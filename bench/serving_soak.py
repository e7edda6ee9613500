"""Thousands of requests with random cancels: none may be lost, nothing may hang, and memory may not grow.

What is counted: each request ends in exactly one way (answered, cancelled, refused because the queue was full and asked
again later), the engine's own counts agree, and at the end no row, no waiting request and no busy cache is left. The
slope is a straight line through the resident memory after garbage collection, over the last three quarters of all
requests, when caches and allocators have found their size.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import numpy as np

from glmkit.bench.measure import memory_bytes
from glmkit.chat.messages import to_messages
from glmkit.chat.templates import prompt_ids
from glmkit.engine.sampling import SamplingOptions
from glmkit.engine.scheduler import BatchEngine
from glmkit.errors import QueueFullError

QUESTIONS = (
    "你好，你是谁？",
    "7加8等于多少？",
    "What is the capital of France?",
    "类型#裙*颜色#蓝色*风格#清新*材质#雪纺*裙长#长裙",
    "类型#裤*版型#宽松*颜色#黑色*裤长#九分裤",
    "Thank you!",
)
_SYSTEM = "Answer the questions of the user as well as you can."
_CANCELLED = 0.3  # of all requests, after a random number of tokens
_SAMPLES = (8, 40)  # fewest and most looks at memory; each collects garbage, which takes a fifth of a second
_WAIT_SECONDS = 120.0  # for one answer; longer is a hang
_READERS = 24  # requests at the same time
_AGAIN_SECONDS = 0.1  # after a full queue


@dataclass(frozen=True)
class Soak:
    """What came of it.

    Args:
        requests: How many were sent and taken.
        answered: Ended by themselves.
        cancelled: Ended because they were told to.
        refused: How often the queue was full; such a request is sent again.
        lost: Neither answered nor cancelled, or an error.
        seconds: How long it took.
        slope_megabytes: Growth of resident memory in 10^6 bytes per 1,000 requests, over the last three quarters.
        peak_megabytes: Most resident memory.
    """

    requests: int
    answered: int
    cancelled: int
    refused: int
    lost: int
    seconds: float
    slope_megabytes: float
    peak_megabytes: float

    def __str__(self) -> str:
        return json.dumps(asdict(self))


class _Memory:
    """Resident memory as requests go by."""

    def __init__(self, count: int) -> None:
        self._every = max(1, count // min(max(_SAMPLES[0], count // 100), _SAMPLES[1]))
        self._count = count
        self._lock = threading.Lock()
        self._points: list[tuple[int, float]] = []

    def look(self, done: int) -> None:
        """Takes a sample if one is due."""
        if done % self._every == 0:
            with self._lock:
                gc.collect()
                self._points.append((done, memory_bytes("VmRSS") / 1e6))

    def figures(self) -> tuple[float, float]:
        """Slope per 1,000 requests, and peak."""
        late = [point for point in self._points if point[0] >= self._count / 4]
        slope = 1000 * float(np.polyfit(*zip(*late), 1)[0]) if len(late) > 2 else 0.0
        return slope, max(size for _, size in self._points)


def soak(engine: BatchEngine, tokenizer: Any, count: int, *, seed: int = 1, longest: int = 60) -> Soak:
    """Sends requests from many threads straight to an engine.

    Args:
        engine: It; nothing else may use it meanwhile.
        tokenizer: Of its model.
        count: Requests.
        seed: Of questions, options and cancels.
        longest: Most tokens of an answer.

    Returns:
        The counts.
    """
    before, started = engine.state(), time.monotonic()
    memory, ends, numbers, lock = _Memory(count), Counter[str](), iter(range(count)), threading.Lock()
    prompts = [
        prompt_ids(tokenizer, to_messages(question, system=system))
        for system in (None, _SYSTEM)
        for question in QUESTIONS
    ]

    def one(number: int) -> str:
        rng = random.Random(f"{seed} {number}")
        greedy = rng.random() < 0.5
        options = SamplingOptions(temperature=0.0 if greedy else 0.9, seed=number)
        stop_after = rng.randint(0, 20) if rng.random() < _CANCELLED else None
        while True:
            try:
                stream = engine.stream(
                    rng.choice(prompts),
                    options,
                    stop_ids=tokenizer.stop_ids,
                    max_new_tokens=rng.randint(1, longest),
                    owner=rng.choice(("", "one", "two")),
                )
                break
            except QueueFullError:
                with lock:
                    ends["refused"] += 1
                time.sleep(_AGAIN_SECONDS)
        if stop_after == 0:
            stream.cancel()  # perhaps before it began
        for place, step in enumerate(stream, 1):
            if place == stop_after:
                stream.cancel()
            if step.finish_reason is not None:
                return "cancelled" if step.finish_reason == "cancelled" else "answered"
        return "lost"

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                end = one(number)
            except Exception as error:
                end = f"lost: {error}"
            with lock:
                ends[end] += 1
                done = ends["answered"] + ends["cancelled"]
            memory.look(done)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(_READERS)]
    for thread in threads:
        thread.start()
    _wait(threads, lambda: engine.state().last_progress)
    return _sum_up(engine, before, ends, memory, count, started)


def _wait(threads: Sequence[threading.Thread], last_progress: Callable[[], float]) -> None:
    while any(thread.is_alive() for thread in threads):
        if time.monotonic() - last_progress() > _WAIT_SECONDS:
            raise RuntimeError(f"nothing has moved for {_WAIT_SECONDS:g} seconds")
        for thread in threads:
            thread.join(0.05)


def _sum_up(engine: BatchEngine, before: Any, ends: Counter[str], memory: _Memory, count: int, started: float) -> Soak:
    """Compares both sides' counts."""
    end = time.monotonic() + _WAIT_SECONDS
    while engine.state().busy and time.monotonic() < end:
        time.sleep(0.02)
    state = engine.state()
    problems = []
    if state.busy or state.running or state.waiting or state.prefilling or state.cache_tokens_used:
        problems.append(f"something is left: {state}")
    taken = state.started - before.started
    ended = state.finished + state.aborted + state.failed - before.finished - before.aborted - before.failed
    if taken != count or ended != count or state.failed != before.failed:
        problems.append(f"{count} requests, of which the engine took {taken} and ended {ended}: {state}")
    lost = count - ends["answered"] - ends["cancelled"]
    if lost:
        problems.append(f"{lost} requests lost: {dict(ends)}")
    if problems:
        raise RuntimeError("; ".join(problems))
    slope, peak = memory.figures()
    seconds = time.monotonic() - started
    return Soak(count, ends["answered"], ends["cancelled"], ends["refused"], lost, seconds, slope, peak)


def soak_over_http(url: str, engine: BatchEngine, model: str, count: int, *, seed: int = 1, longest: int = 60) -> Soak:
    """Sends requests over HTTP; those to be cancelled are left by closing the connection.

    Args:
        url: The server, which answers from `engine` in this process.
        engine: Nothing else may use it meanwhile.
        model: Its name.
        count: Requests.
        seed: Of questions, options and cancels.
        longest: Most tokens of an answer.

    Returns:
        The counts.
    """
    before, started = engine.state(), time.monotonic()
    memory, ends = _Memory(count), Counter[str]()
    asyncio.run(_ask_all(url, model, range(count), seed, longest, ends, memory))
    return _sum_up(engine, before, ends, memory, count, started)


async def _ask_all(
    url: str, model: str, numbers: Iterable[int], seed: int, longest: int, ends: Counter[str], memory: _Memory
) -> None:
    numbers = iter(numbers)
    async with httpx.AsyncClient(base_url=url, timeout=_WAIT_SECONDS, trust_env=False) as client:

        async def work() -> None:
            for number in numbers:
                try:
                    end = await _ask(client, model, random.Random(f"{seed} {number}"), longest, ends)
                except Exception as error:
                    end = f"lost: {type(error).__name__}: {error}"
                ends[end] += 1
                memory.look(ends["answered"] + ends["cancelled"])

        await asyncio.gather(*(work() for _ in range(_READERS)))


async def _ask(client: httpx.AsyncClient, model: str, rng: random.Random, longest: int, ends: Counter[str]) -> str:
    messages = [{"role": "user", "content": rng.choice(QUESTIONS)}]
    if rng.random() < 0.5:
        messages.insert(0, {"role": "system", "content": _SYSTEM})
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": rng.randint(1, longest),
        "temperature": rng.choice((0.0, 0.9)),
        "stream": rng.random() < 0.8,
    }
    leave_after = rng.randint(1, 20) if body["stream"] and rng.random() < _CANCELLED else None
    while True:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 429:
                ends["refused"] += 1
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            if response.status_code != 200:
                return f"lost: {response.status_code} {(await response.aread())[:200]!r}"
            if not body["stream"]:
                answer = json.loads(await response.aread())
                return "answered" if answer["choices"][0]["finish_reason"] else "lost"
            events = [""]
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    events.append(line)
                    if len(events) == leave_after:
                        return "cancelled"  # the connection is closed; an answer that was over by then is finished
            return "answered" if events[-1] == "data: [DONE]" else f"lost: {events[-1][:200]}"

"""A server in a process of its own under many clients for a given time, a share of which do it wrong.

Clients ask again and again, so that always the same number is in flight. A faulty request leaves in the middle, never
reads, sends what is no request, asks what cannot be answered, or comes through a proxy that delays, resets, cuts or
half-closes it. Every request has to end within the server's deadline and two seconds, with a status that is documented;
greedy answers have to be what they were the first time; the server's memory, descriptors and threads are looked at from
outside. With `kill_seconds` the server is killed and started again all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fault_proxy import KINDS, Fault, FaultProxy
from serving_soak import QUESTIONS

NAME = "soak"
ANSWER_SECONDS = 120.0  # the server's deadline
_GRACE_SECONDS = 2.0
_AGAIN_SECONDS = 0.1
_START_SECONDS = 120.0
_PROXIES = 8  # a proxy does one thing to all its connections at a time
_DOCUMENTED = frozenset({200, 400, 404, 408, 413, 415, 429, 503, 504})
_LONGEST = 48  # tokens of an answer

Ended = tuple[str, Any]


@dataclass
class Watched:
    """What was seen of the server while it worked.

    Args:
        points: (requests that are over, seconds, resident bytes, descriptors, threads).
        problems: Everything that should not have been, at most a hundred.
        ends: How requests ended.
        texts: Greedy answers by question.
    """

    points: list[tuple[int, float, int, int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    texts: dict[str, str] = field(default_factory=dict)

    def blame(self, problem: str) -> None:
        """Notes a problem."""
        self.ends["problems"] += 1
        if len(self.problems) < 100:
            self.problems.append(problem)

    @property
    def over(self) -> int:
        """How many requests have ended."""
        return self.ends.total() - self.ends["problems"] - self.ends["refused: full"] - self.ends["refused: not there"]


@dataclass(frozen=True)
class Found:
    """What came of it.

    Args:
        requests: That were sent and ended.
        seconds: How long it took.
        slope_megabytes: Growth of resident memory in 10^6 bytes per 1,000 requests, over the last three quarters of
            the time; 0 where the server is killed.
        descriptors: Of the quiet server, after minus before.
        threads: The same.
        kills: How often the server was killed.
        ends: How requests ended.
        problems: What should not have been.
    """

    requests: int
    seconds: float
    slope_megabytes: float
    descriptors: int
    threads: int
    kills: int
    ends: dict[str, int]
    problems: list[str]


class ServerProcess:
    """`glm serve glm-nano` in a process; its port stays the same when it is started again.

    Args:
        log: File for what it says.
        max_running: Answers at once.
        max_waiting: Places in the queue.
    """

    def __init__(self, log: Path, max_running: int, max_waiting: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one:
            self.port: int = one.getsockname()[1]
        self._log = log
        self._command = [
            sys.executable, "-c", "import glmkit_command; glmkit_command.main()", "serve", "glm-nano",
            "--name", NAME, "--port", str(self.port),
            "--max-running", str(max_running), "--max-waiting", str(max_waiting),
            "--request-timeout-seconds", str(ANSWER_SECONDS), "--waiting-timeout-seconds", str(ANSWER_SECONDS),
            "--drain-seconds", "5",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it may not answer yet."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=log)

    def look(self) -> tuple[int, int, int]:
        """Resident bytes, descriptors and threads."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        numbers = {name: int(re.findall(rf"^{name}:\s+(\d+)", status, re.M)[0]) for name in ("VmRSS", "Threads")}
        return numbers["VmRSS"] * 1024, len(os.listdir(f"/proc/{self.process.pid}/fd")), numbers["Threads"]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ends it by a signal; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)


async def send(port: int, data: bytes, leave_after_bytes: int | None = None) -> bytes:
    """Sends bytes and reads until the other side closes, or until enough has come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        came = bytearray()
        while leave_after_bytes is None or len(came) < leave_after_bytes:
            part = await reader.read(65536)
            if not part:
                break
            came += part
        return bytes(came)
    finally:
        writer.close()


def request(body: bytes | dict[str, Any], more: str = "", path: str = "/v1/chat/completions") -> bytes:
    """A request that wants no other after it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n{more}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def status_of(came: bytes) -> int:
    """The status of an answer; 0: there is none."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", came)
    return int(found[1]) if found else 0


class Clients:
    """Those who ask.

    Args:
        server: Whom.
        proxies: In front of it.
        watched: Where ends and problems are noted.
        faulty: Share of faulty requests, 0 to 1.
        seed: Of all choices.
    """

    def __init__(
        self, server: ServerProcess, proxies: list[FaultProxy], watched: Watched, faulty: float, seed: int
    ) -> None:
        self.server, self.proxies, self.watched, self.faulty = server, proxies, watched, faulty
        self.rng = random.Random(seed)
        self.waiting: dict[asyncio.Task[None], float] = {}  # who waits for an answer, since when
        self.down = False  # the server was killed, or is being loaded
        self.begun = 0
        self._bad: dict[str, Callable[[], tuple[bytes, frozenset[int]]]] = {
            "no JSON": lambda: (request(b'{"messages": ['), frozenset({400})),
            "wrong field": lambda: (request({**self._good(), "temperature": "warm"}), frozenset({400})),
            "unknown model": lambda: (request({**self._good(), "model": "none"}), frozenset({404})),
            "too long": lambda: (request({"messages": [{"role": "user", "content": "长" * 20000}]}), frozenset({400})),
            "too large": lambda: (request(b"x" * 9 * 2**20), frozenset({413, 0})),
            "two framings": lambda: (request(self._good(), "Transfer-Encoding: chunked\r\n"), frozenset({400})),
            "no HTTP": lambda: (self.rng.randbytes(200) + b"\r\n\r\n", frozenset({400, 0})),
            "no such route": lambda: (request(self._good(), path="/v1/answers"), frozenset({404})),
        }

    async def work(self, until: float) -> None:
        """One client: asks until a time."""
        task = asyncio.current_task()
        assert task is not None
        while time.monotonic() < until:
            self.waiting[task] = time.monotonic()
            self.begun += 1
            try:
                await asyncio.wait_for(self._once(), ANSWER_SECONDS + _GRACE_SECONDS)
            except asyncio.TimeoutError:
                self.watched.blame(f"a request hung for {ANSWER_SECONDS + _GRACE_SECONDS:g} seconds")
            except OSError as error:  # also from a proxy that did what it should
                self.watched.ends["refused: not there"] += 1
                if not self.down:
                    self.watched.blame(f"the server did not answer: {error}")
                await asyncio.sleep(_AGAIN_SECONDS)
            finally:
                self.waiting.pop(task, None)

    async def _once(self) -> None:
        if self.rng.random() >= self.faulty:
            await self._ask()
            return
        kind = self.rng.choice(("leave", "leave", "leave at once", "never reads", "bad", "bad", "bad", *KINDS))
        if kind == "bad":
            await self._ask_badly()
        elif kind in KINDS:
            await self._ask_through_a_proxy()
        else:
            await self._leave(kind)

    def _good(self) -> dict[str, Any]:
        return {
            "model": NAME,
            "messages": [{"role": "user", "content": self.rng.choice(QUESTIONS)}],
            "max_tokens": self.rng.randint(1, _LONGEST),
            "temperature": self.rng.choice((0.0, 0.9)),
            "stream": self.rng.random() < 0.5,
            "n": 3 if self.rng.random() < 0.05 else 1,
        }

    async def _ask(self) -> None:
        body = self._good()
        self._judge("answered", body, await send(self.server.port, request(body)), frozenset({200}))

    async def _ask_badly(self) -> None:
        kind = self.rng.choice(list(self._bad))
        data, expected = self._bad[kind]()
        try:
            came = await send(self.server.port, data)
        except ConnectionResetError:  # a server that has refused does not read on
            came = b""
        self._judge(f"refused: {kind}", {}, came, expected)

    async def _leave(self, kind: str) -> None:
        body = {**self._good(), "stream": True, "max_tokens": _LONGEST}
        if kind == "never reads":
            _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(request(body))
            await asyncio.sleep(self.rng.random())
            writer.close()
        else:
            await send(self.server.port, request(body), self.rng.randint(1, 3000) if kind == "leave" else 0)
        self.watched.ends[kind] += 1

    async def _ask_through_a_proxy(self) -> None:
        proxy = self.rng.choice(self.proxies)
        body, kind, answer = self._good(), self.rng.choice(KINDS), self.rng.random() < 0.5
        proxy.next_fault = Fault(kind, self.rng.randint(0, 800), answer, self.rng.random())
        try:
            came = await send(proxy.port, request(body))
        except OSError:
            came = b""
        status = status_of(came)
        if status not in _DOCUMENTED | {0}:
            self.watched.blame(f"{kind}: {came[:300]!r}")
        self.watched.ends[f"through a proxy: {'cut' if status in (0, 400, 408) else 'answered'}"] += 1

    def _judge(self, end: str, body: dict[str, Any], came: bytes, expected: frozenset[int]) -> None:
        status = status_of(came)
        if status in expected and (status != 200 or self._is_whole(body, came)):
            self.watched.ends[end] += 1
        elif self.down and status in (0, 200, 503):
            self.watched.ends["refused: not there"] += 1
        elif status == 429 and b"retry-after:" in came.lower():
            self.watched.ends["refused: full"] += 1
        else:
            self.watched.blame(f"{end}: {came[:300]!r}")
            self.watched.ends[end] += 1

    def _is_whole(self, body: dict[str, Any], came: bytes) -> bool:
        """Whether an answer is all there; a greedy one has to begin or end as its longest did."""
        _, _, text = came.partition(b"\r\n\r\n")
        if body["stream"]:
            return b"data: [DONE]" in text[-64:]
        answer = json.loads(text)
        if body["temperature"] == 0.0:
            question = body["messages"][0]["content"]
            for choice in answer["choices"]:
                said, known = choice["message"]["content"], self.watched.texts.get(question, "")
                if not (known.startswith(said) or said.startswith(known)):
                    self.watched.blame(f"{question}: {known!r} became {said!r}")
                self.watched.texts[question] = max(known, said, key=len)
        return all(choice["finish_reason"] for choice in answer["choices"])


async def _wait_until_ready(server: ServerProcess) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and server.process is not None and server.process.poll() is None:
        with contextlib.suppress(OSError):
            if status_of(await _get(server.port, "/health")) == 200:
                return
        await asyncio.sleep(0.1)
    raise RuntimeError("the server did not get ready")


async def _get(port: int, path: str) -> bytes:
    return await send(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())


def _counts(metrics: bytes) -> dict[str, float]:
    found = re.findall(rb"^glmkit_engine_(\w+?)(?:_total)?\{[^}]*\} ([0-9.e+]+)", metrics, re.M)
    return {name.decode(): float(value) for name, value in found}


async def _watch(server: ServerProcess, clients: Clients, watched: Watched, until: float, every: float) -> None:
    """Looks at the server from outside, and whether its counts add up."""
    began = time.monotonic()
    while (now := time.monotonic()) < until:
        await asyncio.sleep(min(every, until - now))
        if clients.down:
            continue
        with contextlib.suppress(OSError):
            counts = _counts(await _get(server.port, "/metrics"))
            watched.points.append((watched.over, time.monotonic() - began, *server.look()))
            parts = sum(counts[name] for name in ("finished", "aborted", "failed", "running", "prefilling", "waiting"))
            if counts["started"] != parts and not clients.down:
                watched.blame(f"the engine's counts do not add up: {counts}")


async def _kill(server: ServerProcess, clients: Clients, watched: Watched, until: float, every: float) -> int:
    """Kills and starts the server all the time; whoever waited has to be told within two seconds."""
    kills = 0
    while time.monotonic() + 2 * every < until:
        await asyncio.sleep(every)
        clients.down, at = True, time.monotonic()
        await asyncio.to_thread(server.end, signal.SIGKILL)
        await asyncio.sleep(_GRACE_SECONDS)
        hung = sum(since < at for since in clients.waiting.values())
        if hung:
            watched.blame(f"{hung} requests did not end within {_GRACE_SECONDS:g} seconds of a kill")
        server.start()
        await _wait_until_ready(server)
        clients.down, kills = False, kills + 1
    return kills


async def _quiet(server: ServerProcess) -> tuple[int, int, int]:
    """The server when nothing runs and connections are closed."""
    for _ in range(100):
        counts = _counts(await _get(server.port, "/metrics"))
        if counts["running"] + counts["waiting"] + counts["prefilling"] == 0:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    return server.look()


async def _soak(
    server: ServerProcess, watched: Watched, seconds: float, in_flight: int, faulty: float, kill_seconds: float | None
) -> Found:
    server.start()
    async with contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(FaultProxy(server.port)) for _ in range(_PROXIES)]
        clients = Clients(server, proxies, watched, faulty, seed=1)
        await _wait_until_ready(server)
        warm = time.monotonic() + min(10.0, seconds / 4)  # threads of a pool begin with the first requests
        await asyncio.gather(*(clients.work(warm) for _ in range(in_flight)))
        before, warmed = await _quiet(server), watched.over
        began = time.monotonic()
        until = began + seconds
        tasks: list[Any] = [clients.work(until) for _ in range(in_flight)]
        tasks.append(_watch(server, clients, watched, until, max(1.0, seconds / 360)))
        if kill_seconds:
            tasks.append(_kill(server, clients, watched, until, kill_seconds))
        results = await asyncio.gather(*tasks)
        after = await _quiet(server)
    late = [(over, size / 1e6) for over, at, size, _, _ in watched.points if at >= seconds / 4]
    slope = 1000 * float(np.polyfit(*zip(*late), 1)[0]) if len(late) > 2 and not kill_seconds else 0.0
    moved = [after[place] - before[place] for place in (1, 2)]
    if not kill_seconds and max(map(abs, moved)) > 2:
        watched.blame(f"descriptors and threads of the quiet server changed by {moved}")
    kills = results[-1] if kill_seconds else 0
    return Found(watched.over - warmed, time.monotonic() - began, slope, *moved, kills, dict(watched.ends),
                 watched.problems)  # fmt: skip


def soak_with_faults(
    folder: Path,
    seconds: float,
    *,
    in_flight: int = 64,
    faulty: float = 0.3,
    kill_seconds: float | None = None,
    max_running: int = 32,
) -> Found:
    """Lets clients ask a server for a while.

    Args:
        folder: Takes `server.log`, `curve.jsonl` and `found.json`.
        seconds: How long.
        in_flight: Clients; each asks again as soon as it has its answer.
        faulty: Share of faulty requests, 0 to 1.
        kill_seconds: The server is killed and started again so often; None: never.
        max_running: Answers that the server computes at once.

    Returns:
        What came of it; `problems` is empty if all went well.

    Raises:
        RuntimeError: The server did not get ready.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server, watched = ServerProcess(folder / "server.log", max_running, in_flight // 2), Watched()
    try:
        found = asyncio.run(_soak(server, watched, seconds, in_flight, faulty, kill_seconds))
        code = server.end()
        if code != 0:
            watched.blame(f"the server ended with code {code}")
    finally:
        if server.process is not None and server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        names = ("requests", "seconds", "resident_bytes", "descriptors", "threads")
        lines = (json.dumps(dict(zip(names, point, strict=True))) for point in watched.points)
        (folder / "curve.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "found.json").write_text(json.dumps(asdict(found), ensure_ascii=False, indent=1))
    return found

"""S-34, S-16 to S-18, S-24: networks that delay, reset and cut, processes that are stopped, clocks that jump."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from glmkit.serve.settings import Settings
from serving import Listening, fake_app
from test_serve_faults import PROCESS, Process, is_free, post, until

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("the proxy is not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from fault_proxy import KINDS, Fault, FaultProxy  # noqa: E402

CLOSE = b"Connection: close\r\n"


async def talk(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    came = bytearray()
    try:
        writer.write(data)
        while part := await reader.read(65536):
            came += part
    except ConnectionError:
        pass
    finally:
        writer.close()
    return bytes(came)


@pytest.mark.parametrize("answer", [False, True], ids=["request", "answer"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_network_does_ends_one_request_and_no_other(kind: Any, answer: bool) -> None:
    """Twenty requests, each with the fault at another byte."""
    settings = Settings(header_seconds=5.0, body_seconds=5.0, idle_seconds=5.0)
    app = fake_app(settings)
    data = post("/echo", b"x" * 500, CLOSE)

    async def scenario() -> list[bytes]:
        async with Listening(app, settings) as server, FaultProxy(server.port) as proxy:
            began = time.monotonic()
            asked = []
            for place in range(20):
                proxy.next_fault = Fault(kind, place * (16 if answer else 32), answer, 0.1)
                asked.append(asyncio.create_task(talk(proxy.port, data)))
                await until(lambda place=place: len(proxy._pairs) + sum(one.done() for one in asked) > place)
            direct = await talk(server.port, data)
            assert b'{"bytes":500}' in direct
            got = await asyncio.wait_for(asyncio.gather(*asked), 30)
            assert time.monotonic() - began < (20 if kind == "slow" else 5)
            await until(lambda: app.state.traffic.in_flight == 0 and server.connections == 0)
            assert app.state.traffic._buffered_bytes == 0
            assert proxy.happened[kind] >= 17  # of short answers the last bytes are not reached
            assert b'{"bytes":500}' in await talk(server.port, data)
            return got

    got = asyncio.run(scenario())
    whole = [b'{"bytes":500}' in one for one in got]
    if kind in ("delay", "slow"):
        assert all(whole)
    elif not answer:
        assert not any(whole[:17])
    for one in got:
        assert not one or one[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 408") or len(one) < 12


@pytest.mark.parametrize("kind", ["reset", "truncate", "half-close"])
def test_a_stream_that_is_cut_in_the_network_is_ended(kind: Any) -> None:
    app = fake_app(Settings())
    chance = random.Random(kind)

    async def scenario() -> None:
        async with Listening(app, Settings()) as server, FaultProxy(server.port) as proxy:
            asked = []
            for number in range(6):  # as many as the engine has places
                proxy.next_fault = Fault(kind, chance.randint(300, 900), answer=True)
                asked.append(asyncio.create_task(talk(proxy.port, post("/stream"))))
                await until(lambda number=number: len(proxy._pairs) + sum(one.done() for one in asked) > number)
            await asyncio.wait_for(asyncio.gather(*asked), 10)
            await until(lambda: app.state.traffic.in_flight == 0 and server.connections == 0)
            await until(lambda: app.state.cancelled == app.state.begun)
            assert proxy.happened[kind] == 6
            assert app.state.begun >= 3  # one that is cut at its head need not begin

    asyncio.run(scenario())


def test_without_a_fault_the_proxy_changes_nothing() -> None:
    app = fake_app(Settings())

    async def scenario() -> None:
        async with Listening(app, Settings()) as server, FaultProxy(server.port) as proxy:
            data = post("/echo", b"x" * 200_000, CLOSE)
            direct, passed = await talk(server.port, data), await talk(proxy.port, data)
            assert passed.partition(b"\r\n\r\n")[2] == direct.partition(b"\r\n\r\n")[2]
            assert proxy.happened.total() == 0

    asyncio.run(scenario())


# --- processes ---


def test_a_server_that_was_stopped_goes_on() -> None:
    """S-18: the engine is a thread, so SIGSTOP stops `/live` too; afterwards requests go on where they were."""
    server = Process(drain=0.5)
    server.wait_until_ready()
    pieces: list[float] = []

    def read() -> None:
        with httpx.stream("POST", server.url + "/stream", trust_env=False, timeout=30) as answer:
            for _ in answer.iter_bytes():
                pieces.append(time.monotonic())
                if len(pieces) > 10_000:
                    return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while len(pieces) < 5:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    stopped = len(pieces)
    with pytest.raises(httpx.TimeoutException):
        httpx.get(server.url + "/live", trust_env=False, timeout=0.5)
    assert len(pieces) == stopped
    server.process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    for path in ("/live", "/ready"):
        assert httpx.get(server.url + path, trust_env=False, timeout=10).status_code == 200
    while len(pieces) < stopped + 5 and time.monotonic() - began < 10:
        time.sleep(0.01)
    assert len(pieces) >= stopped + 5
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_a_killed_server_closes_its_connections_and_frees_its_port() -> None:
    """S-16: there is no engine process beside it that could stay, and clients are told at once."""
    server = Process()
    server.wait_until_ready()
    threads = [server.ask("/wait") for _ in range(3)]
    time.sleep(0.3)
    killed = time.monotonic()
    server.process.kill()
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - killed < 2
    assert len(server.answers) == 3
    assert all(isinstance(answer, httpx.TransportError) for answer in server.answers)
    server.process.communicate()
    assert is_free(server.port)
    assert not children_of(server.process.pid)


def test_a_server_outlives_the_shell_that_began_it_and_ends_when_told() -> None:
    """S-17: killing the parent leaves one process, which is the whole server and can be ended by its signal."""
    code = PROCESS.format(tests=str(Path(__file__).parent), loading=0, drain=1, closing=0, settings={})
    shell = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & echo $! >&2; wait', sys.executable, code], stderr=subprocess.PIPE, text=True
    )
    assert shell.stderr is not None
    number, url = int(shell.stderr.readline()), json.loads(shell.stderr.readline())["url"]
    shell.kill()
    shell.wait()
    try:
        assert httpx.get(url + "/live", trust_env=False, timeout=10).status_code == 200
        assert not children_of(number)
    finally:
        os.kill(number, signal.SIGTERM)
    end = time.monotonic() + 5
    while Path(f"/proc/{number}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{number}").exists() or is_zombie(number)
    assert is_free(int(url.rsplit(":", 1)[1]))
    shell.stderr.close()


def is_zombie(number: int) -> bool:
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def children_of(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(place.parent.name))
    return found


def test_a_clock_that_jumps_changes_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """S-24: an hour back in the middle of a request; it ends when it should, and so does the next."""
    settings = Settings(waiting_seconds=0.6)
    app = fake_app(settings)
    wall = time.time

    async def scenario() -> None:
        async with Listening(app, settings) as server:
            began = time.monotonic()
            asked = asyncio.create_task(talk(server.port, post("/wait", more=CLOSE)))
            await until(lambda: app.state.begun == 1)
            monkeypatch.setattr(time, "time", lambda: wall() - 3600)
            assert b" 503 " in await asked
            assert 0.5 < time.monotonic() - began < 5
            monkeypatch.setattr(time, "time", lambda: wall() + 3600)
            assert b'{"bytes":2}' in await talk(server.port, post("/echo", more=CLOSE))

    asyncio.run(scenario())

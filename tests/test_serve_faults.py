"""Clients that leave, stall or flood, and signals: whatever happens, places are freed and others are served."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

import glmkit
from glmkit.chat.following import Served, serve
from glmkit.serve.app import create_app
from glmkit.serve.health import why_not_ready
from glmkit.serve.settings import Settings
from serving import FakeEngine, Listening, ask, client, fake_app, quiet

HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
UNENDING = {str(token): -100 for token in (2, 6140, 6141, 6142, 6143)}  # what ends an answer of glm-nano
LONG = {"model": "glm-nano", "prompt": "今天", "max_tokens": 400, "temperature": 0, "logit_bias": UNENDING}


def post(path: str, body: bytes = b"{}", more: bytes = b"") -> bytes:
    return HEAD % path.encode() + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def until(what: Callable[[], bool], seconds: float = 5.0) -> float:
    """Waits until something holds; the seconds that took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


# --- connections, without a model ---


@pytest.mark.parametrize("path", ["/wait", "/stream"])
@pytest.mark.parametrize("way", ["close", "reset", "half-close", "with a request behind it"])
def test_a_client_that_leaves_ends_its_request_at_once(path: str, way: str) -> None:
    async def leave() -> float:
        app = fake_app(Settings())
        async with Listening(app, Settings()) as server:
            reader, writer = await server.connect()
            writer.write(post(path))
            if way == "with a request behind it":
                await asyncio.sleep(0.05)
                writer.write(post("/echo"))
            await until(lambda: app.state.begun == 1)
            if path == "/stream":
                await reader.readuntil(b"data: piece")
            if way == "half-close":
                writer.write_eof()
            elif way == "reset":
                writer.transport.abort()
            else:
                writer.close()
            seconds = await until(lambda: app.state.cancelled == 1 and app.state.traffic.in_flight == 0)
            writer.close()
            return seconds

    assert asyncio.run(leave()) < 1


def test_a_client_that_stops_reading_is_cut_off_and_others_are_not() -> None:
    settings = Settings(write_seconds=0.4)
    app = fake_app(settings)

    async def stall() -> None:
        async with Listening(app, settings) as server:
            _, writer = await server.connect()
            writer.write(post("/flood"))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            began = time.monotonic()
            while not app.state.cancelled:
                assert (await server.get("/live")).status_code == 200
                assert time.monotonic() - began < 5
                await asyncio.sleep(0.05)
            assert time.monotonic() - began > 0.3
            await until(lambda: server.connections == 0)
            writer.close()

    asyncio.run(stall())


def test_slow_heads_and_bodies_are_closed_at_their_deadlines() -> None:
    settings = Settings(header_seconds=1.5, body_seconds=1.5)
    app = fake_app(settings)

    async def trickle(server: Listening, begin: bytes) -> tuple[bytes, float]:
        reader, writer = await server.connect()
        began = time.monotonic()
        writer.write(begin)
        answer = asyncio.create_task(reader.read())
        while not answer.done() and time.monotonic() - began < 8:
            writer.write(b"x")
            await asyncio.sleep(0.1)
        writer.close()
        try:
            return await answer, time.monotonic() - began
        except ConnectionError:
            return b"", time.monotonic() - began

    async def slow() -> None:
        async with Listening(app, settings) as server:
            head = asyncio.create_task(trickle(server, b"GET /live HTTP/1.1\r\nHost: local"))
            body = asyncio.create_task(trickle(server, HEAD % b"/echo" + b"Content-Length: 1000\r\n\r\n"))
            nothing = asyncio.create_task(server.send(b"", 5))
            while not head.done() or not body.done():
                assert (await server.get("/live")).status_code == 200
                await asyncio.sleep(0.05)
            assert (await head)[0] == b""
            assert b" 408 " in (await body)[0]
            assert (await head)[1] < 5
            assert (await body)[1] < 6
            assert await nothing == b""
            await until(lambda: server.connections == 0)

    asyncio.run(slow())


def test_a_sender_of_too_much_still_reads_the_refusal() -> None:
    settings = Settings(max_body_bytes=1000)
    app = fake_app(settings)

    async def send() -> None:
        async with Listening(app, settings) as server:
            async with httpx.AsyncClient(trust_env=False) as session:
                answer = await session.post(server.url + "/echo", content=b"x" * 2**22)
                assert answer.status_code == 413
            huge = await server.send(HEAD % b"/echo" + b"Content-Length: 1000000000\r\n\r\nxxx", 3)
            assert b" 413 " in huge
            chunked = HEAD % b"/echo" + b"Transfer-Encoding: chunked\r\n\r\n" + b"1f4\r\n" + b"x" * 500 + b"\r\n"
            assert b" 413 " in await server.send(chunked + (b"1f4\r\n" + b"x" * 500 + b"\r\n") * 2, 3)
            early = await server.send(HEAD % b"/echo" + b"Content-Length: 100\r\n\r\nonly this", 0.3)
            assert early == b""

    asyncio.run(send())


def test_a_full_server_says_so_before_it_reads_the_body() -> None:
    engine = FakeEngine()
    engine.places = 6
    app = fake_app(Settings(), engine)
    assert ask(app, "POST", "/wait").status_code == 429  # found by the route
    from glmkit.serve.protection import add_protection

    app = fake_app(Settings(), engine)
    app.user_middleware.clear()
    add_protection(app, Settings(), [engine], quiet())  # type: ignore[list-item]

    async def send() -> None:
        async with Listening(app, Settings()) as server:
            seconds = []
            for _ in range(20):
                reader, writer = await server.connect()
                began = time.perf_counter()
                writer.write(HEAD % b"/wait" + b"Content-Length: 100000\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                seconds.append(time.perf_counter() - began)
                assert b" 429 " in head
                assert b"retry-after: 2" in head
                writer.close()
            assert sorted(seconds)[5] < 0.05

    asyncio.run(send())


def test_deadlines_for_the_beginning_and_for_the_whole() -> None:
    settings = Settings(waiting_seconds=0.2, request_seconds=0.6)
    app = fake_app(settings)
    waited = ask(app, "POST", "/wait")
    assert (waited.status_code, waited.json()["error"]["code"]) == (503, "waiting_timeout")
    assert int(waited.headers["retry-after"]) >= 1
    ran = ask(app, "POST", "/wait", headers={"x-piece": "1"})
    assert (ran.status_code, ran.json()["error"]["code"]) == (504, "request_timeout")
    streamed = ask(app, "POST", "/stream")
    events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert events[:-1] == ["piece"] * (len(events) - 1)
    assert len(events) > 10
    assert json.loads(events[-1])["error"]["code"] == "request_timeout"
    assert app.state.cancelled == 3


def test_routes_that_ask_for_no_answer_have_no_deadline_for_its_beginning() -> None:
    assert ask(fake_app(Settings(waiting_seconds=0.01)), "POST", "/echo", content=b"x").status_code == 200


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_probes_leave_nothing_behind(count: int) -> None:
    app = fake_app(Settings())

    async def probe() -> None:
        async with client(app) as session:
            for number in range(count):
                path = ("/live", "/ready", "/health")[number % 3]
                assert (await session.get(path)).status_code == 200
        assert app.state.traffic.in_flight == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(probe())


# --- signals, in a process of its own ---

PROCESS = """
import sys, time
import glmkit_command
sys.path.insert(0, {tests!r})
from serving import FakeEngine, fake_app
from glmkit.serve.server import Service, run
from glmkit.serve.settings import Settings

class Model:
    engine = FakeEngine()
    def close(self): time.sleep({closing})

settings = Settings(port=0, drain_seconds={drain}, **{settings!r})

def load(journal):
    time.sleep({loading})
    app = fake_app(settings, Model.engine, journal)

    @app.post("/break")
    async def broken(): Model.engine.broken = "RuntimeError: lost"

    return Service(app, {{"fake": Model()}})

run(load, settings)
"""


class Process:
    """A server of its own, without a model."""

    def __init__(self, loading: float = 0, drain: float = 10, closing: float = 0, **settings: Any) -> None:
        code = PROCESS.format(
            tests=str(Path(__file__).parent), loading=loading, drain=drain, closing=closing, settings=settings
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lines: list[dict[str, Any]] = []
        assert self.process.stderr is not None
        self.lines.append(json.loads(self.process.stderr.readline()))
        self.url = self.lines[0]["url"]
        self.port = int(self.url.rsplit(":", 1)[1])

    def wait_until_ready(self) -> None:
        for _ in range(600):
            if httpx.get(self.url + "/ready", trust_env=False).status_code == 200:
                return
            time.sleep(0.02)
        raise AssertionError("it never got ready")

    def end(self) -> int:
        """Waits for the end."""
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            _, errors = self.process.communicate()
        self.lines += [json.loads(line) for line in errors.splitlines()]
        return self.process.returncode

    def closing_seconds(self) -> float:
        """What the log says about how long the end took."""
        times = {line["event"]: datetime.fromisoformat(line["time"].replace("Z", "+00:00")) for line in self.lines}
        return (times["closed"] - times["closing"]).total_seconds()

    def ask(self, path: str) -> threading.Thread:
        """Asks for an answer beside the test; `answers` has it later."""
        self.answers: list[httpx.Response | Exception] = getattr(self, "answers", [])

        def send() -> None:
            try:
                self.answers.append(httpx.post(self.url + path, trust_env=False, timeout=20))
            except httpx.HTTPError as error:
                self.answers.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        return thread


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_with_code_0(number: int) -> None:
    server = Process()
    server.wait_until_ready()
    server.process.send_signal(number)
    assert server.end() == 0
    assert server.closing_seconds() < 2
    assert is_free(server.port)
    assert [line["event"] for line in server.lines if line["event"] != "request"] == [
        "listening",
        "ready",
        "closing",
        "closed",
    ]


def test_a_busy_server_takes_nothing_new_and_ends_what_is_left_after_its_drain_time() -> None:
    server = Process(drain=2)
    server.wait_until_ready()
    threads = [server.ask("/wait"), server.ask("/stream")]
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert httpx.get(server.url + "/live", trust_env=False).status_code == 200
    for path in ("/ready", "/health"):
        assert httpx.get(server.url + path, trust_env=False).status_code == 503
    refused = httpx.post(server.url + "/echo", trust_env=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_closing")
    assert server.end() == 0
    assert 1.9 < server.closing_seconds() < 2 + 2
    for thread in threads:
        thread.join(20)
    assert {answer.status_code for answer in server.answers if isinstance(answer, httpx.Response)} == {503, 200}
    assert all("server_closing" in getattr(answer, "text", "") for answer in server.answers)
    assert is_free(server.port)


def test_a_second_signal_ends_it_without_waiting() -> None:
    server = Process(drain=60)
    server.wait_until_ready()
    thread = server.ask("/wait")
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert server.closing_seconds() < 5
    thread.join(20)


def test_while_it_loads_it_lives_is_not_ready_and_can_be_ended() -> None:
    server = Process(loading=60)
    assert httpx.get(server.url + "/live", trust_env=False).status_code == 200
    ready = httpx.get(server.url + "/ready", trust_env=False)
    assert (ready.status_code, ready.json()["reason"]) == (503, "the model is being loaded")
    asked = httpx.post(server.url + "/v1/chat/completions", json={}, trust_env=False)
    assert (asked.status_code, asked.json()["error"]["code"]) == (503, "loading")
    assert asked.headers["retry-after"]
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert is_free(server.port)


def test_a_model_that_does_not_stop_does_not_keep_the_process() -> None:
    server = Process(closing=60)
    server.wait_until_ready()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert server.closing_seconds() < 3


def test_a_broken_engine_ends_the_process_with_another_code() -> None:
    server = Process(drain=60)
    server.wait_until_ready()
    thread = server.ask("/wait")
    time.sleep(0.2)
    httpx.post(server.url + "/break", trust_env=False)
    assert server.end() == 1
    assert server.closing_seconds() < 2
    thread.join(20)
    assert getattr(server.answers[0], "status_code", 0) == 503


def test_a_log_that_nobody_reads_does_not_stop_answers() -> None:
    for end in ("closed", "full"):
        server = Process(log_prompts=True)
        server.wait_until_ready()
        assert server.process.stderr is not None
        if end == "closed":
            server.process.stderr.close()
        with httpx.Client(trust_env=False) as session:
            for _ in range(20):  # a pipe holds 64 KB
                assert session.post(server.url + "/echo", content=b"x" * 10_000).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_it_answers_with_few_file_descriptors() -> None:
    import resource

    server = Process()
    # Of the server alone, while it still starts: this process may have more files open than that.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, most))
    server.wait_until_ready()
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for _ in range(5):
        assert httpx.post(server.url + "/echo", content=b"x", trust_env=False, timeout=20).status_code == 200
    for one in idle:
        one.close()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_the_command_serves_and_ends(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-0123456789abcdef\n")
    keys.chmod(0o600)
    code = "import glmkit_command; glmkit_command.main()"
    command = [sys.executable, "-c", code, "serve", "glm-nano", "--port", "0", "--api-key-file", str(keys)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stdout is not None
        url = json.loads(process.stderr.readline())["url"]
        assert httpx.get(url + "/live", trust_env=False).status_code == 200
        assert url in process.stdout.readline()  # it is ready
        body = {"model": "glm-nano", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}
        path = url + "/v1/chat/completions"
        assert httpx.post(path, json=body, trust_env=False).status_code == 401
        headers = {"Authorization": "Bearer key-0123456789abcdef"}
        answer = httpx.post(path, json=body, headers=headers, trust_env=False, timeout=30)
        assert answer.json()["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        _, log = process.communicate()
    assert "0123456789abcdef" not in log
    assert "你好" not in log


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--cors-origin", "*"], "every page"),
        (["--api-key", "short"], "8 to 256"),
        (["--api-key-file", "/nonexistent"], "cannot read the key file"),
        (["--port", "99999"], "does not exist"),
    ],
)
def test_the_command_refuses_what_is_not_safe(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from glmkit.cli import run

    assert run(["serve", "glm-nano", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "hint:" in error


def test_the_command_says_when_a_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from glmkit.cli import run

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "glm-nano", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


# --- with a model ---


@pytest.fixture(scope="module")
def nano() -> Any:
    return glmkit.load("glm-nano")


@pytest.fixture
def served(nano: Any) -> Iterator[Served]:
    one = serve(nano, "glm-nano", max_running=2, max_waiting=4)
    yield one
    one.close()


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decode step takes 20 ms and nothing ends an answer early."""
    from glmkit.engine import scheduler

    original = scheduler.rows_forward

    def slow(model: Any) -> Any:
        forward = original(model)

        def step(*arguments: Any) -> Any:
            time.sleep(0.02)
            return forward(*arguments)

        return step

    monkeypatch.setattr(scheduler, "rows_forward", slow)


def balanced(state: Any) -> bool:
    over = state.finished + state.aborted + state.failed
    return bool(state.started == over + state.running + state.waiting + state.prefilling)


def idle(served: Served) -> bool:
    state = served.engine.state()
    return state.running == state.waiting == state.prefilling == state.cache_tokens_used == 0


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 2, "stream": True}, {"n": 2}])
def test_a_disconnected_client_frees_its_rows_within_a_step(served: Served, more: dict[str, Any]) -> None:
    app = create_app(served, Settings(), quiet())

    async def leave() -> float:
        async with Listening(app, Settings()) as server:
            _, writer = await server.connect()
            writer.write(post("/v1/completions", json.dumps(LONG | more).encode()))
            await until(lambda: served.engine.state().running == more.get("n", 1), 20)
            writer.close()
            return await until(lambda: idle(served))

    assert asyncio.run(leave()) < 1  # a step and 250 ms, on a machine that does other work as well
    state = served.engine.state()
    assert state.aborted == more.get("n", 1)
    assert balanced(state)


@pytest.mark.usefixtures("slow_steps")
def test_leaving_the_queue_touches_nobody_else(served: Served) -> None:
    app = create_app(served, Settings(), quiet())

    async def leave() -> None:
        async with Listening(app, Settings()) as server, httpx.AsyncClient(trust_env=False, timeout=60) as session:
            url = server.url + "/v1/completions"
            body = LONG | {"max_tokens": 40}
            alone = (await session.post(url, json=body)).json()["choices"][0]["text"]
            running = [asyncio.create_task(session.post(url, json=body)) for _ in range(2)]
            await until(lambda: served.engine.state().running == 2)
            before = served.engine.state()
            _, writer = await server.connect()
            writer.write(post("/v1/completions", json.dumps(body | {"prompt": "明天"}).encode()))
            await until(lambda: served.engine.state().waiting == 1)
            writer.close()
            assert await until(lambda: served.engine.state().waiting == 0) < 1
            assert served.engine.state().prompt_tokens == before.prompt_tokens  # nothing was computed for it
            answers = [(await one).json()["choices"][0]["text"] for one in running]
            assert answers == [alone, alone]
            assert served.engine.state().aborted == 1

    asyncio.run(leave())


@pytest.mark.usefixtures("slow_steps")
def test_the_queue_never_takes_one_too_many(served: Served) -> None:
    app = create_app(served, Settings(), quiet())

    async def arrive() -> None:
        async with client(app, timeout=60) as session:
            tasks = [
                asyncio.create_task(session.post("/v1/completions", json=LONG | {"max_tokens": 8, "n": 1 + number % 2}))
                for number in range(200)
            ]
            most = 0
            while not all(task.done() for task in tasks):
                state = served.engine.state()
                most = max(most, state.waiting)
                assert balanced(state)
                await asyncio.sleep(0.005)
            answers = [task.result() for task in tasks]
            statuses = {answer.status_code for answer in answers}
            assert statuses == {200, 429}
            assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
            assert most <= 4

    asyncio.run(arrive())
    asyncio.run(until(lambda: idle(served)))


@pytest.mark.usefixtures("slow_steps")
def test_a_stream_whose_time_is_over_keeps_its_text(served: Served) -> None:
    app = create_app(served, Settings(request_seconds=1.0), quiet())
    streamed = ask(app, "POST", "/v1/completions", json=LONG | {"stream": True})
    events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events[:-1] if event.get("choices"))
    assert events[-1]["error"]["code"] == "request_timeout"
    asyncio.run(until(lambda: idle(served)))


def test_an_engine_that_makes_no_progress_is_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from glmkit.engine import scheduler

    original, go_on = scheduler.rows_forward, threading.Event()

    def frozen(model: Any) -> Any:
        return lambda *arguments: go_on.wait(20) and original(model)(*arguments)

    monkeypatch.setattr(scheduler, "rows_forward", frozen)
    app = create_app(served, Settings(stall_seconds=0.3), quiet())

    async def freeze() -> None:
        async with client(app, timeout=60) as session:
            time.sleep(0.5)  # idle for longer than the limit: no false alarm when work comes
            asked = asyncio.create_task(session.post("/v1/completions", json=LONG | {"max_tokens": 4}))
            await until(lambda: served.engine.state().running == 1)
            assert (await session.get("/ready")).status_code == 200
            await asyncio.sleep(0.5)
            for path, status in {"/ready": 503, "/health": 503, "/live": 200}.items():
                assert (await session.get(path)).status_code == status
            go_on.set()
            assert (await asked).status_code == 200
            assert (await session.get("/ready")).status_code == 200

    asyncio.run(freeze())


def test_reading_a_long_prompt_is_progress(served: Served) -> None:
    state = served.engine.state()
    assert why_not_ready(state, Settings(stall_seconds=1e-9)) is None  # idle: nothing is expected
    app = create_app(served, Settings(stall_seconds=5), quiet())

    async def read() -> None:
        async with client(app, timeout=60) as session:
            asked = asyncio.create_task(
                session.post("/v1/completions", json=LONG | {"prompt": "天" * 900, "max_tokens": 2})
            )
            while not asked.done():
                assert (await session.get("/ready")).status_code == 200
                await asyncio.sleep(0.01)
            assert asked.result().status_code == 200

    asyncio.run(read())


def threads() -> int:
    """How many there are beside those of the loop's pool, which stay."""
    return sum(not thread.name.startswith("asyncio") for thread in threading.enumerate())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("count", [100, pytest.param(1_000, marks=pytest.mark.slow)])
def test_random_aborts_leave_nothing_behind(nano: Any, count: int) -> None:
    served = serve(nano, "glm-nano", max_running=8, max_waiting=1_000)
    app = create_app(served, Settings(), quiet())
    chance = random.Random(count)
    kinds = [{}, {"stream": True}, {"n": 2}, {"stream": True, "n": 3}]

    async def abort(server: Listening) -> None:
        _, writer = await server.connect()
        body = LONG | {"max_tokens": 30, "prompt": "天" * chance.randint(1, 200)} | chance.choice(kinds)
        data = post("/v1/completions", json.dumps(body).encode())
        writer.write(data[: chance.randint(1, len(data))] if chance.random() < 0.1 else data)
        await asyncio.sleep(chance.expovariate(1 / 0.1))
        if chance.random() < 0.5:
            writer.transport.abort()
        writer.close()

    async def all_of_them() -> None:
        async with Listening(app, Settings(max_connections=1_000)) as server:
            await server.get("/live")
            await server.send(post("/v1/completions", json.dumps(LONG | {"max_tokens": 2}).encode()), 1)
            start = open_files(), threads()
            for _ in range(count // 20):
                await asyncio.gather(*(abort(server) for _ in range(20)))
                figures = (await server.get("/metrics")).text
                rows = {
                    line.split("{")[0].removeprefix("glmkit_engine_").removesuffix("_total"): float(line.split()[-1])
                    for line in figures.splitlines()
                    if line.startswith("glmkit_engine_") and "_created" not in line
                }
                over = rows["finished"] + rows["aborted"] + rows["failed"]
                assert rows["started"] == over + rows["running"] + rows["waiting"] + rows["prefilling"]
            await until(lambda: idle(served) and app.state.traffic.in_flight == 0 and server.connections == 0, 30)
            assert open_files() <= start[0]
            assert threads() <= start[1]
            assert app.state.traffic._buffered_bytes == 0
            good = await server.send(post("/v1/completions", json.dumps(LONG | {"max_tokens": 2}).encode()), 2)
            assert b" 200 " in good
        state = served.engine.state()
        assert balanced(state)
        assert state.failed == 0
        assert state.aborted > 0

    asyncio.run(all_of_them())
    served.close()

"""Keys, hosts, origins, sizes and what is told: every way in is closed unless it was opened."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import glmkit
from glmkit.errors import UsageError
from glmkit.serve.app import create_app
from glmkit.serve.protection import OPEN_PATHS
from glmkit.serve.settings import ApiKey, Settings, matching_key, read_key_file
from serving import (
    BEARER,
    CANARY,
    KEY,
    LOCAL,
    OTHER_KEY,
    WRONG_KEYS,
    FakeEngine,
    Lines,
    Listening,
    ask,
    client,
    fake_app,
    quiet,
)


def with_keys(*keys: str, **fields: Any) -> Settings:
    return Settings(api_keys=tuple(ApiKey.of(key) for key in keys or (KEY,)), **fields)


# --- keys ---


@pytest.mark.parametrize("kind", WRONG_KEYS)
@pytest.mark.parametrize(("method", "path"), [("POST", "/echo"), ("GET", "/metrics"), ("GET", "/ready")])
def test_wrong_keys_are_refused(kind: str, method: str, path: str) -> None:
    answer = ask(fake_app(with_keys()), method, path, headers=WRONG_KEYS[kind])
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_right_key_is_taken_and_one_in_the_query_is_not() -> None:
    app = fake_app(with_keys())
    assert ask(app, "POST", "/echo", content=b"{}", headers=BEARER).json() == {"bytes": 2}
    assert ask(app, "POST", f"/echo?api_key={KEY}&key={KEY}", content=b"{}").status_code == 401


PATHS = ("//echo", "/x/../echo", "/ECHO", "/%65cho", "/echo/", "/echo.", "/live/../echo", "/no")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "FETCH", "POST"])
def test_no_spelling_of_a_path_and_no_method_avoids_the_key(method: str, path: str) -> None:
    app = fake_app(with_keys())
    sent = httpx.Request(method, LOCAL)
    sent.url = httpx.URL(LOCAL).copy_with(raw_path=path.encode())
    answer = asyncio.run(httpx.ASGITransport(app).handle_async_request(sent))
    assert answer.status_code == 401


def test_exactly_the_open_paths_need_no_key() -> None:
    app = fake_app(with_keys())
    open_paths = set()
    for route in app.routes:
        path = getattr(route, "path", "").replace("{name}", "x")
        for method in getattr(route, "methods", None) or ["GET"]:
            if ask(app, method, path).status_code != 401:
                open_paths.add(path)
    assert open_paths == OPEN_PATHS


def test_websockets_are_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    app = fake_app(Settings())
    asyncio.run(app({"type": "websocket", "path": "/echo", "headers": [(b"host", b"localhost")]}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_every_key_is_compared_also_after_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    import secrets

    keys = [ApiKey.of(f"key-number-{number}") for number in range(5)]
    compared = []
    original = secrets.compare_digest
    monkeypatch.setattr(secrets, "compare_digest", lambda a, b: compared.append((a, b)) or original(a, b))
    assert matching_key(keys, b"key-number-0") == keys[0]
    assert len(compared) == 5
    assert all(len(a) == len(b) == 32 for a, b in compared)
    assert matching_key(keys, b"key-number-9") is None
    assert len(compared) == 10


@pytest.mark.slow
def test_time_tells_nothing_about_a_key() -> None:
    keys = [ApiKey.of(KEY), ApiKey.of(OTHER_KEY)]
    tried = {"near": KEY[:-1].encode() + b"!", "far": b"!" * len(KEY), "second": OTHER_KEY[:-1].encode() + b"!"}
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    order = list(tried)
    for _ in range(10_000):
        random.shuffle(order)
        for name in order:
            began = time.perf_counter()
            matching_key(keys, tried[name])
            seconds[name].append(time.perf_counter() - began)
    kept = {name: sorted(values)[: int(0.9 * len(values))] for name, values in seconds.items()}  # without interruptions
    spread = max(statistics.stdev(values) for values in kept.values())
    means = [statistics.fmean(values) for values in kept.values()]
    assert max(means) - min(means) < 3 * spread


def test_keys_are_kept_as_hashes_only() -> None:
    settings = with_keys(KEY)
    assert KEY not in repr(settings)
    assert settings.api_keys[0].owner not in KEY
    assert len(settings.api_keys[0].owner) == 12


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the old one\n{KEY}\n\n{OTHER_KEY}\n")
    file.chmod(0o600)
    keys, warnings = read_key_file(file)
    assert [key.owner for key in keys] == [ApiKey.of(KEY).owner, ApiKey.of(OTHER_KEY).owner]
    assert warnings == []
    file.chmod(0o644)
    assert "chmod 600" in read_key_file(file)[1][0]
    file.chmod(0o602)
    with pytest.raises(UsageError, match="everybody on this machine may write"):
        read_key_file(file)
    file.chmod(0o600)
    file.write_text("# nothing\n")
    with pytest.raises(UsageError, match="holds no key"):
        read_key_file(file)
    with pytest.raises(UsageError, match="cannot read"):
        read_key_file(tmp_path / "none")
    for bad in ("short", "has a space", "x" * 300, "ключ-ключ-ключ"):
        with pytest.raises(UsageError, match="8 to 256 visible"):
            ApiKey.of(bad)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "127.0.0.1.evil.com"])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="no API key"):
        Settings(host=host)
    with_keys(host=host)


def test_loopback_needs_none() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        Settings(host=host)


def test_figures_and_the_document_of_the_api_need_the_key_and_there_is_no_page_that_loads_scripts() -> None:
    app = fake_app(with_keys())
    for path in ("/metrics", "/openapi.json"):
        assert ask(app, "GET", path).status_code == 401
        assert ask(app, "GET", path, headers=BEARER).status_code == 200
    for path in ("/docs", "/redoc"):
        assert ask(app, "GET", path, headers=BEARER).status_code == 404


# --- browsers; for Host and Origin see test_ways_in.py ---


def test_only_named_origins_may_read_answers() -> None:
    app = fake_app(with_keys(cors_origins=("https://chat.example.org",)))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    named = {"Origin": "https://chat.example.org"}
    preflight = ask(app, "OPTIONS", "/echo", headers={**asked, **named})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-credentials" not in preflight.headers
    refused = ask(app, "POST", "/echo", headers=named)  # a refusal can be read too
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example.org")
    evil = ask(app, "OPTIONS", "/echo", headers={**asked, "Origin": "https://evil.com"})
    assert evil.status_code == 403
    assert "access-control-allow-origin" not in evil.headers
    same = ask(app, "POST", "/echo", headers={**BEARER, "Origin": LOCAL})
    assert "access-control-allow-origin" not in same.headers
    for origin in ("*", "https://chat.example.org/page", "chat.example.org", "null", "https://"):
        with pytest.raises(UsageError, match="--cors-origin"):
            Settings(cors_origins=(origin,))


def test_every_answer_has_the_headers_that_protect_browsers() -> None:
    app = fake_app(with_keys())
    for path in ("/live", "/metrics", "/no", "/item/a"):
        headers = ask(app, "GET", path, headers=BEARER).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-request-id"].startswith("req_")
        assert "server" not in headers


# --- sizes ---


def test_bodies_are_measured_while_they_arrive() -> None:
    app = fake_app(Settings(max_body_bytes=1000))
    parts: list[int] = []

    async def body() -> Any:
        for _ in range(1000):
            parts.append(1)
            yield b"x" * 100

    assert ask(app, "POST", "/echo", content=b"x" * 1000).json() == {"bytes": 1000}
    assert ask(app, "POST", "/echo", content=b"x" * 1001).status_code == 413
    answer = ask(app, "POST", "/echo", content=body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_all_bodies_together_are_bounded() -> None:
    app = fake_app(Settings(max_body_bytes=1000))
    ask(app, "POST", "/echo", content=b"")
    app.state.traffic.take_bytes(15_500)
    answer = ask(app, "POST", "/echo", content=b"x" * 600)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert ask(app, "POST", "/echo", content=b"x" * 400).status_code == 200
    assert ask(app, "POST", "/echo", content=b"x" * 400).status_code == 200  # and was given back


def test_long_headers_are_refused() -> None:
    app = fake_app(Settings())
    assert ask(app, "GET", "/live", headers={"x": "y" * 40_000}).status_code == 431
    many = [(f"x-{number}", "y" * 20) for number in range(1_500)]
    assert ask(app, "GET", "/live", headers=many).status_code == 431


def test_ranges_and_forms_mean_nothing_here() -> None:
    app = fake_app(Settings())
    ranges = "bytes=" + ",".join(f"{n}-{n + 1}" for n in range(2000))
    assert ask(app, "GET", "/item/a", headers={"Range": ranges}).json() == {"name": "a"}
    form = "--b\r\n" + "".join(f'Content-Disposition: form-data; name="{n}"\r\n\r\nx\r\n--b\r\n' for n in range(50_000))
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    began = time.perf_counter()
    assert ask(app, "POST", "/echo", content=form.encode(), headers=kind).json() == {"bytes": len(form)}
    assert time.perf_counter() - began < 2


def test_many_idle_connections_do_not_keep_others_out() -> None:
    async def fill() -> None:
        async with Listening(fake_app(Settings()), Settings(max_connections=8)) as server:
            idle = [await server.connect() for _ in range(40)]
            assert server.connections <= 8
            assert (await server.get("/live")).status_code == 200
            for _, writer in idle:
                writer.close()

    asyncio.run(fill())


# --- shares ---


def test_one_key_leaves_half_of_the_waiting_places_to_others() -> None:
    engine = FakeEngine(max_running=2, max_waiting=4)
    app = fake_app(with_keys(KEY, OTHER_KEY), engine)

    async def flood() -> None:
        async with client(app, headers=BEARER) as greedy, client(app) as other:
            waiting = [asyncio.create_task(greedy.post("/wait")) for _ in range(6)]
            done, left = await asyncio.wait(waiting, timeout=0.5)
            assert [(one.result().status_code, one.result().json()["error"]["code"]) for one in done] == [
                (429, "key_limit")
            ] * 2
            assert all(int(one.result().headers["retry-after"]) >= 1 for one in done)
            calm = asyncio.create_task(other.post("/wait", headers={"Authorization": f"Bearer {OTHER_KEY}"}))
            await asyncio.sleep(0.1)
            assert not calm.done()  # it has a place
            for one in (*left, calm):
                one.cancel()
            await asyncio.gather(*left, calm, return_exceptions=True)

    asyncio.run(flood())
    assert engine.places == 0


# --- what is told ---


def test_neither_keys_nor_prompts_are_told_to_anybody() -> None:
    lines = Lines()
    app = fake_app(with_keys(), journal=lines.journal)
    told = []
    bodies = {"/fail": CANARY, "/echo": json.dumps({"messages": CANARY}), f"/{CANARY}": "", f"/item/{CANARY}": ""}
    for path, body in bodies.items():
        for headers in (BEARER, {"Authorization": f"Bearer {CANARY}"}, {**BEARER, "User-Agent": CANARY}):
            answer = ask(app, "POST", path, content=body, headers=headers)
            told.append(answer.text + str(answer.headers))
    figures = ask(app, "GET", "/metrics", headers=BEARER).text
    log = lines.text()
    for text in (log, figures, *told):
        assert CANARY not in text
        assert KEY not in text
    failed = [json.loads(line) for line in log.splitlines() if json.loads(line)["event"] == "failure"]
    assert failed[0]["error"] == "RuntimeError"
    assert any("serving.py" in place for place in failed[0]["at"])


def test_a_failure_tells_an_id_that_the_log_has_too() -> None:
    lines = Lines()
    answer = ask(fake_app(Settings(), journal=lines.journal), "POST", "/fail", content=b"secret")
    assert answer.status_code == 500
    told = answer.json()["error"]
    assert told == {
        "message": f"the server failed on this request; request {answer.headers['x-request-id']}",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    log = [json.loads(line) for line in lines.text().splitlines()]
    assert {line["id"] for line in log} == {answer.headers["x-request-id"]}
    assert [line["event"] for line in log] == ["failure", "request"]


def test_nobody_can_write_lines_into_the_log() -> None:
    lines = Lines()
    app = fake_app(Settings(log_prompts=True), journal=lines.journal)
    evil = 'x\n{"event": "ready"}\r\x1b[2J\u2028'
    ask(app, "POST", "/echo", content=evil, headers={"User-Agent": "a\x1b[31m"})
    log = lines.text()
    assert [json.loads(line)["event"] for line in log.splitlines()] == ["body", "request"]
    assert json.loads(log.splitlines()[0])["body"] == evil  # asked for, so it is there, escaped
    assert "\x1b" not in log


def test_prompts_are_logged_only_if_asked_for() -> None:
    for asked in (False, True):
        lines = Lines()
        ask(fake_app(Settings(log_prompts=asked), journal=lines.journal), "POST", "/echo", content=CANARY)
        assert (CANARY in lines.text()) is asked


def test_labels_of_figures_are_not_chosen_by_clients() -> None:
    app = fake_app(Settings())
    for number in range(50):
        ask(app, "GET", f"/no/{number}")
        ask(app, "GET", f"/item/{number}")
        ask(app, f"M{number}", "/live")
    figures = ask(app, "GET", "/metrics").text
    rows = [line for line in figures.splitlines() if line.startswith("glmkit_http_requests_total")]
    assert len(rows) <= 4
    assert 'route="/item/{name}",status="200"' in figures.replace('outcome="answered",', "")


def test_refusals_have_the_form_of_openai_errors() -> None:
    app = fake_app(Settings())
    for method, path, status in (("GET", "/no", 404), ("DELETE", "/echo", 405), ("GET", "/echo", 405)):
        answer = ask(app, method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# --- the application with a model behind it ---


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    from glmkit.chat.following import serve

    one = serve(glmkit.load("glm-nano"), "glm-nano", max_running=2, max_waiting=4)
    yield one
    one.close()


def test_only_json_is_taken_so_no_form_of_another_page_can_ask(served: Any) -> None:
    app = create_app(served, Settings(), quiet())
    body = json.dumps({"model": "glm-nano", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/"):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            headers = {"Content-Type": kind} if kind else {}
            assert ask(app, "POST", path, content=body, headers=headers).status_code == 415
        squeezed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        assert ask(app, "POST", path, content=gzip.compress(body), headers=squeezed).status_code == 415


def test_a_whole_conversation_leaves_no_trace_in_log_and_figures(served: Any) -> None:
    lines = Lines()
    app = create_app(served, with_keys(), lines.journal)
    bodies: list[dict[str, Any]] = [
        {"model": "glm-nano", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 3},
        {"model": "glm-nano", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 3, "stream": True},
        {"model": CANARY, "messages": [{"role": "user", "content": "a"}]},
        {"model": "glm-nano", "messages": [{"role": "user", "content": CANARY * 500}]},
        {"model": "glm-nano", "messages": [{"role": CANARY, "content": CANARY}]},
        {"model": "glm-nano", "messages": [{"role": "user", "content": "a"}], CANARY: 1},
    ]
    statuses = [ask(app, "POST", "/v1/chat/completions", json=body, headers=BEARER).status_code for body in bodies]
    assert statuses[:3] == [200, 200, 404]
    figures = ask(app, "GET", "/metrics", headers=BEARER).text
    log = lines.text()
    assert log.count('"event": "request"') == len(bodies)
    for text in (log, figures):
        assert CANARY not in text
        assert KEY not in text
    assert "glmkit_first_token_seconds_count 3.0" in figures
    assert 'glmkit_engine_finished_total{model="glm-nano"}' in figures


def test_neither_models_nor_errors_tell_paths_of_this_machine(served: Any) -> None:
    app = create_app(served, Settings(), quiet())
    told = [ask(app, "GET", path).text for path in ("/v1/models", "/v1/models/none", "/openapi.json", "/ready")]
    folder = str(Path(glmkit.__file__).parent)
    assert not [text for text in told if folder in text or str(Path.home()) in text]


def test_the_next_free_row_is_for_the_key_with_fewest(served: Any) -> None:
    app = create_app(served, with_keys(KEY, OTHER_KEY), quiet())
    unending = {str(token): -100 for token in (2, 6140, 6141, 6142, 6143)}
    body = {"model": "glm-nano", "prompt": "a", "max_tokens": 40, "logit_bias": unending}
    order: list[str] = []

    async def send(session: httpx.AsyncClient, name: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        answer = await session.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        order.append(name)

    async def flood() -> None:
        async with client(app, timeout=60) as session:
            greedy = [asyncio.create_task(send(session, "greedy", KEY)) for _ in range(4)]
            while served.engine.state().waiting < 2:
                await asyncio.sleep(0.001)
            await asyncio.gather(*greedy, send(session, "other", OTHER_KEY))

    asyncio.run(flood())
    assert order.index("other") <= 3
    assert order[-1] == "greedy"

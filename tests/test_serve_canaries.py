"""A-37: a key, prompts and an upload that nobody may find again, in what a server process leaves anywhere.

Looked through are its log, what it prints, its figures, its title, error bodies, and every file below its home and
its temporary folder, after answers, refusals, failures and clients that left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

CANARY = "canary-51c8-lives-nowhere"
KEY = "key-51c8-canary-of-a-key"
CODE = "import glmkit_command; glmkit_command.main()"


class Command:
    """`glm …` with folders of its own."""

    def __init__(self, folder: Path, arguments: list[str], **variables: str) -> None:
        self.folder = folder
        for name in ("home", "temporary", "work"):
            (folder / name).mkdir()
        environment = {**os.environ, "HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary"), **variables}
        for name in [name for name in environment if name.startswith("XDG_")]:
            del environment[name]
        self.said = folder / "said"
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, *arguments],
                stdout=said,
                stderr=said,
                env=environment,
                cwd=folder / "work",
            )

    def url(self, before: str) -> str:
        """Waits for the line that says where it listens."""
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            for line in self.said.read_text().splitlines():
                if before in line and "http://" in line and "Ctrl-C" in line:
                    return "http://" + line.partition("http://")[2].split()[0].removesuffix("/v1")
            time.sleep(0.05)
        raise AssertionError(self.said.read_text())

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()

    def traces(self, *canaries: str) -> list[tuple[str, str]]:
        """What was found where; also in names."""
        found = []
        for path in self.folder.rglob("*"):
            content = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
            found += [(str(path), canary) for canary in canaries if canary.encode() in content]
        return found

    def title(self) -> str:
        return Path(f"/proc/{self.process.pid}/cmdline").read_text()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Command, str]]:
    keys = tmp_path.parent / f"{tmp_path.name}-keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    command = Command(tmp_path, ["serve", "glm-nano", "--port", "0", "--api-key-file", str(keys)])
    try:
        yield command, command.url("glm-nano")
    finally:
        command.process.kill()
        command.process.wait()


def asks() -> list[tuple[str, Any]]:
    says: dict[str, Any] = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 3}
    tool = {"type": "function", "function": {"name": "f", "description": CANARY, "parameters": {"type": CANARY}}}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [CANARY]}}}
    return [
        ("/v1/chat/completions", says),
        ("/v1/chat/completions", {**says, "stream": True}),
        ("/v1/chat/completions", {**says, "n": 2, "stop": [CANARY], "user": CANARY, "metadata": {"a": CANARY}}),
        ("/v1/chat/completions", {**says, "tools": [tool]}),
        ("/v1/chat/completions", {**says, "response_format": schema}),
        ("/v1/chat/completions", {**says, "model": CANARY}),
        ("/v1/chat/completions", {**says, "temperature": CANARY}),
        ("/v1/chat/completions", {**says, CANARY: CANARY}),
        ("/v1/chat/completions", {**says, "messages": [{"role": CANARY, "content": CANARY}]}),
        ("/v1/chat/completions", {**says, "messages": [{"role": "user", "content": CANARY * 4000}]}),
        ("/v1/completions", {"prompt": CANARY, "max_tokens": 2, "echo": True, "logprobs": 2}),
        ("/tokenize", {"text": CANARY}),
        ("/", {"prompt": CANARY, "history": [[CANARY, CANARY]], "max_length": 200}),
        (f"/{CANARY}?{CANARY}={CANARY}", {}),
        (f"/v1/models/{CANARY}", {}),
    ]


def test_a_server_leaves_no_trace_of_keys_and_prompts(served: tuple[Command, str]) -> None:
    command, url = served
    bearer = {"Authorization": f"Bearer {KEY}", "User-Agent": CANARY, "X-Request-Id": CANARY, "Referer": CANARY}
    told = []
    with httpx.Client(base_url=url, trust_env=False, timeout=30, headers=bearer) as client:
        statuses = []
        for path, body in asks():
            answer = client.post(path, json=body)
            statuses.append(answer.status_code)
            if answer.status_code >= 400:
                told.append(answer.text + str(answer.headers))
        assert {200, 400, 404} <= set(statuses) <= {200, 400, 404, 405}
        told.append(client.post("/v1/completions", content=f'{{"prompt": {CANARY}').text)
        told.append(client.post("/tokenize", content=CANARY, headers={"Content-Type": CANARY}).text)
        told.append(client.post("/tokenize", json={}, headers={"Authorization": f"Bearer {CANARY}"}).text)
        with client.stream("POST", "/v1/chat/completions", json={**asks()[1][1], "max_tokens": 200}) as answer:
            next(answer.iter_bytes())  # and leaves
        figures = client.get("/metrics").text
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as cut:
        head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nX: {CANARY}\r\nContent-Length: 999\r\n\r\n"
        cut.sendall((head + CANARY).encode())
    time.sleep(0.2)
    assert CANARY not in command.title()
    assert KEY not in command.title()
    assert command.end() == 0
    assert not [text for text in told if KEY in text]
    assert CANARY not in figures
    assert KEY not in figures
    log = [json.loads(line) for line in command.said.read_text().splitlines() if line.startswith("{")]
    assert sum(line["event"] == "request" for line in log) >= len(asks()) + 4
    assert command.traces(CANARY, KEY) == []


@pytest.mark.slow
def test_a_killed_server_leaves_no_process_that_compiles_a_schema(served: tuple[Command, str]) -> None:
    """S-17: its only child has limits of its own, so nobody has to end it."""
    command, url = served
    hard = {"type": "string", "pattern": "(" + "[a-z]{1,900}" * 40 + "){1,900}"}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": hard}},
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as asking:
        asking.sendall(head.encode() + data)
        end, children = time.monotonic() + 20, set[int]()
        while not children and time.monotonic() < end:
            children = {pid for pid, parent in parents().items() if parent == command.process.pid}
        assert children
        command.process.kill()
        command.process.wait()
    end = time.monotonic() + 20  # two seconds of CPU time; the machine may be busy
    while time.monotonic() < end and children & parents().keys():
        time.sleep(0.05)
    assert not children & parents().keys()


def parents() -> dict[int, int]:
    """The parent of every process that is not over."""
    found = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(place.parent.name)] = int(fields[1])
    return found


@pytest.mark.slow
def test_the_web_app_leaves_no_trace_of_passwords_and_uploads(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    passwords = tmp_path.parent / f"{tmp_path.name}-passwords"
    passwords.write_text(f"ann:{KEY}\n")
    passwords.chmod(0o600)
    command = Command(tmp_path, ["web", "glm-nano", "--port", "0", "--password-file", str(passwords)])
    try:
        url = command.url("glm web")
        with httpx.Client(base_url=url, trust_env=False, timeout=60, headers={"User-Agent": CANARY}) as client:
            assert client.post("/login", data={"user": "ann", "password": CANARY}).status_code == 401
            assert client.get(f"/{CANARY}?{CANARY}").status_code == 401
            assert client.post("/login", data={"user": "ann", "password": KEY}).status_code == 303
            page = client.get("/").text
            token = page.partition('name="glm-token" content="')[2].partition('"')[0]
            assert token
            upload = {"files": (f"{CANARY}.json", CANARY.encode() * 100, "application/json")}
            statuses = [
                client.post("/gradio_api/upload", files=upload).status_code,
                client.post("/gradio_api/upload", files=upload, headers={"x-glm-token": "wrong"}).status_code,
                client.get(f"/files/{CANARY}/{CANARY}").status_code,
                client.get(f"/export/{CANARY}.json").status_code,
            ]
            assert statuses == [403, 403, 404, 404]
            assert CANARY not in command.title()
        assert command.end() == 0
    finally:
        command.process.kill()
        command.process.wait()
    assert command.traces(CANARY, KEY) == []

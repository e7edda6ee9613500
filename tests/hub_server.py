"""Small servers that speak the routes of the hub and of ModelScope over a few folders, and misbehave when told to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

COMMITS = {"main": "a" * 40, "v1": "b" * 40, "master": "c" * 40}
LARGE_BYTES = 1_000  # from here on a file is kept apart from git, with a SHA-256 and behind a redirect


@dataclass
class Faults:
    """What goes wrong, by name of the file.

    Args:
        cut_at: The connection breaks when a file has come this far; each number is used once.
        stall_at: From here on nothing comes any more.
        damaged: How many times a file comes with a wrong byte.
        redirect: Where a file is said to be.
        status: What is answered for a file, or for the listing under the name "".
        ignores_ranges: Every request gets the whole file.
    """

    cut_at: dict[str, list[int]] = field(default_factory=dict)
    stall_at: dict[str, int] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)
    redirect: dict[str, str] = field(default_factory=dict)
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    ignores_ranges: bool = False


class Server(ThreadingHTTPServer):
    """One repository, with a folder for each revision."""

    daemon_threads = True

    def __init__(self, route: type[Route], repository: str, revisions: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), route)
        self.repository, self.revisions = repository, revisions
        self.faults = Faults()
        self.asked: list[str] = []
        self.ranges: list[tuple[str, int]] = []
        self.tokens: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Route(BaseHTTPRequestHandler):
    """What both have: files with ranges, and the faults."""

    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        path = unquote(path)
        self.server.asked.append(f"{self.command} {path}")
        self.answer(path, {key: values[0] for key, values in parse_qs(query).items()})

    def answer(self, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError

    def revision(self, name: str) -> tuple[str, Path | None]:
        """The commit of a branch, tag or commit, and its folder."""
        for branch, commit in COMMITS.items():
            if name in (branch, commit) and branch in self.server.revisions:
                return commit, self.server.revisions[branch]
        return name, None

    def send_content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        faults, begins = self.server.faults, 0
        if faults.damaged.get(name, 0) > 0:
            faults.damaged[name] -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        whole, asked = len(content), self.headers.get("Range", "")
        if asked.startswith("bytes=") and not faults.ignores_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begins = int(first)
            content = content[begins : int(last) + 1 if last else None]
            headers = headers | {"Content-Range": f"bytes {begins}-{begins + len(content) - 1}/{whole}"}
            self.send_response(206)
        else:
            self.send_response(200)
        if self.command == "GET":
            self.server.ranges.append((name, begins))
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        cuts = faults.cut_at.get(name, [])
        if self.command == "GET" and cuts:
            self.wfile.write(content[: max(cuts.pop(0) - begins, 0)])
            self.wfile.flush()
            self.connection.shutdown(2)
        elif self.command == "GET" and name in faults.stall_at:
            self.wfile.write(content[: faults.stall_at[name] - begins])
            self.wfile.flush()
            self.connection.recv(1)  # until the other side is gone
        elif self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class HubRoute(Route):
    """The hub: /api/models/ID, /api/models/ID/tree/COMMIT and /ID/resolve/COMMIT/FILE."""

    def answer(self, path: str, query: dict[str, str]) -> None:
        api, files = f"/api/models/{self.server.repository}", f"/{self.server.repository}/resolve/"
        if path.startswith("/storage/"):
            self.send_file(*self.revision(path.split("/")[2]), path.split("/")[3], stored=True)
        elif "" in self.server.faults.status:
            self.fail(*self.server.faults.status[""])
        elif path == api or path.startswith(f"{api}/revision/"):
            self.send_info(path.partition("/revision/")[2] or "main")
        elif path.startswith(f"{api}/tree/"):
            revision, folder = self.revision(path.removeprefix(f"{api}/tree/").split("/")[0])
            self.send_json(self.tree(folder)) if folder else self.fail(404, "RevisionNotFound")
        elif path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            self.send_file(*self.revision(revision), name)
        else:
            self.fail(404, "RepoNotFound")

    def tree(self, folder: Path) -> list[dict[str, Any]]:
        entries = []
        for file in sorted(folder.iterdir()):
            content = file.read_bytes()
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entries.append({"type": "file", "oid": oid, "size": len(content), "path": file.name})
            if len(content) >= LARGE_BYTES:
                stored = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                entries[-1]["lfs"] = stored
        return entries

    def send_info(self, name: str) -> None:
        commit, folder = self.revision(name)
        if folder is None:
            return self.fail(404, "RevisionNotFound")
        siblings = [{"rfilename": entry["path"]} for entry in self.tree(folder)]
        self.send_json(
            {"id": self.server.repository, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        )

    def send_file(self, commit: str, folder: Path | None, name: str, stored: bool = False) -> None:
        self.server.tokens.append((self.path, self.headers.get("Authorization")))
        if folder is None or not (folder / name).is_file():
            return self.fail(404, "EntryNotFound" if folder else "RevisionNotFound")
        if name in self.server.faults.status:
            return self.fail(*self.server.faults.status[name])
        content = (folder / name).read_bytes()
        entry = next(entry for entry in self.tree(folder) if entry["path"] == name)
        etag = entry.get("lfs", entry)["oid"]
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        target = self.server.faults.redirect.get(name)
        if (len(content) >= LARGE_BYTES or target) and not stored:
            self.send_response(302)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header(
                "Location", target or f"http://localhost:{self.server.server_address[1]}/storage/{commit}/{name}"
            )
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_content(name, content, headers | {"ETag": f'"{etag}"'})

    def fail(self, status: int, code: str) -> None:
        self.send_json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": f"{code}: no such thing"})


class ModelScopeRoute(Route):
    """ModelScope: /api/v1/models/ID/repo/files and /api/v1/models/ID/repo?FilePath=."""

    def answer(self, path: str, query: dict[str, str]) -> None:
        api = f"/api/v1/models/{self.server.repository}/repo"
        commit, folder = self.revision(query.get("Revision", "master"))
        if folder is None or not path.startswith(api) or "" in self.server.faults.status:
            status = self.server.faults.status.get("", (404, "not found"))[0]
            return self.send_json({"Code": 10010205001, "Message": "no such thing", "Success": False}, status)
        if path == f"{api}/files":
            return self.send_json({"Code": 200, "Success": True, "Data": {"Files": self.files(folder, commit)}})
        name = query.get("FilePath", "")
        if name in self.server.faults.status:
            return self.send_json({"Code": 1, "Message": "no", "Success": False}, self.server.faults.status[name][0])
        self.send_content(name, (folder / name).read_bytes(), {})

    def files(self, folder: Path, commit: str) -> list[dict[str, Any]]:
        return [
            {
                "Name": file.name,
                "Path": file.name,
                "Type": "blob",
                "Size": file.stat().st_size,
                "Sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "Revision": commit,
                "IsLFS": file.stat().st_size >= LARGE_BYTES,
            }
            for file in sorted(folder.iterdir())
        ]


@contextmanager
def serving(route: type[Route], repository: str, revisions: dict[str, Path]) -> Iterator[Server]:
    """Runs a server while the block runs."""
    server = Server(route, repository, revisions)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

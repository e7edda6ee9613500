"""Tiny training runs in processes of their own, which can be killed, starved and interrupted at a chosen moment.

A test starts this file once (`Runs`) and sends it orders, one JSON object a line. For each order it forks a child,
which trains; so hundreds of runs cost one start of Python. Calls of the file system are counted with a profiling
function, which sees every call from Python into C: it kills the process at the k-th, or makes it fail.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_FILE_CALLS = {"open", "write", "truncate", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "remove"}
_FILE_CALLS |= {"scandir", "serialize_file", "rmtree"}
KILLED = 99  # exit status of a child that its own order killed; SIGKILL from outside is -9


class Runs:
    """The tests' side: a process that starts training runs."""

    def __enter__(self) -> Runs:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.kill()  # it waits for orders; none of its children is left
        self._server.wait()

    def __call__(self, folder: Path, **order: Any) -> dict[str, Any]:
        """Runs one order; returns how the child ended, and what it noted."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"folder": str(folder), **order}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def serve() -> None:
    """The server's side: forks a child for each order."""
    import torch

    from glmkit.errors import GlmkitError

    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # pictures cost more than the training
    from tiny_runs import train_tiny

    answers = os.dup(1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:  # everything is imported before the first fork
        train_tiny({"folder": f"{folder}/full", "settings": {"max_steps": 1}})
        with contextlib.suppress(GlmkitError):
            train_tiny({"folder": f"{folder}/lora", "method": {"name": "lora"}, "settings": {"max_steps": 1}})
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run(order, writing)
        os.close(writing)
        if "kill_after_seconds" in order:
            select.select([reading], [], [], order["kill_after_seconds"])  # or until it has ended
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        noted = b"".join(iter(lambda: os.read(reading, 1 << 16), b""))  # noqa: B023
        os.close(reading)
        _, status = os.waitpid(child, 0)
        answer = json.loads(noted) if noted else {}
        os.write(answers, json.dumps({"status": os.waitstatus_to_exitcode(status), **answer}).encode() + b"\n")


def _run(order: dict[str, Any], notes: int) -> None:
    """Trains as ordered and leaves; never returns."""
    from glmkit.errors import GlmkitError
    from tiny_runs import train_tiny

    status, noted = 0, {}
    try:
        noted = train_tiny(order)
    except GlmkitError as error:
        status, noted = 1, {"error": type(error).__name__, "message": str(error)}
    except KeyboardInterrupt:
        status, noted = 130, {"error": "KeyboardInterrupt"}
    except BaseException as error:  # an unforeseen one fails the test, by its name
        status, noted = 3, {"error": type(error).__name__, "message": repr(error)}
    os.write(notes, json.dumps(noted).encode())
    os._exit(status)


class FileCalls:
    """Counts calls of the file system while it is on, and does something at one of them.

    Args:
        kill_at: Number of the call, from 1, at which the process dies at once.
        fail_at: Number of the call that raises an OSError instead of being done.
        errno: Which error.
        only: Counts only calls of these names.
    """

    def __init__(self, kill_at: int = 0, fail_at: int = 0, errno: int = 28, only: list[str] | None = None) -> None:
        self.kill_at, self.fail_at, self.errno = kill_at, fail_at, errno
        self.only = set(only or _FILE_CALLS)
        self.names: list[str] = []

    def __enter__(self) -> FileCalls:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def _see(self, frame: Any, event: str, function: Any) -> None:
        name = getattr(function, "__name__", "")
        owner = getattr(function, "__self__", None)
        if event != "c_call" or name not in self.only or owner in (sys.stderr, sys.stdout):
            return
        if isinstance(owner, str | bytes | list | set | io.StringIO):  # str.replace and list.remove
            return
        self.names.append(name)
        if len(self.names) == self.kill_at:
            os._exit(KILLED)
        if len(self.names) == self.fail_at:
            raise OSError(self.errno, os.strerror(self.errno))


if __name__ == "__main__":
    # A shell lets what it starts in the background ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve()

"""Ten attempts to break out of a sandbox. A program of its own: it runs inside, and says how far each attempt got.

    python -I -c <this file> '{"server": 123, "port": 4567, "folder": "/tmp/…", "processes": 32}'

`measure.py` prepares what the attempts aim at: a listening port and socket, files that anybody may read and write.
Nothing here does harm where it succeeds.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CALLS = {"x86_64": {"keyctl": 250, "ptrace": 101}, "aarch64": {"keyctl": 219, "ptrace": 117}}
_PTRACE_SEIZE, _NEW_USER_NAMESPACE, _SESSION_KEYRING = 0x4206, 0x10000000, -3
_BOMB_PROCESSES = 64
_WATCHDOG_SECONDS = 0.6

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(*values: Any) -> str:
    """The words "got through" if a system call works; raises OSError if not."""
    if _libc.syscall(*values) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return "got through"


def _connect_tcp(aim: dict[str, Any]) -> str:
    with socket.socket() as tcp:
        tcp.settimeout(2)
        tcp.connect(("127.0.0.1", aim["port"]))
    return "connected to the server's port"


def _read_canary(aim: dict[str, Any]) -> str:
    return f"read {len(Path(aim['folder'], 'canary').read_bytes())} bytes of a file of the server"


def _write_canary(aim: dict[str, Any]) -> str:
    Path(aim["folder"], "written").write_text("here")
    return "wrote a file outside"


def _trace_server(aim: dict[str, Any]) -> str:
    _call(_CALLS[platform.machine()]["ptrace"], _PTRACE_SEIZE, aim["server"], None, None)
    return "traces the server"


def _read_environment(aim: dict[str, Any]) -> str:
    # In a PID namespace this number can belong to a process inside, which has no such variable.
    if aim["secret"].encode() not in Path(f"/proc/{aim['server']}/environ").read_bytes():
        raise OSError("there is another process with this number")
    return "read the server's environment"


def _unshare(aim: dict[str, Any]) -> str:
    del aim
    if _libc.unshare(ctypes.c_int(_NEW_USER_NAMESPACE)) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return "made a user namespace, in which it has all capabilities"


def _read_keys(aim: dict[str, Any]) -> str:
    del aim
    _call(_CALLS[platform.machine()]["keyctl"], 0, ctypes.c_long(_SESSION_KEYRING), 0)
    return "reached the keyring of the kernel"


def _connect_unix(aim: dict[str, Any]) -> str:
    reached = []
    for name in (aim["folder"] + "/socket", "\0" + aim["abstract"]):
        try:
            with socket.socket(socket.AF_UNIX) as local:
                local.connect(name)
            reached.append("abstract" if name.startswith("\0") else "named")
        except OSError as error:
            last = error
    if not reached:
        raise last
    return f"connected to a Unix socket of the server ({', '.join(reached)})"


def _allocate(aim: dict[str, Any]) -> str:
    del aim
    # Not touched, so that it costs nothing where it succeeds.
    with mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        return f"has {len(held) >> 20} MB in one piece"


def _bomb(aim: dict[str, Any]) -> str:
    """Starts more processes than are allowed; they only wait."""
    children: list[int] = []
    try:
        for _ in range(aim["processes"] + _BOMB_PROCESSES):
            child = os.fork()
            if child == 0:
                time.sleep(5)
                os._exit(0)
            children.append(child)
        time.sleep(_WATCHDOG_SECONDS)  # in which the watchdog ends all of this, if there is one
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return f"{len(children)} processes"


ATTEMPTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "connect to TCP": _connect_tcp,
    "read a file outside": _read_canary,
    "write a file outside": _write_canary,
    "trace the server": _trace_server,
    "read the server's environment": _read_environment,
    "make a namespace": _unshare,
    "reach the keyring": _read_keys,
    "connect to a Unix socket": _connect_unix,
    "allocate 1 GB": _allocate,
    "start many processes": _bomb,  # last, as the watchdog may end it
}


def _namespaces() -> dict[str, str]:
    """What distinguishes the namespaces of this process; empty if that is hidden."""
    try:
        return {name: os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "pid", "net", "ipc", "user")}
    except OSError:
        return {}


def main() -> None:
    """Makes all attempts and prints one line of JSON for each, at once."""
    aim = json.loads(sys.argv[1])
    print(json.dumps({"namespaces": _namespaces()}), flush=True)
    for name, attempt in ATTEMPTS.items():
        try:
            held, detail = False, attempt(aim)
        except (OSError, MemoryError, KeyError) as error:
            held, detail = True, f"{type(error).__name__}: {error}".rstrip(": ")
        print(json.dumps({"name": name, "held": held, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()

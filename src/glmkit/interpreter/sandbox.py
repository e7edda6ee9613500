"""A process that may compute and nothing else: start it, watch it, end it with everything it started.

What is kept out and how is decided elsewhere: `tree.py` (which files it sees), `seccomp.py` (which system calls it may
make), `landlock.py` (which paths it may open), `launcher/` (in which order a process gives up its rights). This
module holds the life of a sandbox and its limits. `measure.py` finds out what of it works on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from glmkit.errors import SandboxError
from glmkit.interpreter import tree
from glmkit.interpreter.landlock import Ruleset, path_rules
from glmkit.interpreter.seccomp import system_calls_program


class Level(IntEnum):
    """How far a sandbox keeps code away from the machine."""

    NONE = 0
    WEAK = 1
    REDUCED = 2
    FULL = 3


NAMESPACES = frozenset({"mount", "pid", "net", "ipc"})
_WEAK_LAYERS = frozenset({"rlimits", "environment", "descriptors", "session", "watchdog"})
_REDUCED_LAYERS = _WEAK_LAYERS | {"identity", "landlock", "seccomp"}
LAYERS = {
    Level.FULL: _REDUCED_LAYERS | NAMESPACES,
    Level.REDUCED: _REDUCED_LAYERS,
    Level.WEAK: _WEAK_LAYERS,
}
"""What each level is made of. `identity`: an own user without capabilities. `session`: no terminal."""

LAUNCHER = Path(__file__).with_name("launcher")
_START_SECONDS = 20.0
_END_SECONDS = 3.0
_USER_INSIDE = 1000
_MACHINE_FACTS = ("stat", "meminfo", "cpuinfo", "uptime", "loadavg", "filesystems", "version")
_WATCHED = ("memory_bytes", "disk_bytes", "files", "processes", "open_files")
_PROCESSORS = "/sys/devices/system/cpu"


@dataclass(frozen=True)
class Limits:
    """What everything inside one sandbox may use together, if not said otherwise.

    Args:
        memory_bytes: Memory of all processes; also the private memory of one process, which sees MemoryError then.
        disk_bytes: Size of all files inside. At level FULL they are kept in memory.
        files: Number of files and folders.
        processes: Number of processes and threads.
        cpu_seconds: Processor time of one process.
        open_files: Open files of one process; all together twice as many.
    """

    memory_bytes: int = 1 << 30
    disk_bytes: int = 256 << 20
    files: int = 10_000
    processes: int = 64
    cpu_seconds: int = 600
    open_files: int = 256

    def of_one_process(self) -> dict[str, int]:
        """The limits that the kernel keeps for each process, by their names in `resource`."""
        return {
            "RLIMIT_DATA": self.memory_bytes,
            # Address space is more than memory: libraries, reserves of threads, maps that are shared.
            "RLIMIT_AS": 2 * self.memory_bytes + (2 << 30),
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_NPROC": self.processes + 1,
            "RLIMIT_FSIZE": self.disk_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_STACK": 8 << 20,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


class Process:
    """What was started inside; all of it ends when this is closed, dropped, or when the server ends.

    Args:
        pid: The process, outside, that stands for everything inside.
        data: The working folder (inside: `Sandbox.data_inside`), as this process opens it until it is closed.
        home: The home folder (inside: `Sandbox.home_inside`), likewise; room for sockets and settings.
    """

    def __init__(
        self,
        guard: subprocess.Popen[bytes],
        server: socket.socket,
        pid: int,
        root: Path,
        scratch: list[int],
        folder: Path | None,
    ) -> None:
        self.pid = pid
        self.data = root / "data"
        self.home = root / "home"
        self._guard = guard
        self._server = server
        self._reason: str | None = None
        self._release = weakref.finalize(self, _release, guard, server, scratch, folder)

    def poll(self) -> int | None:
        """The exit status of the started program (128 + signal when killed), None while it runs."""
        code = self._guard.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Waits for the end.

        Raises:
            TimeoutError: It still runs.
        """
        try:
            code = self._guard.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the program still runs after {timeout_seconds} s") from None
        return code if code >= 0 else 128 - code

    def interrupt(self) -> None:
        """Sends SIGINT to the started program; nothing happens if it has ended."""
        with contextlib.suppress(OSError):
            self._server.send(b"i")

    @property
    def reason(self) -> str | None:
        """The limit for which the watchdog ended it: memory, disk, files, processes, open files. None if it did not."""
        if self._reason is None and self.poll() is not None:
            try:
                self._reason = _facts(self._server).get("reason")
            except (OSError, ValueError):
                return None
        return self._reason

    def close(self) -> None:
        """Ends everything inside, whatever it does, and removes its files. Waits until it is gone, less than 1 s."""
        _ = self.reason  # what the watchdog said is asked for now, while it can be
        self._release()

    kill = close


class Sandbox:
    """A place to start one program in, once.

        with Sandbox(Level.FULL, Limits()) as sandbox:
            process = sandbox.start([sys.executable, "-I", "-c", code])

    Args:
        level: How strong. It starts exactly like this or raises SandboxError, never weaker.
        limits: What may be used.
        without: Layers of the level to leave out. Tests show with it what each layer is for; leave it empty.

    Raises:
        SandboxError: If this is not Linux, the level is NONE, or there is no list of system calls for this processor.
    """

    def __init__(self, level: Level, limits: Limits | None = None, *, without: frozenset[str] = frozenset()) -> None:
        if not sys.platform.startswith("linux"):
            raise SandboxError(
                f"code can be isolated on Linux only, this is {sys.platform}",
                hint="run the server in a Linux virtual machine, or without the code interpreter",
            )
        if level not in LAYERS:
            raise SandboxError(f"no code runs at level {level.name}", hint="choose WEAK, REDUCED or FULL")
        self._layers = LAYERS[level] - without
        self._limits = limits or Limits()
        self._process: Process | None = None
        self._folder: Path | None = None
        if "mount" not in self._layers:
            self._folder = Path(tempfile.mkdtemp(prefix="glmkit-sandbox-"))
        inside = {name: str(self._folder / name) if self._folder else path for name, path in tree.OWN_FOLDERS.items()}
        self._own = inside
        self.data_inside = Path(inside["data"])
        """The working folder as the program sees it; /mnt/data at level FULL."""
        self.home_inside = Path(inside["home"])
        """The home folder as the program sees it. Sockets that the host connects to go here."""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        argv: list[str],
        *,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        output: int | None = None,
    ) -> Process:
        """Starts a program inside. Blocks for about 0.1 s. Safe in a process with threads.

        Args:
            argv: Program and arguments; an absolute path. The interpreter, its packages and system libraries are there.
            env: More environment than PATH, HOME, LANG (and TMPDIR below FULL).
            files: Written to the home folder before the program starts: name -> content.
            output: File descriptor that gets stdout and stderr; None: /dev/null. stdin is always /dev/null.

        Raises:
            SandboxError: If any layer of the level cannot be set up, or the program cannot be started.
        """
        if self._process is not None:
            raise SandboxError("a sandbox starts one program, once", hint="make another Sandbox")
        user = _free_user() if os.geteuid() == 0 else None
        if self._folder:
            _make_folders(self._folder, user if "identity" in self._layers else None)
        spec = self._spec(argv, dict(env or {}), user)
        mine, its = socket.socketpair()
        mine.settimeout(_START_SECONDS)
        with its:
            # The only thing that is inherited is this socket.
            inherited: dict[str, Any] = {"pass_fds": (its.fileno(),)}
            if "descriptors" not in self._layers:
                its.set_inheritable(True)
                inherited = {"close_fds": False}
            guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCHER), str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if output is None else output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={},
                start_new_session=True,
                **inherited,
            )
        scratch: list[int] = []
        try:
            mine.sendall(json.dumps(spec).encode() + b"\n")
            message, scratch, _, _ = socket.recv_fds(mine, 1 << 16, 1)
            keeper = _fact(message, "keeper")
            root = Path(f"/proc/self/fd/{scratch[0]}") if scratch else self._folder
            if root is None:
                raise SandboxError("the sandbox could not be started: it has no folder")
            for name, content in (files or {}).items():
                _write_for_inside(root / "home", name, content)
            mine.sendall(b"g")
            _fact(mine.recv(1 << 16), "started")
            mine.settimeout(None)
        except BaseException as error:
            _release(guard, mine, scratch, self._folder)
            if isinstance(error, OSError) and not isinstance(error, SandboxError):
                raise SandboxError(f"the sandbox could not be started: {error}", hint=_CURE) from error
            raise
        self._process = Process(guard, mine, keeper, root, scratch, self._folder)
        return self._process

    def close(self) -> None:
        """Ends what runs and removes every trace. May be called twice."""
        if self._process is not None:
            self._process.close()
        elif self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _spec(self, argv: list[str], env: dict[str, str], user: int | None) -> dict[str, Any]:
        """What the launcher is told; all decisions are in it."""
        files, layers = tree.read_only(), self._layers
        base = {"PATH": os.path.dirname(sys.executable), "HOME": str(self.home_inside), "LANG": "C.UTF-8"}
        if self._folder:
            base["TMPDIR"] = self._own["tmp"]
        if "environment" not in layers:
            base = {**os.environ, **base}
        rules = self._rules(files)
        signals_are_scoped = "pid" in layers or ("landlock" in layers and rules.scopes_signals)
        namespaces = layers & NAMESPACES
        outside = os.geteuid(), os.getegid()
        return {
            "layers": sorted(layers),
            "argv": argv,
            "env": {**base, **env},
            "folder": str(self.data_inside),
            "host_folder": str(self._folder) if self._folder else None,
            "tree": tree.as_json(files, disk_bytes=self._limits.disk_bytes, file_count=self._limits.files),
            "landlock": rules.as_json(),
            "seccomp": _system_calls(signals_are_scoped).hex(),
            "rlimits": self._limits.of_one_process(),
            "watched": {name: getattr(self._limits, name) for name in _WATCHED},
            "user": _USER_INSIDE if namespaces else user,
            "maps_root": user is not None,
            "uid_map": _map(outside[0], user),
            "gid_map": _map(outside[1], user),
        }

    def _rules(self, files: tree.ReadOnly) -> Ruleset:
        own = tuple(self._own.values())
        listed: tuple[str, ...]
        readable: tuple[str, ...]
        if self._folder is None:
            # All that there is may be seen, so this is a second wall around what the new root leaves out.
            listed, readable = ("/",), (*files.readable, "/etc", "/proc", "/dev")
        else:
            listed, readable = (), (*files.readable, *(f"/proc/{name}" for name in _MACHINE_FACTS), _PROCESSORS)
        return path_rules(listed=listed, readable=readable, runnable=files.runnable, own=own, devices=tree.DEVICES)


_CURE = "docs/interpreter.md, section Isolation, says what each layer needs"


def _system_calls(signals_are_scoped: bool) -> bytes:
    try:
        return system_calls_program(signals_are_scoped=signals_are_scoped)
    except ValueError as error:
        raise SandboxError(str(error), hint="run without the code interpreter") from error


def _map(outside: int, free: int | None) -> list[str]:
    """Users (or groups) inside -> outside. Root is there for setting up only, and is given up."""
    if free is None:
        return [f"{_USER_INSIDE} {outside} 1"]
    return [f"0 {outside} 1", f"{_USER_INSIDE} {free} 1"]


def _free_user() -> int:
    """A user that nobody is: what a server that runs as root becomes inside."""
    ranges = [[int(number) for number in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, count = max(((row[0], row[2]) for row in ranges), key=lambda row: row[1])
    last = min(first + count, 1 << 31) - 2
    return last - secrets.randbelow(max((last - first) // 2, 1))


def _make_folders(folder: Path, user: int | None) -> None:
    for path in (folder, *(folder / name for name in tree.OWN_FOLDERS)):
        path.mkdir(mode=0o700, exist_ok=True)
        if user is not None:
            os.chown(path, user, user)


def _write_for_inside(folder: Path, name: str, content: bytes) -> None:
    """Writes a new file that belongs to whom the folder belongs to."""
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        if os.geteuid() == 0:
            owner = os.stat(folder)
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _facts(server: socket.socket) -> dict[str, Any]:
    """The last of what the guard said."""
    lines = server.recv(1 << 16, socket.MSG_DONTWAIT).splitlines()
    facts: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return facts


def _fact(message: bytes, name: str) -> int:
    facts = json.loads(message.splitlines()[0]) if message.endswith(b"\n") else {}
    if name not in facts:
        said = facts.get("error", "it ended while being set up")
        raise SandboxError(f"the sandbox could not be started: {said}", hint=_CURE)
    return int(facts[name])


def _release(guard: subprocess.Popen[bytes], server: socket.socket, scratch: list[int], folder: Path | None) -> None:
    """Ends the guard, which ends everything else; then nothing is left."""
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_WR)  # the guard takes this for the end of the server
    try:
        guard.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()
    server.close()
    for descriptor in scratch:
        os.close(descriptor)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)

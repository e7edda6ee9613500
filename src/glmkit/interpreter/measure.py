"""What of the sandbox works on this machine, found out by ten attempts to break out of a really started one.

A kernel's version and the container around it say little about what is really kept out. So the attempts of `probes.py`
run inside, against a port, a socket and files of this process that anybody may use, and the level is what stood them.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmkit.errors import SandboxError
from glmkit.interpreter.probes import ATTEMPTS
from glmkit.interpreter.sandbox import Level, Limits, Process, Sandbox

_PROBES = Path(__file__).with_name("probes.py")
_LIMITS = Limits(memory_bytes=512 << 20, disk_bytes=16 << 20, files=100, processes=32, cpu_seconds=20)
_SECONDS = 20.0
_MOST_BYTES = 1 << 16
_HELD_BY_LIMITS = frozenset({"allocate 1 GB", "start many processes"})

_SENTENCES = {
    Level.FULL: (
        "Isolated: no network, own files only, own processes only.",
        "完全隔离：无网络，只能访问自己的文件和进程。",
    ),
    Level.REDUCED: (
        "Reduced isolation: no network, own files only; it shares the system's kernel objects, and sees that other "
        "processes exist.",
        "部分隔离：无网络，只能访问自己的文件；但与系统共享内核对象，能看到其他进程的存在。",
    ),
    Level.WEAK: (
        "NOT isolated: code can read your files and use the network; only memory and processes are limited.",
        "未隔离：代码可以读取您的文件并使用网络；仅限制内存和进程数。",
    ),
    Level.NONE: (
        "The code interpreter is off: code cannot be isolated here.",
        "代码解释器已关闭：此机器无法隔离代码。",
    ),
}


@dataclass(frozen=True)
class Probe:
    """One attempt: `held` is True if it was stopped; `detail` is what happened."""

    name: str
    held: bool
    detail: str


@dataclass(frozen=True)
class Measured:
    """The level that was reached, how each attempt ended, and one sentence for the user."""

    level: Level
    probes: tuple[Probe, ...]
    sentence_en: str
    sentence_zh: str


def measure(minimum: Level = Level.REDUCED) -> Measured:
    """Starts sandboxes from FULL down to `minimum` and tries to break out of them. Blocks for about 1 s.

    Args:
        minimum: The weakest level that will do. Weaker ones are not tried.

    Returns:
        The strongest level that held.

    Raises:
        SandboxError: If less than `minimum` is reached; it says what got through or is missing.
    """
    failures = []
    for level in (Level.FULL, Level.REDUCED, Level.WEAK):
        if level < max(minimum, Level.WEAK):
            break
        try:
            probes, separate = _attempt(level)
        except SandboxError as error:
            failures.append(f"{level.name}: {error.message}")
            continue
        reached = _level(level, probes, separate=separate)
        if reached >= minimum and reached is not Level.NONE:
            return Measured(reached, probes, *_SENTENCES[reached])
        passed = [f"{probe.name} ({probe.detail})" for probe in probes if not probe.held]
        failures.append(f"{level.name}: got through: {', '.join(passed) or 'namespaces are shared'}")
    raise SandboxError(
        f"code cannot be isolated here as asked for (at least {minimum.name}):\n  " + "\n  ".join(failures),
        hint="allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0, "
        "user.max_user_namespaces=10000; in Docker --security-opt seccomp=unconfined and systempaths=unconfined), "
        "install Python where every user can read it, or run without the code interpreter",
    )


def _level(started: Level, probes: tuple[Probe, ...], *, separate: bool) -> Level:
    """The level by what stood the attempts, at most the one that was started."""
    passed = {probe.name for probe in probes if not probe.held}
    if not passed:
        return min(started, Level.FULL if separate else Level.REDUCED)
    return Level.NONE if passed & _HELD_BY_LIMITS else Level.WEAK


def _attempt(level: Level) -> tuple[tuple[Probe, ...], bool]:
    """Runs the attempts at one level.

    Returns:
        How they ended, and whether all namespaces are others than ours.
    """
    with _aim() as aim, Sandbox(level, _LIMITS) as sandbox:
        reading, writing = os.pipe()
        with open(reading, "rb") as results:
            with open(writing, "wb"):
                argv = [sys.executable, "-I", "-S", "-c", _PROBES.read_text(encoding="utf-8"), json.dumps(aim)]
                process = sandbox.start(argv, output=writing)
            said = _lines(process, results.fileno())
    namespaces: dict[str, str] = next((fact["namespaces"] for fact in said if "namespaces" in fact), {})
    separate = bool(namespaces) and all(
        os.readlink(f"/proc/self/ns/{name}") != inside for name, inside in namespaces.items()
    )
    ended = {fact["name"]: Probe(fact["name"], fact["held"], fact["detail"]) for fact in said if "name" in fact}
    missing = [name for name in ATTEMPTS if name not in ended]
    if missing == ["start many processes"] and process.reason is not None:
        ended[missing[0]] = Probe(missing[0], True, "ended by the watchdog")
    elif missing:
        raise SandboxError(f"the attempts ended before {missing[0]!r} with status {process.poll()}")
    return tuple(ended[name] for name in ATTEMPTS), separate


def _lines(process: Process, results: int) -> list[dict[str, Any]]:
    """What the attempts said until they ended, a bounded amount."""
    try:
        process.wait(_SECONDS)
    except TimeoutError:
        process.close()
    os.set_blocking(results, False)
    try:
        said = os.read(results, _MOST_BYTES)
    except BlockingIOError:
        said = b""
    facts = []
    for line in said.splitlines():
        try:
            facts.append(json.loads(line))
        except ValueError:
            continue
    return [fact for fact in facts if isinstance(fact, dict)]


@contextmanager
def _aim() -> Iterator[dict[str, Any]]:
    """What the attempts aim at. Open to everybody, so that nothing but the sandbox stands before it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glmkit-probe-")))
        folder.chmod(0o777)
        (folder / "canary").write_text("readable\n")
        (folder / "canary").chmod(0o644)
        tcp = stack.enter_context(socket.socket())
        tcp.bind(("127.0.0.1", 0))
        abstract = f"glmkit-probe-{secrets.token_hex(8)}"
        for name in (str(folder / "socket"), "\0" + abstract):
            local = stack.enter_context(socket.socket(socket.AF_UNIX))
            local.bind(name)
            local.listen()
        (folder / "socket").chmod(0o666)
        tcp.listen()
        environment = Path("/proc/self/environ").read_bytes()[:64].decode(errors="replace")
        yield {
            "server": os.getpid(),
            "port": tcp.getsockname()[1],
            "folder": str(folder),
            "abstract": abstract,
            "secret": environment.split("\0")[0],
            "processes": _LIMITS.processes,
        }

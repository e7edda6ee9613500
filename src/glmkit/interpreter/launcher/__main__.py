"""How a program is started in a sandbox and watched until its end. A program of its own.

The server starts it as `python -I -S <this folder> FD` and never forks itself: it has threads and weights. Standard
library only. It takes one JSON object from the socket FD (written by `sandbox.py`) and decides nothing: which files,
system calls, paths and numbers is said there. A step that fails ends it with the step's name; nothing is left out.

    guard      outside all namespaces; holds the socket to the server; counts memory; ends everything when the socket
      |        closes, however the server died
    keeper     first process of the PID namespace, without rights; collects orphans
      |
    program    what was asked for
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from glmkit.interpreter.launcher import rights, usage
    from glmkit.interpreter.launcher.rights import StepFailedError
else:  # this folder is all that is on the path
    import rights
    import usage
    from rights import StepFailedError

_TICK_SECONDS = 0.1
_TICKS_BETWEEN_WALKS = 5
_MAX_SPEC_BYTES = 1 << 20
_NICENESS = 10  # the model that computes beside it comes first
_KILLED = 128 + signal.SIGKILL


def _keep(spec: dict[str, Any], guard: socket.socket) -> NoReturn:
    """The keeper: gives up all rights, starts the program in what is left, and collects orphans until it ends."""
    layers, tasks = spec["layers"], 0
    if guard.recv(16) != b"yours":
        os._exit(1)
    if "pid" not in layers:
        tasks = usage.tasks_of_user(os.getuid() if spec["user"] is None else spec["user"])
    scratch = []
    rights.go_first_without_memory()
    if "mount" in layers:
        scratch = [rights.enter_new_root(spec["tree"], own_processes="pid" in layers)]
    if "ipc" in layers:
        rights.hide_host_name()
    os.umask(0o077)
    if "identity" in layers:
        rights.drop_identity(spec["user"])
    rights.end_with_parent()
    rights.close_memory()
    rights.gain_nothing_by_exec()
    if "landlock" in layers:
        rights.restrict_paths(spec["landlock"])
    if "rlimits" in layers:
        rights.limit(spec["rlimits"], tasks_of_user=tasks)
        os.nice(_NICENESS)
    # A guard that ended before it could be noticed is noticed here.
    socket.send_fds(guard, [b"ready"], scratch)
    if guard.recv(16) != b"go":
        os._exit(1)
    for descriptor in scratch:
        os.close(descriptor)
    program = _start_program(spec)
    guard.send(b"started")
    guard.close()
    if "seccomp" in layers:
        rights.filter_system_calls(bytes.fromhex(spec["seccomp"]))
    while True:
        ended, status = os.wait()
        if ended == program:
            os._exit(_exit_code(status))


def _start_program(spec: dict[str, Any]) -> int:
    layers = spec["layers"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            rights.end_with_parent()
            for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.chdir(spec["folder"])
            if "session" in layers:
                os.setsid()
            if "descriptors" in layers:
                os.dup2(writing, 3, inheritable=False)
                os.closerange(4, 1 << 20)
                writing = 3
            if "seccomp" in layers:
                rights.filter_system_calls(bytes.fromhex(spec["seccomp"]))
            os.execve(spec["argv"][0], spec["argv"], spec["env"])
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(127)
    os.close(writing)
    with open(reading, "rb") as pipe:
        problem = pipe.read(4096)
    if problem:
        raise StepFailedError(f"start {spec['argv'][0]}: {problem.decode(errors='replace')}")
    return child


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _begin(spec: dict[str, Any]) -> tuple[int, socket.socket]:
    """Starts the keeper, in new namespaces if there shall be any; returns its number and a socket to it."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    namespaces = [name for name in rights.NAMESPACES if name in spec["layers"]]
    first = os.fork()
    if first == 0:
        mine.close()
        _reported(its, lambda: _enter(spec, namespaces, its))
    its.close()
    if not namespaces:
        mine.send(b"yours")
        return first, mine
    _expect(mine, b"unshared")
    # Written from here: only a process outside may map more than one user.
    if not spec["maps_root"]:
        _write(f"/proc/{first}/setgroups", "deny")
    _write(f"/proc/{first}/uid_map", "\n".join(spec["uid_map"]))
    _write(f"/proc/{first}/gid_map", "\n".join(spec["gid_map"]))
    mine.send(b"mapped")
    keeper = int(_expect(mine, b"keeper ").split()[1])
    os.waitpid(first, 0)  # the keeper is now a child of this process
    mine.send(b"yours")
    return keeper, mine


def _enter(spec: dict[str, Any], namespaces: list[str], guard: socket.socket) -> None:
    if os.geteuid() == 0 and "identity" in spec["layers"]:
        os.setgroups([])
    if namespaces:
        rights.enter_new_namespaces(namespaces)
        guard.send(b"unshared")
        _expect(guard, b"mapped")
        # Only children are in the new PID namespace.
        keeper = os.fork()
        if keeper:
            guard.send(b"keeper %d" % keeper)
            os._exit(0)
    _keep(spec, guard)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, text.encode())  # at once: a map can be written only once
    os.close(descriptor)


def _reported(guard: socket.socket, work: Callable[[], None]) -> NoReturn:
    try:
        work()
    except BaseException as error:
        guard.send(f"failed {error}"[:2000].encode())
    os._exit(1)


def _expect(other: socket.socket, beginning: bytes) -> bytes:
    message = other.recv(4096)
    if not message.startswith(beginning):
        raise StepFailedError(_problem(message))
    return message


def _problem(message: bytes) -> str:
    return message.decode(errors="replace").removeprefix("failed ") or "it ended while being set up"


def _watch(spec: dict[str, Any], keeper: int, server: socket.socket) -> tuple[int, str | None]:
    """Waits for the end: of the program, of the server, or by a limit. Returns exit code and the limit's name."""
    handle = os.pidfd_open(keeper)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(server, select.POLLIN)
    tick = 0
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(_TICK_SECONDS * 1000)}
        if handle in ready:
            return _exit_code(os.waitpid(keeper, 0)[1]), None
        if server.fileno() in ready:
            message = server.recv(1)
            if not message:
                return _KILLED, None
            if message == b"i":
                usage.interrupt_eldest_child(keeper)
        if "watchdog" in spec["layers"]:
            tick += 1
            reason = usage.excess(spec["watched"], usage.descendants(os.getpid()))
            if reason is None and spec["host_folder"] and tick % _TICKS_BETWEEN_WALKS == 0:
                reason = usage.excess_of_files(spec["watched"], spec["host_folder"])
            if reason:
                return _KILLED, reason


def _guard(spec: dict[str, Any], server: socket.socket) -> int:
    """Starts what is asked for, watches it, and leaves nothing behind."""
    code, reason = 1, None
    try:
        usage.check_children_are_listed()
        rights.collect_orphans()
        keeper, channel = _begin(spec)
        message, descriptors, _, _ = socket.recv_fds(channel, 4096, 1)
        if message != b"ready":
            raise StepFailedError(_problem(message))
        socket.send_fds(server, [b'{"keeper": %d}\n' % keeper], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        if server.recv(1) == b"g":
            channel.send(b"go")
            _expect(channel, b"started")
            _tell(server, {"started": True})
            code, reason = _watch(spec, keeper, server)
    except (OSError, StepFailedError, ValueError) as error:
        _tell(server, {"error": str(error)})
    usage.end_descendants()
    if spec["host_folder"]:
        shutil.rmtree(spec["host_folder"], ignore_errors=True)
    _tell(server, {"ended": code, "reason": reason})
    return code


def _tell(server: socket.socket, fact: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the server may be gone
        server.send(json.dumps(fact).encode() + b"\n")


def main() -> int:
    """Reads what is asked for and does it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # its end is the end of the socket, so that it can clean up
    server = socket.socket(fileno=int(sys.argv[1]))
    with server.makefile("rb") as reader:
        said = reader.readline(_MAX_SPEC_BYTES)
    return _guard(json.loads(said), server) if said.endswith(b"\n") else 1


if __name__ == "__main__":
    sys.exit(main())

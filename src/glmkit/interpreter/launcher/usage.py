"""What all processes of a sandbox use together, counted from outside; and the end of all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import time

_BESIDE_DATA_BYTES = 32 << 20
"""The keeper, and the stacks of a process that has reached its own limit of data and shall see MemoryError."""


def tasks_of_user(user: int) -> int:
    """Processes and threads that count against RLIMIT_NPROC already."""
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def descendants(of: int) -> list[int]:
    """All processes below one. Orphans inside come back to the keeper or the guard, so none is missed."""
    found, waiting = [], [of]
    while waiting:
        parent = waiting.pop()
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children", encoding="utf-8") as file:
                    waiting += map(int, file.read().split())
        except OSError:
            continue
        found.append(parent)
    return [pid for pid in found if pid != of]


def check_children_are_listed() -> None:
    """Raises OSError if this kernel does not say which children a process has; then nothing here could be trusted."""
    with open(f"/proc/self/task/{os.getpid()}/children", "rb"):
        pass


def _fields(pid: int, file_name: str, names: tuple[str, ...]) -> int | None:
    """The sum of some fields of a file in /proc; None if it cannot be read."""
    try:
        with open(f"/proc/{pid}/{file_name}", encoding="utf-8", errors="replace") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(names))
    except OSError:
        return None


def _open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def excess(limits: dict[str, int], pids: list[int]) -> str | None:
    """Which limit everything inside has passed together."""
    if sum(_fields(pid, "status", ("Threads:",)) or 0 for pid in pids) > limits["processes"] + 8:
        return "processes"
    # Sockets and pipes hold memory of the kernel that no other number shows.
    if sum(map(_open_files, pids)) > 2 * limits["open_files"]:
        return "open files"
    # Not what is mapped from files: libraries, which the machine holds once.
    memory_kb = (limits["memory_bytes"] + _BESIDE_DATA_BYTES) // 1024
    resident = {pid: _fields(pid, "status", ("RssAnon:", "RssShmem:", "VmSwap:")) or 0 for pid in pids}
    # This counts memory that processes share several times, so it only raises the question.
    if sum(resident.values()) > memory_kb:
        shares = {pid: _fields(pid, "smaps_rollup", ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")) for pid in pids}
        if sum(resident[pid] if share is None else share for pid, share in shares.items()) > memory_kb:
            return "memory"
    return None


def excess_of_files(limits: dict[str, int], folder: str) -> str | None:
    """Which limit the files of a folder have passed."""
    size = count = 0
    for parent, folders, files, descriptor in os.fwalk(folder, follow_symlinks=False):
        del parent
        count += len(folders) + len(files)
        for name in files:
            try:
                size += os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_blocks * 512
            except OSError:
                continue
        if size > limits["disk_bytes"] or count > limits["files"]:
            return "disk" if size > limits["disk_bytes"] else "files"
    return None


def interrupt_eldest_child(keeper: int) -> None:
    """Sends SIGINT to the program: the keeper's eldest child."""
    with open(f"/proc/{keeper}/task/{keeper}/children", encoding="utf-8") as file:
        children = file.read().split()
    if children:
        os.kill(int(children[0]), signal.SIGINT)


def end_descendants() -> None:
    """Kills until nothing is left. With a PID namespace the kernel does it when the keeper dies."""
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)

"""What all processes of a sandbox use together, counted from outside; and the end of all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import time


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


def _sum_of_fields(pids: list[int], file_name: str, fields: tuple[str, ...]) -> int:
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/{file_name}", encoding="utf-8", errors="replace") as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith(fields))
        except OSError:
            continue
    return total


def excess(limits: dict[str, int], pids: list[int]) -> str | None:
    """Which limit everything inside has passed together."""
    if _sum_of_fields(pids, "status", ("Threads:",)) > limits["processes"] + 8:
        return "processes"
    memory = limits["memory_bytes"] // 1024
    # The quick sum counts memory that processes share several times, so it only raises the question.
    if _sum_of_fields(pids, "status", ("VmRSS:", "VmSwap:")) > memory:
        exact = _sum_of_fields(pids, "smaps_rollup", ("Pss:", "SwapPss:"))
        if exact > memory or exact == 0:
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

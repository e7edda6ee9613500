"""What the system says about this machine: processor, memory, pages, limits of a container; without torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys")
PROCESSES = Path("/proc")
HUGE_PAGES = "kernel/mm/transparent_hugepage/enabled"


def cpu() -> dict[str, Any]:
    """The CPU as this process may use it.

    Returns:
        name, architecture; cores and hardware_threads on which the process may run; and quota, how many of them it may
        use at a time where a container limits that, else None.
    """
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    siblings = {
        read_text(SYSTEM / f"devices/system/cpu/cpu{i}/topology/thread_siblings_list") or str(i) for i in usable
    }
    named = [
        line.partition(":")[2].strip() for line in read_lines(PROCESSES / "cpuinfo") if line.startswith("model name")
    ]
    limit = read_text(SYSTEM / "fs/cgroup/cpu.max").split()
    return {
        "name": named[0] if named else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(siblings),
        "hardware_threads": len(usable),
        "quota": int(limit[0]) / int(limit[1]) if len(limit) == 2 and limit[0] != "max" else None,
    }


def memory_bytes(name: str) -> int | None:
    """A size that the system states about its memory.

    Args:
        name: As in /proc/meminfo: "MemTotal", "MemAvailable" …

    Returns:
        Bytes; None where the system does not say it.
    """
    for line in read_lines(PROCESSES / "meminfo"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def container_bytes() -> tuple[int, int] | None:
    """The memory that a container may use, and what of it is in use.

    Files that were read and can be forgotten are counted as used by the system; here they are not, or a container that
    has read a model once would seem to be full.

    Returns:
        Both in bytes; None where there is no limit.
    """
    group = SYSTEM / "fs/cgroup"
    limit, used = (read_text(group / name) for name in ("memory.max", "memory.current"))
    if not (limit.isdigit() and used.isdigit()):
        return None
    kept = [int(line.split()[1]) for line in read_lines(group / "memory.stat") if line.startswith("inactive_file ")]
    return int(limit), max(0, int(used) - sum(kept))


def free_memory_bytes() -> int | None:
    """The memory that is free on this machine, or in the container that the process runs in.

    Returns:
        Bytes; None where the system does not say it.
    """
    free, container = memory_bytes("MemAvailable"), container_bytes()
    if container is None:
        return free
    left = max(0, container[0] - container[1])
    return left if free is None else min(free, left)


def huge_pages() -> str | None:
    """When Linux gives pages of 2 MiB: "always", "madvise" or "never"; None where that is not known."""
    return read_text(SYSTEM / HUGE_PAGES).partition("[")[2].partition("]")[0] or None


def numa_nodes() -> int:
    """How many parts the memory has that are nearer to some cores than to others; at least 1."""
    return max(1, len(list(SYSTEM.glob("devices/system/node/node[0-9]*"))))


def openmp_libraries() -> list[str]:
    """The OpenMP libraries that this process has loaded; with two of them threads compete."""
    names = {Path(line.split()[-1]).name for line in read_lines(PROCESSES / "self/maps") if "omp" in line.split()[-1]}
    return sorted(  # without the copies that wheels bring under names of their own
        name for name in names if name.startswith(("libgomp.", "libomp.", "libiomp5."))
    )


def read_lines(path: Path) -> list[str]:
    """The lines of a file of the system; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def read_text(path: Path) -> str:
    """The text of a file of the system in one line; "" where it cannot be read."""
    return " ".join(read_lines(path)).strip()

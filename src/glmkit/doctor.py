"""What this machine computes with, and what would make it faster: `glm doctor`.

    diagnose()   facts -> hints      plain values, ready for JSON
    describe()   the same as lines to read

Nothing here imports transformers: a doctor must also work where the patient does not.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from glmkit import devices
from glmkit.errors import GlmkitError
from glmkit.kernels import build
from glmkit.kernels.levels import TORCH, VARIABLE

_SYSTEM = Path("/sys")
_PROCESSES = Path("/proc")
_HUGE_PAGES = "kernel/mm/transparent_hugepage/enabled"


def diagnose() -> dict[str, Any]:
    """Looks at the machine, and builds the native code if that was not done yet.

    Returns:
        Plain values ready for JSON: versions, cpu, torch_threads, openmp, memory_bytes (total, available), huge_pages,
        numa_nodes, devices (name, memory_bytes), kernels (the fields of `glmkit.kernels.build.Status`, and problem),
        runs_on (kind of weight -> what multiplies with it) and hints (what could be better, and the cure).
    """
    kernels = _kernels()
    found: dict[str, Any] = {
        "schema": 1,
        "versions": _versions(),
        "cpu": cpu(),
        "torch_threads": torch.get_num_threads(),
        "openmp": _openmp_runtimes(),
        "memory_bytes": {"total": memory_bytes("MemTotal"), "available": memory_bytes("MemAvailable")},
        "huge_pages": huge_pages(),
        "numa_nodes": max(1, len(list(_SYSTEM.glob("devices/system/node/node[0-9]*")))),
        "devices": devices.described(),
        "kernels": kernels,
        "runs_on": _runs_on(kernels["level"]),
    }
    return found | {"hints": [*_thread_hints(found), *_kernel_hints(found), *_memory_hints(found)]}


def cpu() -> dict[str, Any]:
    """The CPU as this process may use it.

    Returns:
        name, architecture; cores and hardware_threads on which the process may run; and quota, how many of them it may
        use at a time where a container limits that, else None.
    """
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    siblings = {_text(_SYSTEM / f"devices/system/cpu/cpu{i}/topology/thread_siblings_list") or str(i) for i in usable}
    named = [line.partition(":")[2].strip() for line in _lines(_PROCESSES / "cpuinfo") if line.startswith("model name")]
    limit = _text(_SYSTEM / "fs/cgroup/cpu.max").split()
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
    for line in _lines(_PROCESSES / "meminfo"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def huge_pages() -> str | None:
    """When Linux gives pages of 2 MiB: "always", "madvise" or "never"; None where that is not known."""
    return _text(_SYSTEM / _HUGE_PAGES).partition("[")[2].partition("]")[0] or None


def describe(found: dict[str, Any]) -> str:
    """Turns what `diagnose` found into lines to read.

    Args:
        found: Its result.
    """
    cpu, kernels, memory = found["cpu"], found["kernels"], found["memory_bytes"]
    cores = "1 core" if cpu["cores"] == 1 else f"{cpu['cores']} cores"
    quota = f", of which a container may use {cpu['quota']:g}" if cpu["quota"] else ""
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("CPU", f"{cpu['name']} ({cpu['architecture']}): {cores}, {cpu['hardware_threads']} hardware threads{quota}"),
        ("threads", f"torch uses {found['torch_threads']}"),
        ("memory", f"{_gigabytes(memory['total'])}, {_gigabytes(memory['available'])} available"),
        ("huge pages", found["huge_pages"] or "unknown"),
        ("NUMA nodes", str(found["numa_nodes"])),
        (
            "devices",
            ", ".join(f"{one['name']} ({_gigabytes(one['memory_bytes'])})" for one in found["devices"]) or "CPU",
        ),
        ("kernels", f"{kernels['level'] or 'none'}: {kernels['problem'] or kernels['why']}"),
        ("features", " ".join(kernels["features"]) or "none that the kernels use"),
        ("compiler", kernels["compiler"] or "none"),
        ("library", kernels["path"] or "none"),
        *found["runs_on"].items(),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {text}" for name, text in rows]
    hints = [f"  - {hint}" for hint in found["hints"]]
    return "\n".join([*lines, "", *(["to be faster:", *hints] if hints else ["nothing to improve"])])


# --- facts ---


def _versions() -> dict[str, str]:
    found = {"glmkit": _version("glmkit"), "Python": platform.python_version(), "torch": torch.__version__}
    return {**found, "transformers": _version("transformers")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> dict[str, Any]:
    """The fields of the kernels' status, with `problem` None; or why there is none, where the user named a level."""
    try:
        status = asdict(build.status())
        return status | {"path": str(status["path"]) if status["path"] else None, "problem": None}
    except GlmkitError as error:
        compiler = build.find_compiler()
        return {
            "level": None,
            "why": None,
            "hint": error.hint,
            "path": None,
            "features": sorted(build.cpu_features()),
            "compiler": compiler[1] if compiler else None,
            "openmp": False,
            "threads": torch.get_num_threads(),
            "problem": error.message,
        }


def _runs_on(level: str | None) -> dict[str, str]:
    """Kind of weight -> what multiplies with it on the CPU."""
    if level is None:
        return {}
    if level == TORCH:
        return {"int8, int4": "torch, which makes a float matrix of them at each product", "float": "torch"}
    return {
        "int8, int4": f"{level} kernels, if the model computes in bfloat16 or float16; in float32 torch, exactly",
        "float": f"torch; tokens one by one with {level} kernels",
    }


def _openmp_runtimes() -> list[str]:
    """The OpenMP libraries that are loaded; with two of them threads compete."""
    names = {Path(line.split()[-1]).name for line in _lines(_PROCESSES / "self/maps") if "omp" in line.split()[-1]}
    return sorted(
        name for name in names if name.startswith(("libgomp.", "libomp.", "libiomp5."))
    )  # no wheel's own copy


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _text(path: Path) -> str:
    return " ".join(_lines(path)).strip()


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


# --- hints ---


def _thread_hints(found: dict[str, Any]) -> list[str]:
    cpu, threads, given = found["cpu"], found["torch_threads"], os.environ.get("OMP_NUM_THREADS")
    room = min(cpu["cores"], max(1, int(cpu["quota"])) if cpu["quota"] else cpu["cores"])
    hints = []
    if given is not None and not (given.isdigit() and int(given) > 0):
        hints.append(f"OMP_NUM_THREADS={given} is no number of threads: OMP_NUM_THREADS={room}")
    elif threads > room:
        limit = "cores" if room == cpu["cores"] else "cores that the container may use"
        hints.append(f"torch uses {threads} threads on {room} {limit}, they take turns: OMP_NUM_THREADS={room}")
    elif threads < room:
        why = f"OMP_NUM_THREADS={given}: " if given else ""
        hints.append(f"{why}torch uses {threads} of {room} cores: OMP_NUM_THREADS={room}")
    if len(found["openmp"]) > 1:
        hints.append(
            f"{' and '.join(found['openmp'])} are loaded, and their threads compete: CXX=g++, which takes torch's"
        )
    return hints


def _kernel_hints(found: dict[str, Any]) -> list[str]:
    kernels, hints = found["kernels"], []
    if kernels["problem"]:
        hints.append(kernels["problem"] + (f"; {kernels['hint']}" if kernels["hint"] else ""))
    elif VARIABLE in os.environ:
        hints.append(f"{VARIABLE}={os.environ[VARIABLE]} is set: without it the best level is taken")
    elif kernels["level"] == TORCH:
        hints.append(f"no native kernels ({kernels['why']}): {kernels['hint'] or 'torch computes'}")
    elif kernels["hint"]:
        hints.append(f"{kernels['why']}: {kernels['hint']}")
    if kernels["path"] and not kernels["openmp"]:
        hints.append(
            f"the kernels use one thread, {kernels['compiler']} has no OpenMP: another CXX, and rm {kernels['path']}"
        )
    return hints


def _memory_hints(found: dict[str, Any]) -> list[str]:
    hints = []
    if found["huge_pages"] == "never":
        hints.append(
            "pages of 2 MiB are switched off, and weights are read more slowly: "
            f"echo madvise | sudo tee {_SYSTEM / _HUGE_PAGES}"
        )
    if found["numa_nodes"] > 1:
        hints.append(
            f"memory is divided over {found['numa_nodes']} nodes, and a model lies on the one that read it: "
            "numactl --interleave=all glm …"
        )
    return hints

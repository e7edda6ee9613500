"""Checks of processor, threads, memory, accelerators and limits."""

from __future__ import annotations

import os
import re
from pathlib import Path

from glmkit import machine
from glmkit.doctor.finding import Finding, gigabytes, ok, warn

DEVICES = Path("/dev")
_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}  # of NVIDIA, for the CUDA that torch was built with
_GPU_NODES = {"nvidia0": "NVIDIA", "kfd": "AMD", "davinci0": "Ascend NPU", "cambricon_dev0": "Cambricon MLU"}
_LITTLE_MEMORY = 4 * 10**9  # what ChatGLM3-6B takes with int4 weights
_LITTLE_SHARED = 256 * 2**20
_FEW_FILES = 1024


def cpu() -> Finding:
    """What the processor is, and how much of it the process may use."""
    found = machine.cpu()
    cores = "1 core" if found["cores"] == 1 else f"{found['cores']} cores"
    quota = f", of which a container may use {found['quota']:g}" if found["quota"] else ""
    return ok(
        f"{found['name']} ({found['architecture']}): {cores}, {found['hardware_threads']} hardware threads{quota}"
    )


def threads() -> Finding:
    """Whether torch computes with as many threads as there are cores."""
    import torch

    found, used, given = machine.cpu(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    room = min(found["cores"], max(1, int(found["quota"])) if found["quota"] else found["cores"])
    cure = f"OMP_NUM_THREADS={room}"
    if given is not None and not (given.isdigit() and int(given) > 0):
        return warn(f"OMP_NUM_THREADS={given} is no number of threads", cure)
    if used > room:
        limit = "cores" if room == found["cores"] else "cores that the container may use"
        return warn(f"torch uses {used} threads on {room} {limit}, they take turns", cure)
    if used < room:
        why = f"OMP_NUM_THREADS={given}: " if given else ""
        return warn(f"{why}torch uses {used} of {room} cores", cure)
    return ok(f"torch uses {used}")


def openmp() -> Finding:
    """Whether there is one OpenMP library in the process."""
    found = machine.openmp_libraries()
    if len(found) > 1:
        return warn(f"{' and '.join(found)} are loaded, and their threads compete", "CXX=g++, which takes torch's")
    return ok(found[0] if found else "none is loaded")


def memory() -> Finding:
    """Whether there is memory for a model."""
    total, available = machine.memory_bytes("MemTotal"), machine.memory_bytes("MemAvailable")
    container = machine.container_bytes()
    reason = f"{gigabytes(total)}, {gigabytes(available)} available"
    if container is not None:
        available = machine.free_memory_bytes()
        reason += f"; the container may use {gigabytes(container[0])}, {gigabytes(available)} of it are left"
    if available is not None and available < _LITTLE_MEMORY:
        return warn(
            f"{reason}: less than ChatGLM3-6B takes even with int4 weights",
            "end other programs, or take a smaller model: glm chat glm-nano",
        )
    return ok(reason)


def huge_pages() -> Finding:
    """Whether the system may use pages of 2 MiB."""
    found = machine.huge_pages()
    if found == "never":
        return warn(
            "pages of 2 MiB are switched off, and weights are read more slowly",
            f"echo madvise | sudo tee {machine.SYSTEM / machine.HUGE_PAGES}",
        )
    return ok(found or "unknown")


def numa() -> Finding:
    """Whether the memory is in one piece."""
    nodes = machine.numa_nodes()
    if nodes > 1:
        return warn(
            f"memory is divided over {nodes} nodes, and a model lies on the one that read it",
            "numactl --interleave=all glm …",
        )
    return ok("1 node")


def accelerator() -> Finding:
    """Whether torch can use the accelerator that is in the machine."""
    import torch

    from glmkit import devices

    found = devices.described()
    if found:
        return ok(", ".join(f"{one['name']} ({gigabytes(one['memory_bytes'])})" for one in found))
    present = next((name for node, name in _GPU_NODES.items() if (DEVICES / node).exists()), None)
    if present is None:
        return ok("none: the CPU computes")
    if present == "NVIDIA":
        return _nvidia(torch.__version__, devices.cuda_version())
    if present == "AMD":
        built = getattr(torch.version, "hip", None)
        cure = "the user must be in the groups video and render" if built else "install torch's build for ROCm"
        return warn(f"there is an AMD device, and torch {torch.__version__} does not see it", cure)
    package = "torch-npu" if present == "Ascend NPU" else "torch-mlu"
    return warn(f"there is an {present}, and torch does not see it", f"install {package}, and set up its environment")


def _nvidia(version: str, built: str | None) -> Finding:
    """Why torch does not see an NVIDIA device: its version, and the version of CUDA that it was built for."""
    said = re.search(r" (\d{3})\.(\d+)", machine.read_text(machine.PROCESSES / "driver/nvidia/version"))
    driver = said[0].strip() if said else None
    if built is None:
        return warn(
            f"there is an NVIDIA device, and torch {version} is a build without CUDA",
            "install torch for CUDA: https://pytorch.org/get-started/locally",
        )
    least = _LEAST_DRIVER.get(int(built.partition(".")[0]))
    if said and least and int(said[1]) < least:
        return warn(
            f"the NVIDIA driver is {driver}, and torch {version} for CUDA {built} needs {least} or later",
            "update the driver, or install a torch for an older CUDA",
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES", "x").strip() in ("", "-1"):
        return warn("CUDA_VISIBLE_DEVICES hides the NVIDIA device", "unset CUDA_VISIBLE_DEVICES")
    return warn(f"there is an NVIDIA device (driver {driver or 'unknown'}), and torch does not see it", "nvidia-smi")


def shared_memory() -> Finding:
    """Whether processes can hand each other tensors: containers often get 64 MB."""
    folder = DEVICES / "shm"
    try:
        state = os.statvfs(folder)
    except OSError:
        return ok("none")
    size = state.f_blocks * state.f_frsize
    if size < _LITTLE_SHARED:
        return warn(
            f"{folder} has {size / 1e6:.0f} MB; several processes on accelerators need more", "docker run --shm-size=8g"
        )
    return ok(f"{gigabytes(size)} in {folder}")


def limits() -> Finding:
    """Whether the process may open files, map memory and write files as large as models are."""
    try:
        import resource
    except ImportError:  # Windows
        return ok("none")
    infinite = resource.RLIM_INFINITY
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != infinite and files < _FEW_FILES:
        return warn(f"a process may have {files} files open, fewer than a busy server needs", f"ulimit -n {_FEW_FILES}")
    for kind, what, letter in (
        (resource.RLIMIT_AS, "address space", "v"),
        (resource.RLIMIT_DATA, "data", "d"),
        (resource.RLIMIT_FSIZE, "a file", "f"),
    ):
        size = resource.getrlimit(kind)[0]
        if size != infinite:
            return warn(
                f"{what} may have {gigabytes(size)} at most, and models are large", f"ulimit -{letter} unlimited"
            )
    return ok(f"{'any number of' if files == infinite else files} open files, no limit of sizes")

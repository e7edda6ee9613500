"""The devices of this machine, through `torch.accelerator`: the only module that knows kinds of devices by name.

CUDA (NVIDIA, and AMD or Hygon DCU through ROCm), Ascend NPU (torch-npu), Cambricon MLU (torch-mlu), Intel XPU and
Apple MPS are one to the rest of the package: a kind, a number, memory that may be asked for. What a backend does not
say is None.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from glmkit.errors import UsageError
from glmkit.machine import free_memory_bytes

NAMES = {
    "cuda": "NVIDIA CUDA",
    "npu": "Ascend NPU",
    "mlu": "Cambricon MLU",
    "xpu": "Intel XPU",
    "mps": "Apple MPS",
}
"""Kinds of accelerators that are expected; another that `torch.accelerator` finds works too."""
EXAMPLES = "auto, cpu, " + ", ".join([*NAMES, "cuda:1"])
FLOAT16_DEVICE = "cuda"
"""A device that computes in float16, for counts of memory of the official settings, whether it is here or not."""
CPU = torch.device("cpu")
_HOST = ("cpu", "meta")
_ONE_ONLY = ("mps",)  # there is one, and it has no number


def accelerator() -> torch.device | None:
    """The kind of accelerator that this machine has; None if it has none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def accelerators() -> list[torch.device]:
    """All accelerators of this machine, with their numbers."""
    kind = accelerator()
    return [] if kind is None else [numbered(kind.type, index) for index in range(torch.accelerator.device_count())]


def numbered(kind: str, index: int) -> torch.device:
    """A device of a kind."""
    return torch.device(kind) if kind in (*_HOST, *_ONE_ONLY) else torch.device(kind, index)


def parse_device(device: str | int | torch.device) -> torch.device:
    """The device that a name means, whether this machine has it or not; a kind without a number is its first.

    Args:
        device: A name, the number of an accelerator, or a device.

    Raises:
        UsageError: It is no name of a device.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{device!r} is no device", hint=EXAMPLES) from error
    return numbered(chosen.type, 0) if chosen.index is None else chosen


def choose_device(device: str | int | torch.device) -> torch.device:
    """The device meant by "auto" or a name.

    Args:
        device: "auto" (the accelerator if there is one, else the CPU), a name ("cpu", "cuda:1"), a number of the
            accelerator, or a torch device, which is taken as it is.

    Returns:
        The device.

    Raises:
        UsageError: There is no such device.
    """
    if isinstance(device, torch.device):
        return device
    found = accelerator()
    if device == "auto":
        return found or CPU
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device={device!r} is no device", hint=EXAMPLES) from error
    if chosen.type in _HOST:
        return chosen
    if found is None or found.type != chosen.type:
        here = found.type if found else "no accelerator"
        raise UsageError(f"device={device!r}: this machine has {here}", hint="use device='auto' or 'cpu'")
    if not exists(chosen):
        number = torch.accelerator.device_count()
        raise UsageError(
            f"device={device!r}: this machine has {number} of {chosen.type}", hint=f"{chosen.type}:0 is the first"
        )
    return chosen


def exists(device: torch.device) -> bool:
    """Whether this machine has a device."""
    kind = accelerator()
    if is_host(device):
        return True
    return kind is not None and kind.type == device.type and (device.index or 0) < torch.accelerator.device_count()


def is_host(device: torch.device) -> bool:
    """Whether tensors there are in the memory of the process, or nowhere."""
    return device.type in _HOST


def described() -> list[dict[str, Any]]:
    """Name and memory of every accelerator.

    Returns:
        For each {"name": "cuda:0 NVIDIA A100", "memory_bytes": 42 … or None}.
    """
    found = []
    for device in accelerators():
        ask = getattr(_module(device), "get_device_properties", None)
        properties = ask(device.index or 0) if ask is not None else None
        name = getattr(properties, "name", "") or NAMES.get(device.type, "")
        # ROCm calls itself CUDA; what it really is stands in the build of torch.
        platform = " (ROCm)" if device.type == "cuda" and getattr(torch.version, "hip", None) else ""
        found.append(
            {"name": f"{device} {name}{platform}".strip(), "memory_bytes": getattr(properties, "total_memory", None)}
        )
    return found


def cuda_version() -> str | None:
    """The version of CUDA that torch was built for; None if it is another build."""
    return torch.version.cuda


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free here and now, for one process.

    Args:
        device: An accelerator, or the CPU, where the limit of a container counts too.

    Returns:
        Bytes; None if nobody can tell, or there is no such device.
    """
    if device.type == "cpu":
        return free_memory_bytes()
    ask = getattr(_module(device), "mem_get_info", None)
    return int(ask(device)[0]) if ask is not None and exists(device) else None


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use so far.

    Args:
        device: An accelerator counts its own allocations; on a CPU the whole process counts.

    Returns:
        Bytes; 0 if nobody can tell.
    """
    if device.type != "cpu":
        ask = getattr(_module(device), "max_memory_allocated", None)
        return int(ask(device)) if ask is not None else 0
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was given; the CPU has."""
    if not is_host(device):
        torch.accelerator.synchronize(device)


def random_state(device: torch.device) -> torch.Tensor | None:
    """The state of an accelerator's random generator; None for the CPU, whose state torch itself gives."""
    if is_host(device):
        return None
    module: Any = _module(device)
    state: torch.Tensor = module.get_rng_state() if device.type in _ONE_ONLY else module.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: torch.Tensor | None) -> None:
    """Gives an accelerator's random generator the state that `random_state` returned."""
    if is_host(device) or state is None:
        return
    module: Any = _module(device)
    if device.type in _ONE_ONLY:
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def _module(device: torch.device) -> Any:
    """What torch, or an extension of it, has for a kind of device; None where it is not installed."""
    return getattr(torch, device.type, None)

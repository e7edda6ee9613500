"""The tensors of a run beside the weights: the optimizer's moments and the states of all random generators.

They are plain safetensors: `N.exp_avg`, `N.exp_avg_sq` and `N.step` for the optimizer's parameter number N, and for
each process one file with the generators of Python, NumPy, torch and the accelerator. Nothing is ever unpickled.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from safetensors.torch import load_file

from glmkit import writing
from glmkit.devices import random_state, set_random_state

_MOMENTS = "optimizer.safetensors"
_EARLIER_GENERATORS = "rng.safetensors"  # before there were several processes; torch's generators only


def save_moments(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's moments; its learning rate is a function of the step and needs no place.

    Args:
        folder: An existing folder.
        optimizer: Between two steps.

    Raises:
        OutputError: If the disk refuses.
    """
    moments = {
        f"{number}.{name}": value.detach()
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    writing.save_tensors(folder, moments, file_name=_MOMENTS, max_shard_bytes=1 << 62)


def load_moments(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save_moments` wrote.

    Args:
        folder: Where it was written.
        optimizer: Made with the same parameters in the same order.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": read_moments(folder), "param_groups": groups})


def read_moments(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Read what `save_moments` wrote, by the numbers of the parameters.

    Args:
        folder: Where it was written.
    """
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / _MOMENTS).items():
        number, _, key = name.partition(".")
        moments.setdefault(int(number), {})[key] = value
    return moments


def save_generators(folder: Path, device: torch.device, rank: int = 0) -> None:
    """Write the states of this process's random generators.

    Args:
        folder: An existing folder.
        device: Where the process computes; its generator is kept beside the CPU's.
        rank: Number of the process.

    Raises:
        OutputError: If the disk refuses.
    """
    _, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = cast("tuple[Any, ...]", numpy.random.get_state(legacy=True))
    states = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(numbers, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if gauss is not None:
        states["python_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    state = random_state(device)
    if state is not None:
        states["accelerator"] = state
    writing.save_tensors(folder, states, file_name=_generators(rank))


def load_generators(folder: Path, device: torch.device, rank: int = 0) -> bool:
    """Read what `save_generators` wrote.

    Args:
        folder: Where it was written.
        device: Where the process computes.
        rank: Number of the process.

    Returns:
        False if the checkpoint has nothing for this process, because there were fewer then; its generators stay as
        they are.
    """
    file = folder / _generators(rank)
    if not file.exists() and rank == 0:
        file = folder / _EARLIER_GENERATORS
    if not file.exists():
        return False
    states = load_file(file)
    torch.set_rng_state(states["cpu"])
    if "python" in states:
        gauss = states["python_gauss"].item() if "python_gauss" in states else None
        random.setstate((3, tuple(states["python"].tolist()), gauss))
        *keys, position, has_gauss = states["numpy"].tolist()
        words = numpy.array(keys, dtype=numpy.uint32)
        numpy.random.set_state(("MT19937", words, position, has_gauss, states["numpy_gauss"].item()))
    set_random_state(device, states.get("accelerator"))
    return True


def _generators(rank: int) -> str:
    return f"generators-{rank}.safetensors"

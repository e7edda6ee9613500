"""The tensors of a run beside the weights: the optimizer's moments and the state of the random generators.

They are plain safetensors: `N.exp_avg`, `N.exp_avg_sq` and `N.step` for the optimizer's parameter number N.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_MOMENTS, _GENERATORS = "optimizer.safetensors", "rng.safetensors"


def save_tensors(folder: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Write what a run needs to go on exactly.

    Args:
        folder: An existing folder.
        optimizer: Between two steps.
        device: Where the model lies; its generator is kept beside the CPU's.
    """
    moments = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    save_file(moments, folder / _MOMENTS)
    generators = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        generators["accelerator"] = torch.get_device_module(device).get_rng_state(device)
    save_file(generators, folder / _GENERATORS)


def load_tensors(folder: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Read what `save_tensors` wrote.

    Args:
        folder: Where it was written.
        optimizer: Made with the same parameters in the same order.
        device: Where the model lies.
    """
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / _MOMENTS).items():
        number, _, key = name.partition(".")
        moments.setdefault(int(number), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    generators = load_file(folder / _GENERATORS)
    torch.set_rng_state(generators["cpu"])
    if device.type != "cpu" and "accelerator" in generators:
        torch.get_device_module(device).set_rng_state(generators["accelerator"], device)

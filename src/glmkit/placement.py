"""One model on several devices of one process, whole blocks on each: for weights that do not fit into one device.

    device 0: embeddings, block 0 … 8, last norm, output layer      device 1: block 9 … 18      device 2: block 19 … 27
              x ------------------------------------------------------> moves at the border ---> … ---> and back

Ids come from the first device and logits stay there, so nobody who calls the model needs to know. Keys and values stay
with their block. A table that is embedding and output layer in one is there once.

Source: load_model_on_gpus of ChatGLM's utils.py, which places the ends on the first device too. What differs: devices
are filled by the bytes of the blocks and the memory of the devices, not by the number of blocks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from glmkit import hf
from glmkit.devices import CPU, accelerators, exists, free_bytes, is_host, parse_device
from glmkit.errors import UsageError
from glmkit.quant.official import is_quantised_layer

Device = torch.device | str | int
_BLOCK = re.compile(r"(.*\.)?layers\.\d+")
_OFFICIAL_ONLY = ("rotary_pos_emb", "lm_head")  # in the tables of the official utils.py, not in every model here
_TIED_ENDS = ("word_embeddings.weight", "final_layernorm.weight")
_SPARE = 0.9  # share of a device's free memory that weights may take; the rest is for keys, values and activations


def place_layers(
    model: nn.Module,
    devices: Sequence[Device] | Mapping[str, Device] | str = "auto",
    memory: Mapping[Device, int] | None = None,
) -> nn.Module:
    """Puts contiguous blocks of a model on several devices, and lets it move its own tensors at their borders.

    Args:
        model: A model of any family, wherever its weights are; on the meta device nothing is moved.
        devices: Devices in the order of the blocks, "auto" for all accelerators, or a table as `device_map` has it:
            names of modules -> devices, where a block is named whole and "" stands for the rest.
        memory: Bytes that weights may take on a device. Devices that it leaves out, and by default all: what is free.

    Returns:
        The same model, with `hf_device_map`. With one device it is only moved there.

    Raises:
        UsageError: There is no such device, the weights do not fit, or a table leaves out or cuts a block.
    """
    places = dict(devices) if isinstance(devices, Mapping) else plan_layers(model, devices, memory)
    table = {name: parse_device(device) for name, device in places.items()}
    check_table(model, table)
    moved: dict[tuple[int, torch.device], torch.Tensor] = {}  # a tensor with two names stays one on a device
    for name, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for leaf, tensor in kind.items():
                place = device_of(f"{name}.{leaf}", table)
                if tensor is not None and place not in (None, tensor.device) and not tensor.is_meta:
                    kind[leaf] = moved.setdefault((id(tensor), place), _moved(tensor, place))
    model.hf_device_map = dict(table)  # type: ignore[assignment]
    if len(set(table.values())) > 1:
        _add_hooks(model, table, _blocks(model))
    return model


def check_table(model: nn.Module, table: Mapping[str, torch.device]) -> None:
    """Refuses a table that leaves out or cuts a block; also on the meta device.

    Args:
        model: The model.
        table: Names of modules -> devices.

    Raises:
        UsageError: Naming every module in question.
    """
    blocks = _blocks(model)
    cut = [name for name in table if any(name.startswith(f"{block}.") for block in blocks)]
    known = {name for name, _ in model.named_modules()}
    unknown = [name for name in table if name not in known and not name.endswith(_OFFICIAL_ONLY)]
    left = [name for name, _ in model.named_parameters() if device_of(name, table) is None]
    ends = {device_of(name, table) for name, _ in model.named_parameters() if name.endswith(_TIED_ENDS)}
    apart = len(ends) > 1 and any(hasattr(type(module), "logits") for module in model.modules())
    if cut or unknown or left or apart:
        problems = [f"{name}: a block must be on one device" for name in cut]
        problems += [f"{name}: no such module" for name in unknown] + [f"{name}: no device" for name in left]
        if apart:
            problems.insert(0, "the embedding is the output layer too, so the last norm must be on its device")
        raise UsageError("device_map:\n" + "\n".join(f"  - {problem}" for problem in problems[:20]))


def plan_layers(
    model: nn.Module,
    devices: Sequence[Device] | str = "auto",
    memory: Mapping[Device, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    quantize: int | None = None,
    group_size: int | None = None,
) -> dict[str, torch.device]:
    """Which device each block gets, and "" for everything else; see `place_layers`. Works on the meta device.

    Args:
        model: The model.
        devices: As for `place_layers`.
        memory: As for `place_layers`.
        dtype: Floating dtype that the weights will have; None: the one they have.
        quantize: 4 or 8 if the linears of the blocks will be quantised.
        group_size: Columns that will share a scale; None for scales of whole rows, which are not counted.

    Returns:
        Name of a block, or "" -> device.

    Raises:
        UsageError: There is no such device, or the weights do not fit.
    """
    chosen = _chosen(devices)
    blocks = _blocks(model)
    if not blocks:
        raise UsageError("the model has no blocks named layers.0, layers.1 …")
    tensors = _bytes(model, dtype, quantize, group_size)
    sizes = {block: sum(size for name, size in tensors.items() if name.startswith(f"{block}.")) for block in blocks}
    whole = sum(tensors.values())
    ends = whole - sum(sizes.values())
    rooms = _rooms(chosen, memory)
    if whole > sum(rooms) or ends > rooms[0]:
        names = ", ".join(map(str, chosen))
        raise UsageError(
            f"the weights take {whole:,} bytes, {ends:,} of them on {chosen[0]};"
            f" the devices {names} have room for {', '.join(f'{room:,.0f}' for room in rooms)}",
            hint="use more devices, quantize=, a smaller dtype, or memory= with what weights may take",
        )
    # Every device gets the same share of its room, so that all have something left for keys and values.
    share = whole / sum(rooms) if sum(rooms) < float("inf") else None
    table: dict[str, torch.device] = {"": chosen[0]}
    index, used = 0, float(ends)
    for position, (name, size) in enumerate(sizes.items()):
        wanted = share * rooms[index] if share is not None else whole / len(chosen)
        behind = len(blocks) - position
        full = used + size / 2 > wanted or used + size > rooms[index]
        if index + 1 < len(chosen) and used and (full or behind <= len(chosen) - 1 - index):
            index, used = index + 1, 0.0
        if used + size > rooms[index]:
            raise UsageError(
                f"block {name} of {size:,} bytes does not fit on {chosen[index]}", hint="use more devices, or quantize="
            )
        table[name], used = chosen[index], used + size
    return table


def device_of(name: str, table: Mapping[str, torch.device]) -> torch.device | None:
    """The device of a parameter or module: that of the longest name in the table that it lies in.

    Args:
        name: Its name in the model.
        table: Names of modules -> devices; "" stands for the rest.

    Returns:
        The device, None if the table leaves it out.
    """
    while name and name not in table:
        name = name.rpartition(".")[0]
    return table.get(name)


def _add_hooks(model: nn.Module, table: Mapping[str, torch.device], blocks: Sequence[str]) -> None:
    """Blocks and all modules with weights beside them get their inputs on their own device."""
    inside = tuple(f"{block}." for block in blocks)
    for name, module in model.named_modules():
        has_weights = next(module.parameters(recurse=False), None) is not None
        if name in blocks or (has_weights and not name.startswith(inside)):
            place = device_of(name, table)
            module.register_forward_pre_hook(_Mover(place), with_kwargs=True)


class _Mover:
    """A forward pre-hook that moves a module's inputs to its device; keys and values stay where they are."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self.moved(args), self.moved(kwargs)

    def moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self.device) if value.device != self.device else value
        if type(value) in (tuple, list):
            return type(value)(self.moved(item) for item in value)
        if type(value) is dict:
            return {key: self.moved(item) for key, item in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, (type, hf.Cache)):  # a mask of several tensors
            fields = {field.name: self.moved(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return value


def _moved(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(place)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if _BLOCK.fullmatch(name)]


def _bytes(
    model: nn.Module, dtype: torch.dtype | None, bits: int | None, group_size: int | None = None
) -> dict[str, int]:
    """Size of every tensor as it will be; one with two names counts once."""
    sizes = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        size = tensor.element_size() if dtype is None or not tensor.is_floating_point() else dtype.itemsize
        quantised = bits and tensor.is_floating_point() and leaf == "weight" and is_quantised_layer(owner)
        sizes[name] = tensor.numel() * size
        if bits and quantised:
            sizes[name] = tensor.numel() * bits // 8 + (2 * tensor.numel() // group_size if group_size else 0)
    return sizes


def _chosen(devices: Sequence[Device] | str) -> list[torch.device]:
    if isinstance(devices, str) and devices == "auto":
        return accelerators() or [CPU]
    chosen = [parse_device(device) for device in ([devices] if isinstance(devices, str) else devices)]
    if not chosen:
        raise UsageError("no devices are given", hint='"auto", or names such as ["cuda:0", "cuda:1"]')
    return chosen


def _rooms(devices: Sequence[torch.device], memory: Mapping[Device, int] | None) -> list[float]:
    """Bytes that weights may take on each device; infinite where nobody can tell."""
    given = {parse_device(device): float(room) for device, room in (memory or {}).items()}
    return [given[device] if device in given else _free_bytes(device) * _SPARE for device in devices]


def _free_bytes(device: torch.device) -> float:
    if not exists(device):
        raise UsageError(f"{device}: there is no such device", hint="glm doctor says which devices this machine has")
    free = None if is_host(device) else free_bytes(device)
    return float("inf") if free is None else float(free)

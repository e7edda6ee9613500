"""A checkpoint's tensors by parameter name, in parts that several processes wrote; any number of them reads it again.

    parts/shard-00001-model-00001-of-00001.safetensors      FSDP: the rows of every tensor that process 0 held
    parts/part-00000.safetensors                            DeepSpeed: every so-and-so-many-th tensor, whole
    parts/steps.json                                        what is one number for a parameter, {"step": {NAME: 7.0}}

    weights.NAME, exp_avg.NAME, exp_avg_sq.NAME             names in all of them

One process, and several that each have the whole model, write `optimizer.safetensors` instead, with the parameters'
numbers in the optimizer; that is read here too, so a run may go on in any other way than it began.

Files are those of torch.distributed.checkpoint with its safetensors storage; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.errors import OutputError, TrainingError
from glmkit.train.state import load_moments, read_moments

PARTS = "parts"
"""Name of the folder inside a checkpoint."""
WEIGHTS = "weights"
_STEPS = "steps.json"
_BYTES_AT_ONCE = 1 << 30

Named = dict[str, Tensor]


def names_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """List the names of an optimizer's parameters in the order of their numbers.

    Args:
        model: Has them.
        optimizer: Numbers them, group after group.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def has_parts(folder: Path) -> bool:
    """Whether a checkpoint is in parts.

    Args:
        folder: The checkpoint.
    """
    return (folder / PARTS).is_dir()


def write_steps(folder: Path, steps: Mapping[str, Mapping[str, float]]) -> None:
    """Write what is one number for a parameter.

    Args:
        folder: The checkpoint.
        steps: Kind -> name -> number.
    """
    (folder / PARTS / _STEPS).write_text(json.dumps(steps))


def write_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, every_weight: bool) -> None:
    """Write what each process holds of sharded weights and moments; every process calls it.

    Args:
        folder: The checkpoint.
        model: Its parameters are DTensors.
        optimizer: Its own, between two steps.
        every_weight: Also the weights that do not learn.
    """
    from torch.distributed import checkpoint as dcp

    tensors: Named = {}
    steps: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        if every_weight or parameter.requires_grad:
            tensors[f"{WEIGHTS}.{name}"] = parameter.detach()
        for kind, value in optimizer.state.get(parameter, {}).items():
            if value.shape == parameter.shape:
                tensors[f"{kind}.{name}"] = value.detach()
            else:
                steps.setdefault(kind, {})[name] = float(value)
    writer = dcp.HuggingFaceStorageWriter(str(folder / PARTS), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.api.CheckpointException as error:  # all processes get it if one of them fails
        reasons = "; ".join(f"process {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise OutputError(f"the parts could not be written: {reasons}") from error
    if torch.distributed.get_rank() == 0:
        write_steps(folder, steps)


def read_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read moments, and the weights where they are in parts, into a model that is whole or sharded in any way.

    Args:
        folder: The checkpoint.
        model: Of the same parameters, plain tensors or DTensors.
        optimizer: Its own.

    Raises:
        TrainingError: If something is missing or has another shape.
    """
    parameters = dict(model.named_parameters())
    order = names_in_order(model, optimizer)
    if not has_parts(folder):
        if not any(_is_sharded(parameters[name]) for name in order):
            load_moments(folder, optimizer)
            return
        state = {
            number: {kind: _cut_like(value, parameters[order[number]]) for kind, value in entry.items()}
            for number, entry in read_moments(folder).items()
        }
        _put_moments(optimizer, state)
        return
    shapes = shapes_of(folder / PARTS)
    wanted = {f"{WEIGHTS}.{name}": parameter.detach() for name, parameter in parameters.items()}
    wanted = {key: tensor for key, tensor in wanted.items() if key in shapes}
    _check([f"{WEIGHTS}.{name}" for name in order], shapes, folder)
    steps = json.loads((folder / PARTS / _STEPS).read_text())
    state = {}
    for number, name in enumerate(order):
        kinds = [key.removesuffix(f".{name}") for key in shapes if key.endswith(f".{name}")]
        entry = {kind: torch.zeros_like(parameters[name]) for kind in kinds if kind != WEIGHTS and "." not in kind}
        wanted |= {f"{kind}.{name}": tensor for kind, tensor in entry.items()}
        entry |= {kind: torch.tensor(numbers[name]) for kind, numbers in steps.items() if name in numbers}
        if entry:
            state[number] = entry
    wrong = [f"{key}: {list(shapes[key])}" for key, tensor in wanted.items() if shapes[key] != tensor.shape]
    if wrong:
        raise TrainingError(
            f"{folder} has tensors of other shapes than the model, for instance {wrong[0]}",
            hint="move this checkpoint away; --resume goes on from the one before it",
        )
    fill(folder / PARTS, wanted)
    _put_moments(optimizer, state)


def read_whole(folder: Path, order: list[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the tensors of a checkpoint of either form, one after the other and whole.

    Args:
        folder: The checkpoint.
        order: Names of the optimizer's parameters.

    Yields:
        Kind ("weights", "exp_avg", …), name of the parameter, and the tensor; what is one number has no dimension.
    """
    if not has_parts(folder):
        for number, entry in read_moments(folder).items():
            for kind, value in entry.items():
                yield kind, order[number], value
        return
    shapes = shapes_of(folder / PARTS)
    chosen = [key for key in shapes if key.partition(".")[2] in set(order)]
    _check([f"{WEIGHTS}.{name}" for name in order], shapes, folder)
    for keys in _groups(chosen, shapes):
        tensors = {key: torch.empty(shapes[key]) for key in keys}
        fill(folder / PARTS, tensors)
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            yield kind, name, tensor
    for kind, numbers in json.loads((folder / PARTS / _STEPS).read_text()).items():
        for name, number in numbers.items():
            yield kind, name, torch.tensor(number)


def shapes_of(parts: Path) -> dict[str, torch.Size]:
    """List names and whole shapes of the tensors in a folder of parts.

    Args:
        parts: The folder.
    """
    from torch.distributed import checkpoint as dcp

    known: Any = dcp.HuggingFaceStorageReader(str(parts)).read_metadata().state_dict_metadata
    return {name: facts.size for name, facts in known.items()}


def fill(parts: Path, tensors: Named) -> None:
    """Read tensors in place; this process alone, whatever the others do.

    Args:
        parts: The folder of parts.
        tensors: Name -> where to; plain tensors get all rows, DTensors their own.
    """
    from torch.distributed import checkpoint as dcp

    if not tensors:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(parts)), no_dist=True)


def _check(needed: Iterable[str], shapes: Mapping[str, torch.Size], folder: Path) -> None:
    missing = [key for key in needed if key not in shapes]
    if missing:
        raise TrainingError(
            f"{folder} lacks {len(missing)} tensors, for instance {missing[0]}",
            hint="move this checkpoint away; --resume goes on from the one before it",
        )


def _put_moments(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _cut_like(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that this process has of another; what is one number stays."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _groups(keys: Iterable[str], shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for key in keys:
        group.append(key)
        size += shapes[key].numel() * 4
        if size > _BYTES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group

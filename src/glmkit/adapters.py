"""What was learnt beside a model: LoRA folders of PEFT, and P-Tuning v2 prefixes of the official scripts.

Which kind a folder holds and how large it is are read from the folder, never from anybody's memory, and every tensor
must find its place.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import nn

from glmkit.checkpoint import ADAPTER_WEIGHTS, Folder, check_tensors, open_folder
from glmkit.errors import CheckpointError, MissingDependencyError, UsageError
from glmkit.models.checked_config import CheckedConfig

_PREFIX = "transformer.prefix_encoder."
_PEFT_START = "base_model.model."  # what PEFT writes in front of every name


def open_adapter(path: Path) -> Folder:
    """Opens an adapter's folder through the gate.

    Args:
        path: The folder: PEFT's, or a checkpoint of the official P-Tuning scripts.

    Returns:
        The folder, to be used as a context manager: it holds its files open.

    Raises:
        UsageError: There is no such folder.
        CheckpointError: Everything that is wrong with it.
    """
    if not path.is_dir():
        raise UsageError(f"there is no adapter folder {str(path)!r}", hint="give the folder that holds the adapter")
    if (path / "adapter_config.json").is_file():
        return open_folder(path, config="adapter_config.json", weights=ADAPTER_WEIGHTS)
    return open_folder(path, config="config.json" if (path / "config.json").exists() else None)


def is_prefix(adapter: Folder) -> bool:
    """Tells a P-Tuning prefix from a LoRA.

    Args:
        adapter: The opened folder.

    Returns:
        Whether the folder holds a P-Tuning prefix.
    """
    return any(name.startswith(_PREFIX) for name in adapter.tensors)


def size_prefix(config: CheckedConfig, prefix: Folder) -> None:
    """Sets the prefix's length and kind in the model's config, from its tensors.

    Args:
        config: The model's config; `pre_seq_len` and `prefix_projection` are set in it.
        prefix: The opened folder of the prefix.

    Raises:
        CheckpointError: The folder holds other tensors too, or no table; or such a model has no prefix.
        ConfigError: The length is out of range.
    """
    table = prefix.tensors.get(_PREFIX + "embedding.weight")
    strangers = [name for name in prefix.tensors if not name.startswith(_PREFIX)]
    if table is None or strangers:
        found = f"also {strangers[0]!r}" if strangers else f"no {_PREFIX}embedding.weight"
        raise CheckpointError(
            str(prefix.path),
            [f"expected a P-Tuning prefix and nothing else, found {found}"],
            hint="a folder with the whole model is loaded by itself: glmkit.load(THIS_FOLDER)" if strangers else None,
        )
    if not hasattr(config, "pre_seq_len"):
        raise CheckpointError(
            str(prefix.path), [f"a P-Tuning prefix; models of {type(config).__name__.removesuffix('Config')} have none"]
        )
    config.pre_seq_len = table.shape[0]
    config.prefix_projection = any(name.startswith(_PREFIX + "trans.") for name in prefix.tensors)
    config.check()


def add_lora(model: nn.Module, adapter: Folder) -> None:
    """Puts a PEFT LoRA into the model, in float32 and in place; PEFT itself never opens a file.

    Args:
        model: The language model; afterwards it is in eval mode.
        adapter: The opened folder, with config and tensors.

    Raises:
        CheckpointError: A kind other than LoRA, or tensors that are missing, fit nowhere or have another shape.
        MissingDependencyError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingDependencyError("peft", "train") from None
    kind = adapter.config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(str(adapter.path), [f"peft_type is {kind!r}, expected 'LORA'"])
    rank = adapter.config.get("r")
    stored_ranks = {info.shape[0] for name, info in adapter.tensors.items() if name.endswith("lora_A.weight")}
    if stored_ranks != {rank} and not adapter.config.get("rank_pattern"):
        raise CheckpointError(str(adapter.path), [f"r is {rank!r}, but the matrices have rank {sorted(stored_ranks)}"])
    known = inspect.signature(LoraConfig).parameters
    inject_adapter_in_model(LoraConfig(**{k: v for k, v in adapter.config.items() if k in known}), model)
    own = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    places = {_PEFT_START + name.replace(".default.", "."): name for name in own}
    check_tensors(adapter, {stored: tuple(own[name].shape) for stored, name in places.items()})
    for stored, tensor in adapter.read():
        parameter = own[places[stored]]
        parameter.data = tensor.to(parameter.device, torch.float32)
    model.eval()

"""Training methods: which parameters learn, and how what was learnt is written and read again.

    full         every parameter                                  a whole model folder
    freeze       the last blocks                                  a whole model folder
    lora         matrices beside linear layers, see lora.py       a folder of PEFT
    ptuning_v2   keys and values in front of every layer's own    a checkpoint of the official P-Tuning scripts

What learns is float32, whatever the rest of the model is. A method knows nothing of the loop, and the loop nothing of
the method beyond these functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from glmkit import hf
from glmkit.adapters import Prefix, open_adapter, read_adapter
from glmkit.errors import TrainingError, UsageError
from glmkit.models.prefix_encoder import PrefixTuned
from glmkit.train.arguments import MethodBlock
from glmkit.train.lora import LoraMethod

__all__ = ["FreezeMethod", "FullMethod", "LoraMethod", "Method", "PTuningMethod", "make_method"]

_OFFICIAL_PREFIX = "transformer.prefix_encoder."  # the name in official checkpoints, of all generations


class Method(Protocol):
    """What the loop asks of a method."""

    folder_name: str
    """Name of the result's folder inside the output folder: "model" if it is a whole model, else "adapter"."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Set which parameters learn (float32) and return the module to call."""

    def save(self, model: nn.Module, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what was learnt.

        `state` has tensors instead of the model's own, by the names of its parameters: all of them for a whole model,
        else at least those that learn.
        """

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Read into a prepared model what `save` wrote, exactly."""

    def describe(self) -> str:
        """Say in one line what learns."""


class FullMethod:
    """All parameters learn, in float32; the result is a whole model folder."""

    folder_name = "model"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Turn all parameters to float32 and let them learn.

        Args:
            model: The loaded model; its parameters are changed in place.

        Returns:
            The same model.

        Raises:
            UsageError: If the model is quantised.
        """
        _refuse_quantised(model)
        model.float()
        model.requires_grad_(True)
        return model

    def save(self, model: nn.Module, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write weights, config and tokenizer.

        Args:
            model: What `prepare` returned.
            tokenizer: Its tokenizer.
            folder: An existing folder.
            state: Tensors instead of the model's own, by the names of its parameters.
        """
        whole: dict[str, Tensor] | None = None
        if state is not None:
            whole = {**model.state_dict(), **state}
            for copy, table in (getattr(model, "_tied_weights_keys", None) or {}).items():
                whole[copy] = whole[table]
        with _without_bars():
            model.save_pretrained(folder, state_dict=whole)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Copy the weights of a folder written by `save` into the model.

        Args:
            model: What `prepare` returned.
            folder: The folder.

        Raises:
            TrainingError: If tensors are missing.
        """
        parameters = dict(model.named_parameters())
        missing = set(parameters)
        with torch.no_grad():
            for name, tensor in _read_tensors(folder):
                if name in parameters:
                    parameters[name].copy_(tensor)
                    missing.discard(name)
        if missing:
            raise TrainingError(
                f"{folder} lacks {len(missing)} tensors, for instance {min(missing)}",
                hint="move this checkpoint away; --resume goes on from the one before it",
            )

    def describe(self) -> str:
        """Say in one line what learns."""
        return "full: all parameters, float32"


class FreezeMethod(FullMethod):
    """The last blocks learn, in float32; the others, the embedding and the output layer stay as they are.

    Args:
        block: How many blocks.
    """

    def __init__(self, block: MethodBlock) -> None:
        self.number = block.num_layer_trainable

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze the model but for its last blocks, which become float32 and take and give the others' dtype.

        Args:
            model: The loaded model; its parameters are changed in place.

        Returns:
            The same model.

        Raises:
            UsageError: If there are fewer blocks, or these are quantised.
        """
        blocks = _blocks(model)
        if self.number > len(blocks):
            raise UsageError(f"method.num_layer_trainable is {self.number}, the model has {len(blocks)} blocks")
        learning = blocks[len(blocks) - self.number :]
        _refuse_quantised(learning)
        model.requires_grad_(False)
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        for block in learning:
            block.float().requires_grad_(True)
            if dtype != torch.float32:
                block.register_forward_pre_hook(lambda _, inputs: _cast(inputs, torch.float32))
                block.register_forward_hook(lambda _, inputs, output: _cast(output, dtype))
        return model

    def describe(self) -> str:
        """Say in one line what learns."""
        return f"freeze: the last {self.number} blocks, float32"


class PTuningMethod:
    """P-Tuning v2: a learned prefix in float32 beside a frozen model, quantised or not.

    Args:
        block: Length of the prefix, and whether it is projected.
    """

    folder_name = "adapter"

    def __init__(self, block: MethodBlock) -> None:
        self.length, self.projection = block.pre_seq_len, block.prefix_projection

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze the model and give it a new prefix; one of the same form that it has already goes on learning.

        Args:
            model: The loaded model, changed in place.

        Returns:
            The same model.

        Raises:
            UsageError: If models of its kind have no prefix, or its own is of another form.
        """
        network = _network(model)
        if not isinstance(network, PrefixTuned):
            raise UsageError(f"{type(model).__name__} has no P-Tuning prefix", hint="method.name=lora")
        model.requires_grad_(False)
        if getattr(network, "prefix_encoder", None) is None:
            network.attach_prefix(self.length, self.projection)
        own = (network.config.pre_seq_len, network.prefix_encoder.trans is not None)
        if own != (self.length, self.projection):
            raise UsageError(
                f"the model has a prefix of {own[0]} columns {'with' if own[1] else 'without'} projection",
                hint=f"method.pre_seq_len={own[0]} method.prefix_projection={str(own[1]).lower()}",
            )
        network.prefix_encoder.float().requires_grad_(True)
        return model

    def save(self, model: nn.Module, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what the official scripts write and read: pytorch_model.bin with the prefix, and config.json.

        Args:
            model: What `prepare` returned.
            tokenizer: Not written: the base has it.
            folder: An existing folder.
            state: Tensors instead of the model's own, by the names of its parameters.
        """
        state = state or {}
        tensors = {
            _OFFICIAL_PREFIX + name.rpartition("prefix_encoder.")[2]: state.get(name, parameter).detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if "prefix_encoder." in name
        }
        torch.save(tensors, folder / "pytorch_model.bin")
        model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Copy the prefix of a folder written by `save`, or by an official script, into the model.

        Args:
            model: What `prepare` returned.
            folder: The folder.

        Raises:
            CheckpointError: Everything that is wrong with the folder, or it fits another model.
            TrainingError: If it holds no prefix, or one of another form than the recipe's.
        """
        with open_adapter(folder) as opened:
            learnt = read_adapter(opened, model)
            if not isinstance(learnt, Prefix):
                raise TrainingError(f"{folder} holds a LoRA, not a P-Tuning prefix", hint="method.name=lora")
            found = (learnt.config.pre_seq_len, learnt.config.prefix_projection)
            if found != (self.length, self.projection):
                raise TrainingError(
                    f"{folder} has a prefix of {found[0]} columns {'with' if found[1] else 'without'} projection",
                    hint=f"method.pre_seq_len={found[0]} method.prefix_projection={str(found[1]).lower()}",
                )
            with torch.no_grad():
                for name, tensor in learnt.read():
                    model.get_parameter(name).copy_(tensor)

    def describe(self) -> str:
        """Say in one line what learns."""
        return f"ptuning_v2: {self.length} prefix columns, {'with' if self.projection else 'without'} projection"


def make_method(block: MethodBlock) -> Method:
    """Return the method that a recipe names.

    Args:
        block: The recipe's `method` block.

    Returns:
        The method, not yet prepared.
    """
    makers: dict[str, Callable[[MethodBlock], Method]] = {
        "full": lambda _: FullMethod(),
        "freeze": FreezeMethod,
        "lora": LoraMethod,
        "ptuning_v2": PTuningMethod,
    }
    return makers[block.name](block)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers' progress bars back: a run saves often and shows a bar of its own."""
    shown = hf.transformers_logging.is_progress_bar_enabled()
    hf.transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf.transformers_logging.enable_progress_bar()


def _network(model: Any) -> Any:
    """The network up to the last norm: under its name in a head, or the model itself."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def _blocks(model: nn.Module) -> nn.ModuleList:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers":
            return module
    raise UsageError(f"{type(model).__name__} has no blocks", hint="method.name=full")


def _refuse_quantised(module: nn.Module) -> None:
    kinds = {parameter.dtype for parameter in module.parameters() if not parameter.is_floating_point()}
    if kinds:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise UsageError(
            f"what is to learn is quantised (weights in {found}), and whole numbers cannot be changed by little",
            hint="method.name=lora or ptuning_v2 learn beside it; or load the unquantised checkpoint without quantize",
        )


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The same with all floating-point tensors in one dtype."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, (tuple, list)):
        return type(values)(_cast(value, dtype) for value in values)
    return values


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, opened.get_tensor(name)

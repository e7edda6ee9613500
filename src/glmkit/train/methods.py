"""Training methods: which parameters learn, and how what was learnt is written and read again.

A method knows nothing of the loop, and the loop nothing of the method beyond these functions.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn

from glmkit.errors import MissingDependencyError, TrainingError, UsageError
from glmkit.train.arguments import MethodBlock


class Method(Protocol):
    """What the loop asks of a method."""

    folder_name: str
    """Name of the result's folder inside the output folder."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Set which parameters learn (float32) and return the module to call."""

    def save(
        self, model: nn.Module, tokenizer: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write what was learnt."""

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

    def save(
        self, model: nn.Module, tokenizer: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write weights, config and tokenizer.

        Args:
            model: What `prepare` returned.
            tokenizer: Its tokenizer.
            folder: An existing folder.
        """
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Copy the weights of a folder written by `save` into the model.

        Args:
            model: What `prepare` returned.
            folder: The folder.

        Raises:
            TrainingError: If tensors are missing.
        """
        _copy_into(dict(model.named_parameters()), folder)

    def describe(self) -> str:
        """Say in one line what learns."""
        return "full: all parameters, float32"


class LoraMethod:
    """Low-rank matrices beside frozen linear layers (PEFT); the base stays as it is.

    Args:
        block: Rank, scale, dropout and layers.
    """

    folder_name = "adapter"

    def __init__(self, block: MethodBlock) -> None:
        self.block = block

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze the model and put LoRA matrices beside the named layers, in float32.

        Args:
            model: The loaded model; PEFT wraps its layers in place.

        Returns:
            The PEFT model around it.

        Raises:
            MissingDependencyError: If peft is not installed.
            UsageError: If no layer has one of the names, or the model is quantised.
        """
        _refuse_quantised(model)
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise MissingDependencyError("peft", "train") from None
        names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        unknown = [target for target in self.block.target_modules if target.rpartition(".")[2] not in names]
        if unknown:
            raise UsageError(
                f"method.target_modules names {', '.join(unknown)}, the model's linear layers are "
                f"{', '.join(sorted(names))}"
            )
        config = LoraConfig(
            r=self.block.lora_rank,
            lora_alpha=self.block.lora_alpha,
            lora_dropout=self.block.lora_dropout,
            target_modules=list(self.block.target_modules),
            task_type="CAUSAL_LM",
        )
        with _without_future_warnings():
            wrapped = get_peft_model(model, config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return wrapped

    def save(
        self, model: nn.Module, tokenizer: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write a PEFT adapter folder.

        Args:
            model: What `prepare` returned.
            tokenizer: Not written: the base has it.
            folder: An existing folder.
        """
        # Nothing but adapters was trained, and "auto" would ask the hub whether the vocabulary has grown.
        with _without_future_warnings():
            model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Copy the matrices of a folder written by `save` into the model.

        Args:
            model: What `prepare` returned.
            folder: The folder.

        Raises:
            TrainingError: If tensors are missing.
        """
        named = {
            name.replace(".default.", "."): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        _copy_into(named, folder)

    def describe(self) -> str:
        """Say in one line what learns."""
        block = self.block
        return f"lora: rank {block.lora_rank}, alpha {block.lora_alpha:g}, dropout {block.lora_dropout}, " + ", ".join(
            block.target_modules
        )


def make_method(block: MethodBlock) -> Method:
    """Return the method that a recipe names.

    Args:
        block: The recipe's `method` block.

    Returns:
        The method, not yet prepared.
    """
    return LoraMethod(block) if block.name == "lora" else FullMethod()


def _refuse_quantised(model: nn.Module) -> None:
    bits = getattr(getattr(model, "config", None), "quantization_bit", 0)
    if bits:
        raise UsageError(
            f"this checkpoint is quantised to {bits} bits; training needs its weights in full",
            hint="load the unquantised checkpoint, for instance chatglm2-6b and not chatglm2-6b-int4",
        )


@contextlib.contextmanager
def _without_future_warnings() -> Iterator[None]:
    """Keeps back what transformers tells PEFT's authors about names that PEFT uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, opened.get_tensor(name)


def _copy_into(parameters: dict[str, nn.Parameter], folder: Path) -> None:
    missing = set(parameters)
    with torch.no_grad():
        for name, tensor in _read_tensors(folder):
            if name in parameters:
                parameters[name].copy_(tensor)
                missing.discard(name)
    if missing:
        raise TrainingError(f"{folder} lacks {len(missing)} tensors, for instance {min(missing)}")

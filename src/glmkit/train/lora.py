"""LoRA: low-rank matrices beside frozen linear layers of any kind, quantised ones included (Hu et al. 2021).

    y = layer(x) + B A dropout(x) * alpha / rank        A starts as random numbers, B as zeros, so y starts as layer(x)

A and B are float32 and compute in the dtype of x; the layer keeps its name and its tensors. What is written is a folder
of PEFT, which PEFT reads too.

Source: arXiv:2106.09685; the start of A is PEFT's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmkit.adapters import Lora, open_adapter, read_adapter
from glmkit.adapters.switching import LoraMatrices
from glmkit.errors import TrainingError, UsageError
from glmkit.train.arguments import MethodBlock
from glmkit.writing import save_tensors


class LearningMatrices(LoraMatrices):
    """Matrices that learn.

    Args:
        layer: The linear layer that they stand beside; it is left as it is.
        block: Rank, scale and dropout.
    """

    def __init__(self, layer: nn.Module, block: MethodBlock) -> None:
        rank, width = block.lora_rank, {"device": layer.weight.device, "dtype": torch.float32}
        a = torch.empty(rank, layer.in_features, **width)  # type: ignore[call-overload]
        b = torch.zeros(layer.out_features, rank, **width)  # type: ignore[call-overload]
        super().__init__(nn.init.kaiming_uniform_(a, a=math.sqrt(5)), b, block.lora_alpha / rank)
        self.dropout = block.lora_dropout

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """(..., in) and (..., out) -> (..., out) in the dtype of `output`."""
        x = F.dropout(x, self.dropout, self.training)
        change = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return output + (change * self.scale).to(output.dtype)

    def after(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """What the layer gives together with the matrices."""
        changed: Tensor = self(inputs[0], output)
        return changed


class LoraMethod:
    """Low-rank matrices beside frozen linear layers; the base stays as it is, quantised or not.

    Args:
        block: Rank, scale, dropout and layers.
    """

    folder_name = "adapter"

    def __init__(self, block: MethodBlock) -> None:
        self.block = block

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze the model and put matrices beside the named layers, in float32.

        Args:
            model: The loaded model; the matrices are added in place.

        Returns:
            The same model.

        Raises:
            UsageError: If no layer has one of the names, or the model has an adapter already.
        """
        linears = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
        names = {name.rpartition(".")[2] for name in linears}
        unknown = [target for target in self.block.target_modules if not _chosen(linears, target)]
        if unknown:
            raise UsageError(
                f"method.target_modules names {', '.join(unknown)}, the model's linear layers are "
                f"{', '.join(sorted(names))}"
            )
        if any(hasattr(module, "lora") for module in linears.values()):
            raise UsageError(
                "the model has a LoRA already",
                hint="load it without, and go on from the LoRA with model.adapter=FOLDER",
            )
        model.requires_grad_(False)
        for target in self.block.target_modules:
            for name in _chosen(linears, target):
                layer = linears.pop(name)
                layer.lora = LearningMatrices(layer, self.block)
                layer.register_forward_hook(layer.lora.after)
        return model

    def save(self, model: nn.Module, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder of PEFT.

        Args:
            model: What `prepare` returned.
            tokenizer: Not written: the base has it.
            folder: An existing folder.
            state: Tensors instead of the model's own, by the names of its parameters.
        """
        state = state or {}
        tensors = {
            f"base_model.model.{layer}.lora_{side}.weight": state.get(own, parameter).detach().cpu().contiguous()
            for own, layer, side, parameter in _matrices(model)
        }
        save_tensors(folder, tensors, file_name="adapter_model.safetensors")
        block = self.block
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
            "r": block.lora_rank,
            "lora_alpha": block.lora_alpha,
            "lora_dropout": block.lora_dropout,
            "target_modules": list(block.target_modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Copy the matrices of a folder written by `save`, or by PEFT, into the model.

        Args:
            model: What `prepare` returned.
            folder: The folder.

        Raises:
            CheckpointError: Everything that is wrong with the folder, or it fits another model.
            TrainingError: If its layers, rank or scale are others than the recipe's.
        """
        with open_adapter(folder) as opened:
            learnt = read_adapter(opened, model)
            if not isinstance(learnt, Lora):
                raise TrainingError(f"{folder} holds a P-Tuning prefix, not a LoRA", hint="method.name=ptuning_v2")
            own = {layer for _, layer, _, _ in _matrices(model)}
            if set(learnt.layers) != own:
                other = min(set(learnt.layers) ^ own)
                raise TrainingError(
                    f"{folder} has matrices for {len(learnt.layers)} layers, the recipe for {len(own)}; one in which "
                    f"they differ is {other}",
                    hint="give method.target_modules as in the folder's adapter_config.json",
                )
            for name, a, b, scale in learnt.read():
                self._check(folder, len(a), scale * len(a))
                matrices = model.get_submodule(f"{name}.lora")
                assert isinstance(matrices, LearningMatrices)
                with torch.no_grad():
                    matrices.lora_A.copy_(a)
                    matrices.lora_B.copy_(b)

    def _check(self, folder: Path, rank: int, alpha: float) -> None:
        own = (self.block.lora_rank, self.block.lora_alpha)
        if rank != own[0] or not math.isclose(alpha, own[1]):
            raise TrainingError(
                f"{folder} has rank {rank} and alpha {alpha:g}, the recipe {own[0]} and {own[1]:g}",
                hint=f"method.lora_rank={rank} method.lora_alpha={alpha:g}",
            )

    def describe(self) -> str:
        """Say in one line what learns."""
        block = self.block
        return f"lora: rank {block.lora_rank}, alpha {block.lora_alpha:g}, dropout {block.lora_dropout}, " + ", ".join(
            block.target_modules
        )


def _chosen(linears: Mapping[str, nn.Module], target: str) -> list[str]:
    """The layers that a name means: its own, and those whose names end so."""
    return [name for name in linears if name == target or name.endswith(f".{target}")]


def _matrices(model: nn.Module) -> list[tuple[str, str, str, nn.Parameter]]:
    """Name of each matrix, of its layer, "A" or "B", and the matrix."""
    found = []
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.partition(".lora.lora_")
        if leaf:
            found.append((name, layer, leaf, parameter))
    return found

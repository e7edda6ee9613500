"""What one of several processes holds of a model, its gradients and its optimizer, by the rules of each engine.

ddp       everything in each process; gradients are summed in place
fsdp      a part of each; a block is gathered whole, in the precision of the products, while it computes
deepspeed the model in 16 bits and a float32 copy of what learns, in parts (stage 1: optimizer, 2: gradients,
          3: parameters)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmkit import hf
from glmkit.errors import UsageError
from glmkit.train.arguments import Recipe
from glmkit.train.packaged import named_file
from glmkit.train.ranks import strategy_of
from glmkit.train.zero_config import stage_of

_GATHERED_BLOCKS = 2  # that stand whole at once: one computes, the next arrives
_MOMENTS = 8  # bytes of AdamW's two float32 moments of a parameter


@dataclass(frozen=True)
class Held:
    """What a device holds all the time, in bytes.

    Attributes:
        learn: Number of parameters that learn, of the whole model.
        weights: Its weights, with float32 copies.
        gathered: Weights of others that stand there while they are used, and their gradients.
        gradients: Its gradients.
        optimizer: Its moments.
        host: What lies in the memory of the host instead.
    """

    learn: int
    weights: int
    gathered: int
    gradients: int
    optimizer: int
    host: int


@dataclass(frozen=True)
class Sharing:
    """How much of everything a process holds.

    Attributes:
        name: What to call it.
        weights: Part of the weights.
        gradients: Part of the gradients.
        optimizer: Part of the moments.
        computes: What gathered or handed-over weights are narrowed to; None: they stay as they are.
        narrows_all: Whether all weights are, not only those of blocks.
        copies: Bytes of a copy of each parameter that learns.
        weights_on_host: Whether a process's own weights lie on the host.
        optimizer_on_host: Whether its moments and copies do.
    """

    name: str = "one process"
    weights: float = 1
    gradients: float = 1
    optimizer: float = 1
    computes: torch.dtype | None = None
    narrows_all: bool = False
    copies: int = 0
    weights_on_host: bool = False
    optimizer_on_host: bool = False

    @classmethod
    def of(cls, recipe: Recipe, world: int) -> Sharing:
        """Tells how a recipe shares.

        Args:
            recipe: Its `distributed` block.
            world: Number of processes.

        Raises:
            UsageError: Its deepspeed.json cannot be read, or its settings contradict each other.
        """
        strategy_of(recipe)
        block, train = recipe.distributed, recipe.train
        computes = torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else None
        part, where = 1 / world, f"{world} processes"
        if block.deepspeed is not None:
            config = _read(named_file(block.deepspeed))
            stage, zero = stage_of(config), config.get("zero_optimization") or {}
            narrow = computes if any((config.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16")) else None
            return cls(
                f"{where}, ZeRO-{stage}",
                part if stage >= 3 else 1,
                part if stage >= 2 else 1,
                part if stage >= 1 else 1,
                narrow,
                narrows_all=True,
                copies=4,
                weights_on_host="offload_param" in zero,
                optimizer_on_host="offload_optimizer" in zero,
            )
        if block.strategy == "fsdp":
            off = block.cpu_offload
            return cls(f"{where}, FSDP2", part, part, part, computes, weights_on_host=off, optimizer_on_host=off)
        return cls() if world == 1 else cls(f"{where}, DDP")

    def held(self, model: nn.Module) -> Held:
        """Counts what a device holds.

        Args:
            model: Prepared; its sizes count.
        """
        parameters: list[Any] = list({id(one): one for one in model.parameters()}.values())
        learn = sum(one.numel() for one in parameters if one.requires_grad)
        own = 0.0
        for one in parameters:
            narrow = self.computes if self.narrows_all and one.is_floating_point() else None
            size = one.numel() * (narrow or one.dtype).itemsize
            own += size if not one.is_floating_point() else size * self.weights
        gathered = self._gathered(model) if self.weights < 1 else 0
        learnt_bytes = self.computes.itemsize if self.computes is not None and self.narrows_all else 4
        gradients = int(learn * learnt_bytes * self.gradients)
        copies, moments = int(learn * self.copies * self.optimizer), int(learn * _MOMENTS * self.optimizer)
        host = 0
        if self.weights_on_host:
            host, own = host + int(own), 0
        if self.optimizer_on_host:
            host, copies, moments = host + copies + moments, 0, 0
            host, gradients = (host + gradients, 0) if self.gradients < 1 else (host, gradients)
        return Held(learn, int(own) + copies, gathered, gradients, moments, host)

    def _gathered(self, model: nn.Module) -> int:
        """Two blocks and everything outside of blocks, whole; and the whole gradients of one block."""
        blocks = [module for module in model.modules() if isinstance(module, hf.GradientCheckpointingLayer)]
        inside = {id(one) for block in blocks for one in block.parameters()}
        rest = [one for one in model.parameters() if id(one) not in inside and one.is_floating_point()]
        largest = learns = 0
        for block in blocks:
            numbers = [one for one in block.parameters() if one.is_floating_point()]
            largest = max(largest, sum(one.numel() * (self.computes or one.dtype).itemsize for one in numbers))
            learns = max(learns, sum(4 * one.numel() for one in numbers if one.requires_grad))
        outside = sum(one.numel() * one.element_size() for one in {id(one): one for one in rest}.values())
        return _GATHERED_BLOCKS * largest + outside + learns

    def narrow(self, model: nn.Module) -> None:
        """Makes weights as narrow as they are when they compute, so that a rehearsal makes no copies of them.

        Args:
            model: On the meta device; changed in place.
        """
        if self.computes is None or (self.weights == 1 and not self.narrows_all):
            return
        chosen = (
            [model]
            if self.narrows_all
            else [m for m in model.modules() if isinstance(m, hf.GradientCheckpointingLayer)]
        )
        for module in chosen:
            for one in module.parameters():
                if one.is_floating_point():
                    one.data = one.data.to(self.computes)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"distributed.deepspeed: {file} cannot be read: {error}", hint="a deepspeed.json") from None
    return content if isinstance(content, dict) else {}

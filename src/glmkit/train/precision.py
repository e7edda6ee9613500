"""The numbers a run computes in: autocast, and the scale that keeps float16 gradients from vanishing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from glmkit.train.arguments import TrainBlock

_FIRST_SCALE = 2.0**16
_STEPS_BEFORE_GROWTH = 2000


@dataclass
class LossScale:
    """What the loss is multiplied by before its gradients are computed; 1 unless the run computes in float16.

    A step whose gradients are not finite is left out and the scale halved; after 2,000 good steps it doubles.

    Args:
        scale: The factor.
        good_steps: Steps since it changed.
        moves: Whether it ever changes.
    """

    scale: float
    good_steps: int = 0
    moves: bool = True

    @classmethod
    def of(cls, block: TrainBlock) -> LossScale:
        """Begin.

        Args:
            block: Its fp16 decides.
        """
        return cls(_FIRST_SCALE) if block.fp16 else cls(1.0, moves=False)

    def after(self, finite: bool) -> None:
        """Adapt to a step.

        Args:
            finite: Whether its gradients were.
        """
        if not self.moves:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == _STEPS_BEFORE_GROWTH:
            self.scale, self.good_steps = self.scale * 2, 0


def precision(block: TrainBlock, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute matrix products as a recipe says.

    Args:
        block: Its bf16 and fp16 decide.
        device: Where they are computed.
    """
    if not (block.bf16 or block.fp16):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if block.bf16 else torch.float16)

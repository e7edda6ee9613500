"""How weights move: AdamW, and the learning rate of every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from glmkit.train.arguments import Recipe, RunRecipe, TrainBlock

_HIGH_PREFIX_RATE = 2e-2  # that of the official scripts; above it prefixes are known to diverge


def make_optimizer(model: nn.Module, block: TrainBlock) -> torch.optim.Optimizer:
    """Make AdamW over what learns; vectors do not decay.

    Args:
        model: Its parameters with `requires_grad` learn.
        block: Rates and decays.

    Returns:
        The optimizer, in one kernel for all tensors where torch has one for their device.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": block.weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    def adamw(fused: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=block.learning_rate,
            betas=(block.adam_beta1, block.adam_beta2),
            eps=block.adam_epsilon,
            fused=fused,
        )

    try:
        return adamw(fused=True)
    except RuntimeError:  # a device for which torch has no such kernel
        return adamw(fused=False)


def learning_rate(step: int, total_steps: int, block: TrainBlock) -> float:
    """Return the learning rate of a step.

    Args:
        step: The step, from 1.
        total_steps: All steps of the run.
        block: Highest rate, kind of schedule and warm-up.

    Returns:
        The rate: rising linearly to the highest over the warm-up (without one the first step has the highest), then
        falling to `lr_min_ratio` of it at step `lr_decay_steps`, or one step behind the last, so that the last one
        learns too, as with the schedules of the official scripts.
    """
    end = block.lr_decay_steps or total_steps + 1
    warmup_steps = (
        math.ceil(block.warmup_ratio * (block.lr_decay_steps or total_steps))
        if block.warmup_steps is None
        else block.warmup_steps
    )
    if step <= warmup_steps:
        return block.learning_rate * step / warmup_steps
    if block.lr_scheduler_type == "constant":
        return block.learning_rate
    highest = max(1, warmup_steps)  # the step with the highest rate
    done = min(1.0, (step - highest) / max(1, end - highest))
    if block.lr_scheduler_type == "exponential":
        return block.learning_rate * block.lr_min_ratio**done
    fall = 1 - done if block.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    return block.learning_rate * (block.lr_min_ratio + (1 - block.lr_min_ratio) * fall)


def warnings_about(recipe: RunRecipe) -> list[str]:
    """Name settings that are allowed and known to go wrong.

    Args:
        recipe: The recipe.

    Returns:
        A sentence each.
    """
    method, train = recipe.method, recipe.train
    found = []
    if method.name == "ptuning_v2" and train.learning_rate > _HIGH_PREFIX_RATE:
        found.append(
            f"a learning rate of {train.learning_rate:g} is above the {_HIGH_PREFIX_RATE:g} of the official scripts, "
            "with which prefixes already diverge now and then; if the loss becomes 0 or no number, lower it"
        )
    if method.name == "ptuning_v2" and method.prefix_projection and train.fp16:
        found.append("prefix_projection with fp16 is known to overflow; prefer bf16=true, or float32")
    if method.name == "full" and train.learning_rate > 1e-3 and isinstance(recipe, Recipe) and recipe.model.path:
        found.append(
            f"a learning rate of {train.learning_rate:g} makes a whole trained model forget what it knows; "
            "the official scripts use 1e-4, larger models less"
        )
    return found

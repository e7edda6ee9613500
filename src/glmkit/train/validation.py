"""Measuring a model between two steps, without leaving a trace in the training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from glmkit.data.examples import Example
from glmkit.train.arguments import TrainBlock
from glmkit.train.precision import precision
from glmkit.train.processes import Processes, own_share
from glmkit.train.sources import Batch, Records


def mean_loss(
    model: nn.Module,
    processes: Processes,
    examples: Sequence[Example] | Sequence[Batch],
    pad_token_id: int,
    block: TrainBlock,
) -> float:
    """Measure the mean loss per label token, without learning.

    Args:
        model: The model that the processes hold.
        processes: They share the batches.
        examples: What to measure on, or the batches to measure on.
        pad_token_id: Fills short rows of examples.
        block: Batch size and precision.

    Returns:
        The loss in nats per token.
    """
    was_training = model.training
    model.eval()
    loss_sum = label_tokens = 0.0
    try:
        with torch.no_grad():
            batches = list(_in_batches(examples, pad_token_id, block))
            for batch, counts in own_share(batches, processes.rank, processes.world):
                with precision(block, processes.device):
                    loss, targets = processes.loss(batch.inputs)
                loss_sum += loss.item() * counts
                label_tokens += targets * counts
    finally:
        model.train(was_training)
    loss_sum, label_tokens = processes.sums(loss_sum, label_tokens)
    return loss_sum / label_tokens


def _in_batches(examples: Sequence[Example] | Sequence[Batch], pad_token_id: int, block: TrainBlock) -> Iterator[Batch]:
    """Yield batches as they are, or examples in batches of similar lengths."""
    if all(isinstance(example, Batch) for example in examples):
        yield from cast("Sequence[Batch]", examples)
        return
    size = block.per_device_eval_batch_size or block.per_device_train_batch_size
    fixed = block.model_copy(update={"seed": 0, "per_device_train_batch_size": size})
    records = Records(cast("Sequence[Example]", examples), pad_token_id, fixed)
    for window in itertools.islice(records.windows({}, 1), records.steps(1, 1)):
        yield from window.batches

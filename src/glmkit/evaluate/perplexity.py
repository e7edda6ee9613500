"""Perplexity: how surprised a model is by a text, `exp(mean of -log p(token | what stands before it))`.

    text     t0 t1 t2 t3 t4 t5 t6 t7 t8 t9
    window   [prefix t0 t1 t2 t3 t4 t5]              window 6, stride 4: all but t0 count,
                        [prefix t4 t5 t6 t7 t8 t9]   then t6 … t9, each with at least 2 tokens before it

With stride = window nothing is read twice; a smaller stride gives each token more to go by, and costs more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmkit.errors import DataError, UsageError
from glmkit.models.language_model import NO_TARGET, LanguageModelHead


@dataclass(frozen=True)
class Perplexity:
    """What a text gave.

    Attributes:
        loss_sum: Sum of the negative log-likelihoods, in nats.
        tokens: How many tokens were predicted.
    """

    loss_sum: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(self.loss_sum / self.tokens)


def perplexity(
    model: Any, ids: Sequence[int] | Tensor, *, window: int, stride: int | None = None, prefix: Sequence[int] = ()
) -> Perplexity:
    """Measures a model on one text.

    Args:
        model: A model that predicts the next token: ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B.
        ids: The text, (N,).
        window: How many tokens of the text the model sees at most.
        stride: By how many the window moves on; None: by its whole length.
        prefix: Ids in front of every window, the tokenizer's `prefix_ids` if the model was trained with them. They are
            not predicted; with them the first token of the text is.

    Returns:
        The perplexity, and what it was made of.

    Raises:
        DataError: There is no token to predict.
        UsageError: A window or stride that is out of range, or a model that predicts otherwise.
    """
    text = torch.as_tensor(ids, dtype=torch.long).flatten()
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(f"window={window}, stride={stride}; expected 1 <= stride <= window")
    start = torch.tensor(list(prefix), dtype=torch.long)
    device = next(model.parameters()).device
    loss_sum, tokens, counted = 0.0, 0, 0
    for first in range(0, len(text), stride):
        last = min(first + window, len(text))
        row = torch.cat((start, text[first:last]))
        labels = row.clone()
        labels[: len(start) + counted - first] = NO_TARGET
        losses = token_losses(model, row[None].to(device), labels[None])
        loss_sum += losses.double().sum().item()
        tokens += int((labels[1:] != NO_TARGET).sum())
        counted = last
        if last == len(text):
            break
    if not tokens:
        raise DataError(f"a text of {len(text)} tokens has none to predict")
    return Perplexity(loss_sum, tokens)


@torch.no_grad()
def token_losses(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of every target, in nats; logits are made where a target is, only.

    Args:
        model: As in `perplexity`.
        input_ids: (B, T) int64. Padding stands on the right.
        labels: (B, T), not shifted: position t + 1 is the target of position t; -100 is no target.

    Returns:
        (B, T - 1) float32, 0 where there is no target.

    Raises:
        UsageError: The model predicts otherwise.
    """
    if not isinstance(model, LanguageModelHead) or model.config.model_type == "glm":
        raise UsageError(
            f"{type(model).__name__} has no perplexity of a text read from left to right",
            hint="ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B have",
        )
    hidden = model.transformer(input_ids, use_cache=False, return_dict=True).last_hidden_state[:, :-1]
    targets = labels[:, 1:].to(hidden.device)
    chosen = targets != NO_TARGET
    losses = torch.zeros(targets.shape, device=hidden.device)
    losses[chosen] = F.cross_entropy(model.logits(hidden[chosen]).float(), targets[chosen].long(), reduction="none")
    return losses

"""Perplexity: how surprised a model is by a text, `exp(mean of -log p(token | what stands before it))`.

    text     t0 t1 t2 t3 t4 t5 t6 t7 t8 t9
    window   [t0 t1 t2 t3 t4 t5]              window 6, stride 4: all count, then t6 … t9, each with
                        [t4 t5 t6 t7 t8 t9]   at least 2 tokens before it

With stride = window nothing is read twice; a smaller stride gives each token more to go by, and costs more. What is
known in a window and what control tokens stand around it is in `scoring.py`; models that read what they know in both
directions are measured so as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmkit.errors import DataError, UsageError
from glmkit.evaluate.scoring import Frame, Passage, score_passages


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


class Window(NamedTuple):
    """A part of a text that the model sees at once, by the numbers of tokens."""

    first: int
    scored: int  # from here on tokens count
    last: int  # the one behind the last


def windows(tokens: int, window: int, stride: int | None = None) -> list[Window]:
    """Cuts a text so that every token counts once, with as much before it as fits.

    Args:
        tokens: Length of the text.
        window: Most tokens of a window.
        stride: By how many a window is further than the one before; None: by its whole length.

    Returns:
        The windows in the order of the text; none of an empty text.

    Raises:
        UsageError: A window or stride that is out of range.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(f"window={window}, stride={stride}; expected 1 <= stride <= window")
    found: list[Window] = []
    while not found or found[-1].last < tokens:
        first = len(found) * stride
        found.append(Window(first, found[-1].last if found else 0, min(first + window, tokens)))
    return found if tokens else []


def perplexity(
    model: Any,
    ids: Sequence[int] | Tensor,
    *,
    window: int,
    stride: int | None = None,
    prefix: Sequence[int] = (),
    between: Sequence[int] = (),
    batch_size: int = 1,
) -> Perplexity:
    """Measures a model on one text.

    Args:
        model: A language model of any family.
        ids: The text, (N,).
        window: How many tokens of the text the model sees at most.
        stride: By how many the window moves on; None: by its whole length.
        prefix: Ids in front of every window that are not predicted, such as [gMASK] sop of ChatGLM2 and later; with
            them the first token of the text is predicted too.
        between: Ids between what a window repeats and what it scores: [gMASK] sop of ChatGLM-6B, GLM-130B and GLM.
            `glmkit.evaluate.scoring.frame_of` knows both.
        batch_size: Windows that go through the model together; the result does not depend on it, up to rounding.

    Returns:
        The perplexity, and what it was made of.

    Raises:
        DataError: There is no token to predict.
        UsageError: A window or stride that is out of range, or a model that predicts no tokens.
    """
    text = torch.as_tensor(ids, dtype=torch.long).flatten().tolist()
    parts = windows(len(text), window, stride)
    if not prefix and not between:  # behind nothing nothing can be predicted
        parts = [part._replace(scored=max(part.scored, part.first + 1)) for part in parts]
    passages = [Passage(text[part.first : part.scored], text[part.scored : part.last]) for part in parts]
    passages = [passage for passage in passages if passage.scored]
    scored = score_passages(model, Frame(tuple(prefix), tuple(between)), passages, batch_size=batch_size)
    if not scored:
        raise DataError(f"a text of {len(text)} tokens has none to predict")
    losses = [-math.fsum(one.log_probabilities) for one in scored]
    return Perplexity(math.fsum(losses), sum(len(one.log_probabilities) for one in scored))

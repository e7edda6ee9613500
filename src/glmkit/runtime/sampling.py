"""From scores to the next token, in numpy: the rules of `glmkit.engine.sampling` in their order.

Letters: `V` vocabulary rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmkit.errors import GenerationError, UsageError

_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: Divides the scores; 0 takes the most likely token.
        top_k: Only the k most likely tokens; 0 is off.
        top_p: Only the most likely tokens that together reach this probability; 1 is off.
        min_p: Only tokens with at least this share of the most likely one's probability; 0 is off.
        repetition_penalty: Tokens that were there already lose; 1 is off.
        seed: Makes sampling reproducible; None: another answer each time.

    Raises:
        UsageError: A value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, math.inf),
            ("top_k", 0, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-6, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high or math.isinf(value):
                raise UsageError(f"{name}={value!r}: expected a number from {low:g} to {high:g}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY_BELOW

    def generator(self, row: int = 0) -> random.Random:
        """The source of random numbers of a row; row 0 has the seed itself.

        Args:
            row: Its number in the batch.
        """
        return random.Random(None if self.seed is None else self.seed if row == 0 else f"{self.seed}/{row}")


def choose(
    scores: NDArray[np.float32], sampling: Sampling, previous_ids: Sequence[int], generator: random.Random
) -> int:
    """Chooses a token.

    Args:
        scores: (V,) logits.
        sampling: The rules.
        previous_ids: Prompt and answer so far.
        generator: Gives one number, unless the choice is greedy.

    Returns:
        Its id.

    Raises:
        GenerationError: A score is no finite number.
    """
    scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise GenerationError(
            "the model gave scores that are not finite", hint="export it with --weights of more bits, or in float32"
        )
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(previous_ids, dtype=np.int64))
        lost = scores[seen]
        scores[seen] = np.where(lost < 0, lost * sampling.repetition_penalty, lost / sampling.repetition_penalty)
    if sampling.is_greedy:
        return int(scores.argmax())
    scores = scores / np.float32(sampling.temperature)
    ids = np.argsort(-scores, kind="stable")
    scores = scores[ids]
    if 0 < sampling.top_k < len(scores):
        kept = scores >= scores[sampling.top_k - 1]  # with all that tie with the last of them
        scores, ids = scores[kept], ids[kept]
    chances = np.exp((scores - scores[0]).astype(np.float64))
    if sampling.top_p < 1.0:
        before = np.cumsum(chances / chances.sum()) - chances / chances.sum()
        kept = before < sampling.top_p
        kept[0] = True
        chances, ids = chances[kept], ids[kept]
    kept = chances >= sampling.min_p * chances[0]
    chances, ids = chances[kept], ids[kept]
    totals = np.cumsum(chances)
    place = int(np.searchsorted(totals, generator.random() * totals[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])

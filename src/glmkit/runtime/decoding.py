"""The decode loop over a graph: prompts, padded on the left, then one token for every row that is not finished.

Letters: `B` rows, `T` columns of the prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmkit.errors import ContextLengthError, UsageError
from glmkit.runtime.layout import Ints, Layout
from glmkit.runtime.sampling import Sampling, choose
from glmkit.runtime.session import Session

_CHUNK_TOKENS = 512  # of a prompt at once, which bounds memory


@dataclass(frozen=True)
class Limits:
    """When answers end.

    Args:
        stop_ids: Ids that end an answer.
        context_tokens: What prompt and answer may have together.
        max_new_tokens: Longest answer; None: what the context leaves.
    """

    stop_ids: frozenset[int]
    context_tokens: int
    max_new_tokens: int | None = None

    def room(self, prompt_tokens: int) -> int:
        """How long the answer to a prompt may be.

        Args:
            prompt_tokens: Length of the prompt.

        Raises:
            UsageError: The prompt is empty, or nothing may be answered.
            ContextLengthError: It fills the context.
        """
        left = self.context_tokens - prompt_tokens
        if prompt_tokens < 1 or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            raise UsageError("an answer needs a prompt, and at least one token")
        if left < 1:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens:,} tokens; the model's context is {self.context_tokens:,} tokens,"
                " the answer included",
                hint="shorten the text, or send it in parts",
            )
        return left if self.max_new_tokens is None else min(left, self.max_new_tokens)


MakeLayout = Callable[[Ints, Ints], Layout]


def stream(
    session: Session, layout_of: MakeLayout, prompt: Sequence[int], sampling: Sampling, limits: Limits
) -> Iterator[tuple[int, str | None]]:
    """Generates one answer.

    Args:
        session: The graph.
        layout_of: Makes the layout of padded prompts (B, T) and their pads (B,).
        prompt: Ids.
        sampling: How tokens are chosen.
        limits: When it ends.

    Yields:
        An id and None; with the last one "stop" (a stop id, which is no part of the answer) or "length".

    Raises:
        UsageError: See `Limits.room`.
        GenerationError: The graph's scores are not finite.
    """
    rows = _Rows(session, layout_of, [prompt], sampling)
    room = limits.room(len(prompt))
    for count in range(1, room + 1):
        token = rows.advance()[0]
        reason = "stop" if token in limits.stop_ids else "length" if count == room else None
        yield token, reason
        if reason:
            return


def generate_batch(
    session: Session,
    layout_of: MakeLayout,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Limits,
) -> list[list[int]]:
    """Generates an answer for each of several prompts at once.

    Args:
        session: The graph.
        layout_of: Makes the layout of padded prompts.
        prompts: Ids of each.
        sampling: How tokens are chosen; with a seed, each row has numbers of its own.
        limits: When answers end.

    Returns:
        The answers, without stop ids.

    Raises:
        UsageError: See `Limits.room`.
        GenerationError: The graph's scores are not finite.
    """
    if not prompts:
        return []
    rooms = [limits.room(len(prompt)) for prompt in prompts]
    rows = _Rows(session, layout_of, prompts, sampling)
    answers: list[list[int]] = [[] for _ in prompts]
    while rows.numbers:
        going = []
        for place, (number, token) in enumerate(zip(rows.numbers, rows.advance())):
            if token not in limits.stop_ids:
                answers[number].append(token)
                if len(answers[number]) < rooms[number]:
                    going.append(place)
        rows.select(going)
    return answers


class _Rows:
    """Rows that advance together."""

    def __init__(
        self, session: Session, layout_of: MakeLayout, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> None:
        self.numbers = list(range(len(prompts)))
        self._session, self._sampling = session, sampling
        self._history = [list(prompt) for prompt in prompts]
        self._random: list[random.Random] = [sampling.generator(row) for row in self.numbers]
        self._columns = width = max(map(len, prompts))
        self._next: Ints = np.array([[0] * (width - len(one)) + list(one) for one in prompts], dtype=np.int64)
        self._layout = layout_of(self._next, np.array([width - len(one) for one in prompts]))
        session.start(len(prompts))

    def advance(self) -> list[int]:
        """Computes what is new and chooses a token for every row."""
        scores = self._compute()
        tokens = [
            choose(row, self._sampling, history, source)
            for row, history, source in zip(scores, self._history, self._random)
        ]
        for history, token in zip(self._history, tokens):
            history.append(token)
        self._next = np.array(tokens, dtype=np.int64)[:, None]
        self._columns += 1
        return tokens

    def _compute(self) -> NDArray[np.float32]:
        width = self._next.shape[1]
        chunk = width if self._layout.whole_prompt else _CHUNK_TOKENS
        first = self._columns - width
        for start in range(0, width, chunk):
            end = min(start + chunk, width)
            mask, positions = self._layout.columns(first + start, first + end)
            scores = self._session.run(self._next[:, start:end], mask, positions)
        return scores

    def select(self, places: Collection[int]) -> None:
        """Keeps some rows."""
        kept = list(places)
        if len(kept) == len(self.numbers):
            return
        self.numbers = [self.numbers[place] for place in kept]
        if not kept:
            return
        self._history = [self._history[place] for place in kept]
        self._random = [self._random[place] for place in kept]
        self._next = self._next[kept]
        self._layout.select(kept)
        self._session.select(kept)

"""Masks and positions of a batch that is padded on the left, as the graph takes them.

    causal    mask (B, S) 1 = token           positions (B, T)             ChatGLM2, ChatGLM3, GLM-4
    prefix    mask (B, 1, T, S) 1 = is seen   positions (B, 2, T), (B, T)  ChatGLM-6B, GLM; GLM-130B

With a prefix a prompt is read in both directions: everything in front of the start of the answer sees all of itself.
What positions mean, `glmkit.models.prefix_lm` says.

Letters: `B` rows, `T` new tokens, `S` all tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glmkit.errors import UsageError

Ints = NDArray[np.int64]


class Layout(Protocol):
    """Masks and positions: for the prompts, then for what follows them."""

    whole_prompt: bool
    """Whether prompts must be read in one piece."""

    def columns(self, start: int, end: int) -> tuple[Ints, Ints]:
        """Mask and positions of columns start to end, of the prompts or behind them."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some rows, by their place."""
        ...


class CausalLayout:
    """Tokens see what came before them.

    Args:
        pads: Columns of padding of each row, (B,).
    """

    whole_prompt = False

    def __init__(self, pads: Ints) -> None:
        self._pads = pads[:, None]

    def columns(self, start: int, end: int) -> tuple[Ints, Ints]:
        """Mask (B, end) and positions (B, end - start).

        Args:
            start: First column.
            end: Column behind the last.
        """
        mask = (np.arange(end) >= self._pads).astype(np.int64)
        return mask, np.maximum(np.arange(start, end) - self._pads, 0)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some rows, by their place."""
        self._pads = self._pads[list(rows)]


class PrefixLayout:
    """The prompt sees all of itself, the answer the prompt and itself so far.

    Args:
        ids: The prompts, (B, T), padded on the left.
        pads: Columns of padding of each row, (B,).
        data: What runtime.json says: `sop_id`, the start of an answer; `mask_ids`, groups of marks, of which the first
            that a row has is where its answer belongs; `two_rows` of positions, or one that counts on behind
            `counting_ids` and stays elsewhere.

    Raises:
        UsageError: A row has no start or no mark.
    """

    whole_prompt = True

    def __init__(self, ids: Ints, pads: Ints, data: dict[str, Any]) -> None:
        self._pads = pads[:, None]
        real = np.where(np.arange(ids.shape[1]) >= self._pads, ids, -1)
        starts = real == data["sop_id"]
        masks = np.full(len(ids), -1)
        for group in reversed(data["mask_ids"]):
            hits = np.isin(real, group)
            masks = np.where(hits.any(1), hits.argmax(1), masks)
        if not starts.any(1).all() or (masks < 0).any():
            raise UsageError(
                "a row of the input has no mask token or no start of an answer",
                hint=f"expected the id {data['sop_id']} and one of {data['mask_ids']} in every row",
            )
        self._context, self._masks = starts.argmax(1)[:, None], masks[:, None]
        self._two_rows: bool = data["two_rows"]
        counting = np.take_along_axis(real, self._masks, 1)
        self._stays = ~np.isin(counting, data["counting_ids"])

    def columns(self, start: int, end: int) -> tuple[Ints, Ints]:
        """Mask (B, 1, end - start, end) and positions (B, 2, end - start) or (B, end - start).

        Args:
            start: First column.
            end: Column behind the last.
        """
        rows, columns = np.arange(start, end)[:, None], np.arange(end)
        context, pads = self._context[:, :, None], self._pads[:, :, None]
        seen = ((columns < context) | (columns <= rows)) & (columns >= pads) & (rows >= pads)
        return seen[:, None].astype(np.int64), self._positions(np.arange(start, end))

    def _positions(self, columns: Ints) -> Ints:
        if self._two_rows:
            belongs = np.where(columns < self._context, columns, self._masks) - self._pads
            return np.stack((np.maximum(belongs, 0), np.maximum(columns - self._context + 1, 0)), axis=1)
        stays = (columns >= self._context) & self._stays
        return np.maximum(np.where(stays, self._masks, columns) - self._pads, 0)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some rows, by their place."""
        kept = list(rows)
        self._pads, self._context = self._pads[kept], self._context[kept]
        self._masks, self._stays = self._masks[kept], self._stays[kept]


class SpanLayout:
    """One row with several fillings behind its text: the masks of one long filling, other positions.

    Args:
        base: The layout of the row.
        context: Columns of the text.
        spans: Of each filling the column of its blank and its tokens so far, the start included.
    """

    whole_prompt = True

    def __init__(self, base: PrefixLayout, context: int, spans: Sequence[tuple[int, int]]) -> None:
        first = [*range(context), *(place for place, count in spans for _ in range(count))]
        second = [*([0] * context), *(number for _, count in spans for number in range(1, count + 1))]
        self._base, self._prompt = base, np.array([first, second])

    def columns(self, start: int, end: int) -> tuple[Ints, Ints]:
        """Mask (1, 1, end - start, end) and positions (1, 2, end - start)."""
        more = np.arange(1, max(0, end - self._prompt.shape[1]) + 1)
        behind = self._prompt[:, -1:] + np.array([[0], [1]]) * more
        positions = np.concatenate((self._prompt, behind), axis=1)[None, :, start:end]
        return self._base.columns(start, end)[0], positions

    def select(self, rows: Sequence[int]) -> None:
        """There is one row, and it stays."""


def layout_of(data: dict[str, Any], ids: Ints, pads: Ints) -> Layout:
    """The layout that runtime.json names.

    Args:
        data: Its part `layout`.
        ids: The prompts, (B, T), padded on the left.
        pads: Columns of padding of each row, (B,).
    """
    return PrefixLayout(ids, pads, data) if data["kind"] == "prefix" else CausalLayout(pads)

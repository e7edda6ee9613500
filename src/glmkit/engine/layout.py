"""Which mask and which positions a model call gets: the layout of a batch that is padded on the left.

Causal models need neither as long as no row is padded. Models that read a prompt in both directions bring a layout of
their own (`input_layout`): they read a prompt in one piece, and what they have read of it is of no use for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class InputLayout(Protocol):
    """Masks and positions of a batch: for the prompts, then for what follows them, token after token."""

    whole_prompt: bool
    """Whether a prompt must be read in one call, because its tokens look at what comes later."""

    def prompt(self, start: int, end: int) -> dict[str, Tensor]:
        """Keyword arguments of the model call for columns start to end of the prompts."""
        ...

    def step(self, tokens: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of the model call for the next tokens of every row; counts on by as many."""
        ...

    def rewind(self, tokens: int) -> None:
        """Takes back the last tokens that `step` counted."""
        ...

    def select(self, places: Sequence[int]) -> None:
        """Keeps some rows of the batch, by their place in it."""
        ...


class CausalLayout:
    """The layout of a model whose tokens see what came before them.

    Args:
        width: Columns of the prompts, padding included.
        pads: Columns of padding of each row, (B,) int64.
    """

    whole_prompt = False

    def __init__(self, width: int, pads: Tensor) -> None:
        self._mask: Tensor | None = None  # (B, S), None without padding: the model counts
        self._pads = pads
        if bool(pads.any()):
            self._mask = (torch.arange(width, device=pads.device) >= pads[:, None]).long()

    def prompt(self, start: int, end: int) -> dict[str, Tensor]:
        """Keyword arguments of the model call for columns start to end of the prompts.

        Args:
            start: First column.
            end: Column behind the last.

        Returns:
            Nothing without padding, else attention_mask (B, end) and position_ids (B, end - start).
        """
        if self._mask is None:
            return {}
        columns = torch.arange(start, end, device=self._pads.device)
        return {
            "attention_mask": self._mask[:, :end],
            "position_ids": (columns - self._pads[:, None]).clamp_(min=0),
        }

    def step(self, tokens: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of the model call for the next tokens of every row.

        Args:
            tokens: How many, `T`.

        Returns:
            Nothing without padding, else attention_mask (B, S) and position_ids (B, T).
        """
        if self._mask is None:
            return {}
        self._mask = torch.cat((self._mask, self._mask.new_ones((len(self._mask), tokens))), dim=1)
        return self.prompt(self._mask.shape[1] - tokens, self._mask.shape[1])

    def rewind(self, tokens: int) -> None:
        """Takes back the last tokens that `step` counted.

        Args:
            tokens: How many.
        """
        if self._mask is not None:
            self._mask = self._mask[:, : self._mask.shape[1] - tokens]

    def select(self, places: Sequence[int]) -> None:
        """Keeps some rows of the batch.

        Args:
            places: Their places in it.
        """
        if self._mask is not None:
            kept = torch.tensor(list(places), device=self._mask.device)
            self._mask, self._pads = self._mask[kept], self._pads[kept]


def layout_for(model: Any, ids: Tensor, pads: Tensor) -> InputLayout:
    """The model's own layout, or the causal one.

    Args:
        model: The language model.
        ids: The prompts, (B, T) int64, padded on the left.
        pads: Columns of padding of each row, (B,) int64.
    """
    own = getattr(model, "input_layout", None)
    return CausalLayout(ids.shape[1], pads) if own is None else own(ids, pads)


def reads_whole_prompts(model: Any) -> bool:
    """Whether a model looks at a whole prompt at once, so that nothing it has read can be continued otherwise."""
    return hasattr(model, "input_layout")

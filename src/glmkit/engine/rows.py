"""One decode step for several rows of different lengths, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glmkit.engine.cache import BufferCache
from glmkit.engine.forward import forward_for
from glmkit.engine.layout import InputLayout

__all__ = ["RowsForward", "rows_forward"]


class RowsForward(Protocol):
    """Runs the last token of each of several rows."""

    def __call__(self, ids: Tensor, layouts: Sequence[InputLayout], caches: Sequence[BufferCache]) -> Tensor:
        """Returns logits (B, V) float32; see `rows_forward`."""
        ...


def rows_forward(model: Any) -> RowsForward:
    """What runs one step of several rows that have different lengths."""

    def run(ids: Tensor, layouts: Sequence[InputLayout], caches: Sequence[BufferCache]) -> Tensor:
        lengths = [cache.get_seq_length() for cache in caches]
        try:
            with torch.inference_mode():
                found = [
                    forward_for(model, cache)(ids[row : row + 1], layout.step(1), 1)[:, -1].float()
                    for row, (layout, cache) in enumerate(zip(layouts, caches))
                ]
        except BaseException:
            for cache, length in zip(caches, lengths):
                cache.truncate(length)
            raise
        return torch.cat(found)

    return run

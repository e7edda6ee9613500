"""One token for each of several rows of different lengths, each with a cache of its own: a step of a changing batch.

    native code               reads every row's own cache where it is (engine/native.py)
    the model itself          sees the caches side by side for the time of a call, padded on the left

        row 0   . . . k k k K       . padding, which the mask hides; k cached; K the new token's key, which also goes
        row 1   k k k k k k K         to the row's own cache
        row 2   . k k k k k K

Rows may come, go and grow between two calls: nothing is copied for that, and nothing is kept of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glmkit import hf
from glmkit.engine.cache import BufferCache, BufferLayer, LanguageModel
from glmkit.engine.layout import InputLayout
from glmkit.engine.native import logits_by_model, runner_for
from glmkit.errors import UsageError

__all__ = ["RowsForward", "rows_forward"]


class RowsForward(Protocol):
    """Runs the last token of each of several rows; see `rows_forward`."""

    def __call__(self, ids: Tensor, layouts: Sequence[InputLayout], caches: Sequence[BufferCache]) -> Tensor:
        """Runs one token of each row, and appends it to the row's cache.

        Args:
            ids: The last token of each row, (B, 1) int64.
            layouts: Masks and positions of each row, each a layout of one row; counts on by one token.
            caches: What each row has read: caches of one row, of any lengths, no two the same.

        Returns:
            Logits (B, V), float32.

        Raises:
            UsageError: There are not as many layouts and caches as rows, or a cache has several rows.
            Exception: Whatever the model raises. Caches and layouts are then as they were, for all rows.
        """
        ...


def rows_forward(model: LanguageModel, *, exact: bool = True) -> RowsForward:
    """The fastest way to run one step of several rows of different lengths.

    Where native code runs it, a row gets bit for bit what it gets alone; where the model runs it, up to rounding.

    Args:
        model: A language model, or a view of one with an adapter: all rows of a call have the same.
        exact: Whether native code runs all that it can. Otherwise the model runs many rows of 16-bit weights, which
            torch multiplies faster.

    Returns:
        A function to be kept for many steps. Like a `Runner` it notices weights that are moved or replaced, but not
        everything that can happen to a model: ask again when a request starts.
    """
    return _Rows(model, exact)


class _Rows:
    def __init__(self, model: Any, exact: bool) -> None:
        self._model, self._exact = model, exact
        self._runner = runner_for(model)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, layouts: Sequence[InputLayout], caches: Sequence[BufferCache]) -> Tensor:
        _check(ids, layouts, caches)
        lengths = [cache.get_seq_length() for cache in caches]
        stepped = 0
        try:
            given = []
            for layout in layouts:
                given.append(layout.step(1))
                stepped += 1
            runner = self._runner
            if runner is not None and not any(given) and (self._exact or runner.is_fastest(len(caches))):
                logits = runner.rows(ids, caches)
                if logits is not None:
                    return logits
            return self._by_model(ids, given, lengths, caches)
        except BaseException:
            for layout in layouts[:stepped]:
                layout.rewind(1)
            for cache, length in zip(caches, lengths):
                cache.truncate(length)
            raise

    def _by_model(
        self, ids: Tensor, given: list[dict[str, Tensor]], lengths: list[int], caches: Sequence[BufferCache]
    ) -> Tensor:
        device = self._model.device
        mask, positions = _joined(given, lengths, device)
        cache = caches[0] if len(caches) == 1 else _side_by_side(caches, max(lengths))
        return logits_by_model(self._model, ids.to(device), mask, positions, cache, 1)[:, -1].float()


def _check(ids: Tensor, layouts: Sequence[InputLayout], caches: Sequence[BufferCache]) -> None:
    if not caches or ids.shape != (len(caches), 1) or len(layouts) != len(caches):
        raise UsageError(
            f"a step of ids of the shape {list(ids.shape)}, {len(layouts)} layouts and {len(caches)} caches: expected"
            " one token, one layout and one cache for each row"
        )
    if any(cache.layers[0].batch_size != 1 for cache in caches) or len(set(map(id, caches))) < len(caches):
        raise UsageError("the rows of a step share a cache: expected one cache of one row for each")


def _joined(
    given: list[dict[str, Tensor]], lengths: list[int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and positions of all rows, from what each row's layout says; padded on the left, which nobody sees.

    Args:
        given: What the layouts said, of one row each.
        lengths: Tokens in each row's cache.
        device: Of the model.

    Returns:
        The mask, (B, S) or (B, 1, 1, S), and the positions, (B, 1) or (B, 2, 1); None where the model needs none.
    """
    longest = max(lengths)
    if not any(given) and min(lengths) == longest:
        return None, None
    masks, positions = [], []
    for row, length in zip(given, lengths):
        mask, position = row.get("attention_mask"), row.get("position_ids")
        if mask is None:
            mask = torch.ones(1, length + 1, dtype=torch.int64, device=device)
        # A token sees itself, so the last column says how this mask writes "seen"; padding gets the opposite.
        hidden = mask[..., -1:].logical_not().to(mask.dtype)
        masks.append(torch.cat((hidden.expand(*mask.shape[:-1], longest - length), mask), dim=-1))
        positions.append(torch.tensor([[length]], device=device) if position is None else position)
    return torch.cat(masks), torch.cat(positions)


def _side_by_side(caches: Sequence[BufferCache], longest: int) -> hf.Cache:
    """The caches of all rows as the model sees them in one call."""
    room: dict[Any, tuple[Tensor, Tensor]] = {}
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return hf.Cache(layers=[_LayerOfRows(rows, longest, room) for rows in layers])


class _LayerOfRows(hf.CacheLayerMixin):
    """One layer of several rows with caches of their own, for one call of the model.

    Args:
        rows: The layer of each row's cache.
        longest: Tokens in the longest, before the call.
        room: Memory for keys and values side by side, which all layers of a call use one after the other.
    """

    is_sliding = False

    def __init__(self, rows: Sequence[BufferLayer], longest: int, room: dict[Any, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._rows, self._tokens, self._room = rows, longest, room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the rows have their own buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, K, 1, D) keys and values, to each row's own.

        Returns:
            All keys and values so far, (B, K, S, D), zeros where a row has padding. They hold until the next layer's.
        """
        columns = self._tokens + 1
        keys, values = self._side_by_side(key_states, value_states, columns)
        for place, row in enumerate(self._rows):
            own = row.update(key_states[place : place + 1], value_states[place : place + 1])
            for to, part in zip((keys, values), own):
                to[place, :, columns - part.shape[2] :].copy_(part[0])
        self._tokens = columns
        return keys, values

    def _side_by_side(self, keys: Tensor, values: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        kind = (keys.device, keys.dtype, values.dtype, keys.shape, values.shape)
        if kind not in self._room:  # zeros, not what happens to lie there: a weight of 0 times NaN is NaN
            self._room[kind] = (_zeros(keys, columns), _zeros(values, columns))
        return self._room[kind]

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that the next tokens will see, and the position of the first of them."""
        return self._tokens + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _zeros(like: Tensor, columns: int) -> Tensor:
    B, K, _, D = like.shape
    return like.new_zeros(B, K, columns, D)

"""A key/value cache that is allocated once and hands out views of the part that is filled.

Appending a token to transformers' `DynamicCache` copies all keys and values of the conversation; here it writes one
column. Letters: `B` rows, `K` key/value heads, `T` new tokens, `S` filled tokens, `D` head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glmkit import hf
from glmkit.errors import UsageError


class LanguageModel(Protocol):
    """What the engine needs of a model: its shape, its place, and logits for token ids."""

    config: Any  # num_hidden_layers, vocab_size and, if the context is limited, max_position_embeddings

    @property
    def device(self) -> torch.device: ...

    def __call__(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: hf.Cache,
        use_cache: bool,
        logits_to_keep: int,
    ) -> Any: ...


class BufferLayer(hf.CacheLayerMixin):
    """Keys and values of one layer in two buffers (B, K, capacity, D), filled from the left.

    Args:
        batch: Number of rows, `B`.
        capacity_tokens: Room to allocate at the first update; it doubles when it is full.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, batch: int, capacity_tokens: int) -> None:
        super().__init__()
        self.batch_size = batch
        self.capacity_tokens = capacity_tokens
        self.filled_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the buffers in the dtype and on the device of the first keys and values."""
        if key_states.shape[0] != self.batch_size:
            raise UsageError(f"a cache for {self.batch_size} rows was given keys of {key_states.shape[0]} rows")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._buffer(key_states)
        self.values = self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, like: Tensor) -> Tensor:
        # A tensor born in inference mode could not be written to outside it, for instance by `generate`.
        with torch.inference_mode(False):
            return like.new_empty((self.batch_size, like.shape[1], self.capacity_tokens, like.shape[3]))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, D) keys and values.

        Returns:
            Views (B, K, S, D) of everything so far. With room for 8 and 3 filled, two more tokens are written to
            columns 3 and 4, and columns 0 to 4 come back.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.filled_tokens, self.filled_tokens + key_states.shape[2]
        if end > self.capacity_tokens:
            self._grow(end)
        self.keys.narrow(2, start, end - start).copy_(key_states)
        self.values.narrow(2, start, end - start).copy_(value_states)
        self.filled_tokens = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def reserve(self, tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
        """Makes room behind what is filled, for who writes keys and values there and then counts `filled_tokens` on.

        Args:
            tokens: How many come.
            heads: `K`, like the next two for buffers that are not there yet, which are made on the CPU.
            width: `D`.
            dtype: Of keys and values.
        """
        if not self.is_initialized:
            first = torch.empty(self.batch_size, heads, 0, width, dtype=dtype)
            self.lazy_initialization(first, first)
        if self.filled_tokens + tokens > self.capacity_tokens:
            self._grow(self.filled_tokens + tokens)

    def _grow(self, needed_tokens: int) -> None:
        self.resize(max(2 * self.capacity_tokens, needed_tokens))

    def resize(self, capacity_tokens: int) -> None:
        """Gives the buffers another length, at least that of what is filled."""
        self.capacity_tokens = max(capacity_tokens, self.filled_tokens, 1)
        if self.is_initialized:
            keys, values = self._filled()
            self.keys, self.values = self._buffer(keys), self._buffer(values)
            self.keys.narrow(2, 0, self.filled_tokens).copy_(keys)
            self.values.narrow(2, 0, self.filled_tokens).copy_(values)

    def _filled(self) -> tuple[Tensor, Tensor]:
        return self.keys.narrow(2, 0, self.filled_tokens), self.values.narrow(2, 0, self.filled_tokens)

    def get_seq_length(self) -> int:
        """Number of filled tokens, `S`."""
        return self.filled_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the next `query_length` tokens will see, and the position of the first of them."""
        return self.filled_tokens + query_length, 0

    def get_max_length(self) -> int:
        """No limit: the buffers grow."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens and keeps the buffers."""
        self.filled_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; the number is given negative, as transformers does."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: expected 0 or a negative number")
        self.filled_tokens = max(0, self.filled_tokens + tokens_to_remove)

    def batch_select_indices(self, indices: Tensor, shared_tokens: int = 0) -> None:
        """Keeps the rows `indices` in that order; the room behind the filled part stays.

        Args:
            indices: Numbers of rows, (B,) int64.
            shared_tokens: So many tokens at the beginning are the same in all rows; if there are as many rows as
                before, they stay where they are.
        """
        self.batch_size = len(indices)
        if self.is_initialized:
            with torch.inference_mode(False):
                indices = indices.to(self.keys.device).clone()
                self.keys = self._selected(self.keys, indices, shared_tokens)
                self.values = self._selected(self.values, indices, shared_tokens)

    def _selected(self, buffer: Tensor, indices: Tensor, shared_tokens: int) -> Tensor:
        start, result = shared_tokens, buffer
        if len(indices) != len(buffer):
            start, result = 0, self._buffer(buffer)
        own = buffer.narrow(2, start, self.filled_tokens - start).index_select(0, indices)
        result.narrow(2, start, self.filled_tokens - start).copy_(own)
        return result

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, neighbours together."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))


class BufferCache(hf.Cache):
    """One `BufferLayer` per layer of a model; whatever takes a transformers cache takes it."""

    layers: list[BufferLayer]

    def select_rows(self, rows: Sequence[int], shared_tokens: int = 0) -> None:
        """Keeps only some rows, for instance those that are not finished, or the beams that go on.

        Args:
            rows: Their numbers, in the order wanted.
            shared_tokens: So many tokens at the beginning are the same in all rows, and need not be copied.
        """
        indices = torch.tensor(list(rows), dtype=torch.int64)
        for layer in self.layers:
            layer.batch_select_indices(indices, shared_tokens)

    def truncate(self, tokens: int) -> None:
        """Forgets everything behind the first `tokens` tokens, so that another continuation can follow them.

        Args:
            tokens: Number of tokens to keep, at most as many as there are.
        """
        filled = self.get_seq_length()
        if not 0 <= tokens <= filled:
            raise UsageError(f"cannot keep {tokens} tokens of a cache: expected 0 to {filled}, which are there")
        for layer in self.layers:  # each by its own length: an interrupted step leaves the first layers one ahead
            layer.crop(min(0, tokens - layer.filled_tokens))

    @property
    def capacity_tokens(self) -> int:
        """For how many tokens there is room without a copy."""
        return self.layers[0].capacity_tokens

    def resize(self, capacity_tokens: int) -> None:
        """Makes room for so many tokens in all, or gives room back.

        Args:
            capacity_tokens: How many; never fewer than are filled.
        """
        for layer in self.layers:
            layer.resize(capacity_tokens)

    def copy(self, tokens: int, capacity_tokens: int) -> BufferCache:
        """Makes another cache with the same beginning, for another continuation.

        Args:
            tokens: Length of the beginning, at most what is filled.
            capacity_tokens: Room in the new cache.
        """
        layers = []
        for layer in self.layers:
            copied = BufferLayer(layer.batch_size, max(1, capacity_tokens, tokens))
            if layer.is_initialized:
                copied.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
                copied.keys.narrow(2, 0, tokens).copy_(layer.keys.narrow(2, 0, tokens))
                copied.values.narrow(2, 0, tokens).copy_(layer.values.narrow(2, 0, tokens))
                copied.filled_tokens = tokens
            layers.append(copied)
        return BufferCache(layers=layers)


def new_cache(model: LanguageModel, batch: int, capacity_tokens: int) -> BufferCache:
    """Makes an empty cache for a model.

    Args:
        model: Its `config.num_hidden_layers` says how many layers there are.
        batch: Number of rows.
        capacity_tokens: Tokens to make room for; more than that still works, at the price of a copy.

    Returns:
        The cache; memory is taken at the first use, 2 * layers * B * K * capacity * D numbers.
    """
    layers = model.config.num_hidden_layers
    return BufferCache(layers=[BufferLayer(batch, max(1, capacity_tokens)) for _ in range(layers)])

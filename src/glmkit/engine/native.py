"""Whole steps of the ChatGLM2, ChatGLM3 and GLM-4 network in one native call, over the same cache and the same weights.

    runner_for(model)            once for each generation: looks whether nothing stands beside the plain network
    runner.rows(ids, caches)     the next token of several rows, each with a cache of its own, of any length
    runner(ids, cache=...)
        few tokens               glm_decode: ids in, logits out; in float32 also those of a short prompt
        many, quantised          each block in two halves around torch's attention
        many, float              the model itself: torch multiplies large float matrices well
        anything unusual         the model itself: other caches, masks, positions, an adapter

What is added up is float32, whatever the weights are. network.py says what the native code reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from glmkit import hf
from glmkit.adapters.switching import adapter_of
from glmkit.engine.cache import BufferCache
from glmkit.engine.network import Network, base_of, network_of, why_not
from glmkit.kernels import decoder as native
from glmkit.kernels.linear import DTYPES
from glmkit.models.layers import attend

__all__ = ["Runner", "runner_for", "why_not"]


def runner_for(model: Any) -> Runner | None:
    """What runs a model's steps natively; ask again for each generation, because a model may change in between.

    Args:
        model: Any language model, or a view of one with an adapter.

    Returns:
        None where the model itself has to do it; `why_not` says why.

    Raises:
        KernelsError: The user named a level of native code that does not work here.
    """
    network = network_of(base_of(model))
    return None if network is None else Runner(model, network)


class Runner:
    """Runs a model's steps natively, for one generation at a time; `runner_for` makes it.

    Args:
        model: The model, or a view of it; called where native code does not fit.
        network: Its weights.
    """

    def __init__(self, model: Any, network: Network) -> None:
        self._model = model
        self._base: Any = base_of(model)
        self._take(network)
        self._adapters = getattr(model, "glm_adapters", None)
        library = native.functions()
        assert library is not None
        self._library = library
        self._step, self._rows_step = native.Step(), native.Step()
        self._buffers: list[Tensor] = []  # keys of each layer, whose addresses the step has
        self._held: tuple[Tensor | None, ...] = ()

    def _take(self, network: Network) -> None:
        """Keeps the weights as well: whoever replaces one between two steps must not free what is read here."""
        self._network = network
        floats = network.dtype == torch.float32 and not network.is_quantised
        self._most_tokens = native.MOST_FLOAT_TOKENS if floats else native.MOST_TOKENS
        self._weights = [parameter.detach() for parameter in self._base.parameters()]
        self._places: WeakKeyDictionary[BufferCache, _Places] = WeakKeyDictionary()  # of rows with caches of their own

    @torch.inference_mode()
    def __call__(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: hf.Cache,
        keep: int = 1,
    ) -> Tensor:
        """Runs new tokens behind a cache, and adds them to it.

        Args:
            ids: (B, T) int64.
            attention_mask: (B, S) 0 for padding, 1 for tokens, S = cached and new ones; None: no padding. Padding on
                the left and masks of two dimensions run natively, others by the model.
            position_ids: (B, T) int64; None: counted from the length of the cache, padding included.
            cache: A `BufferCache`; another one is left to the model.
            keep: For how many of the last positions logits are wanted.

        Returns:
            Logits (B, keep, V), float32.
        """
        if self._is_native(ids, attention_mask, cache):
            assert isinstance(cache, BufferCache)
            rows, tokens = ids.shape
            few = rows * tokens <= self._most_tokens
            if few or self._network.is_quantised:
                self._prepare(ids, attention_mask, position_ids, cache)
                keep = min(keep, tokens)
                logits = self._few(rows, keep) if few else self._many(ids, attention_mask, cache, keep)
                if logits is not None:
                    for layer in cache.layers:
                        layer.filled_tokens += tokens
                    return logits
        return logits_by_model(self._model, ids, attention_mask, position_ids, cache, keep).float()

    @torch.inference_mode()
    def rows(self, ids: Tensor, caches: Sequence[BufferCache]) -> Tensor | None:
        """Runs one new token of each row behind a cache of its own; a row gets what it gets alone, bit for bit.

        The position of a token is the length of its cache. Nothing is counted unless all went well.

        Args:
            ids: (B, 1) int64, any number of rows.
            caches: A cache of one row for each, of any lengths; each gets the token appended.

        Returns:
            Logits (B, V), float32. None where the model has to do it, or to say what is wrong.
        """
        count = len(caches)
        if ids.shape != (count, 1) or not self._stays() or len(set(map(id, caches))) < count:
            return None
        rows = (native.OwnRow * count)()
        dtypes, longest = set(), 0
        for row, cache in zip(rows, caches):
            places = self._place(cache)
            if places is None:
                return None
            row.cache, row.filled = places.address, cache.layers[0].filled_tokens
            dtypes.add(places.dtype)
            longest = max(longest, row.filled)
        if len(dtypes) != 1:
            return None
        logits = self._in_calls(ids.to("cpu", torch.int64).contiguous(), rows, dtypes.pop(), longest)
        if logits is not None:
            for cache in caches:
                for layer in cache.layers:
                    layer.filled_tokens += 1
        return logits

    def is_fastest(self, rows: int) -> bool:
        """Whether native code runs a step of so many rows faster than the model does."""
        return rows <= native.MOST_TOKENS or self._network.is_quantised or self._network.dtype == torch.float32

    def _place(self, cache: BufferCache) -> _Places | None:
        """Where the buffers of a row's own cache are, with room for a token; None if they are not of our kind."""
        places = self._places.get(cache)
        if places is None or not places.have_room(cache):
            filled = cache.layers[0].filled_tokens
            if type(cache) is not BufferCache or not self._takes(cache):
                return None
            if any(layer.batch_size != 1 or layer.filled_tokens != filled for layer in cache.layers):
                return None
            self._reserve(cache, 1)
            places = self._places[cache] = _Places(cache)
        return places

    def _in_calls(self, ids: Tensor, rows: Any, dtype: int, longest: int) -> Tensor | None:
        """The rows, so many at a time as the native code takes at most."""
        cosines, sines = self._network.reach(self._base, longest + 1)
        logits = torch.empty(len(rows), self._network.vocabulary)
        step = self._rows_step
        step.tokens = step.keep = 1
        step.cache_dtype, step.angles = dtype, len(cosines)
        step.cosines, step.sines = cosines.data_ptr(), sines.data_ptr()
        most = native.MOST_TOKENS if self._network.is_quantised else native.MOST_FLOAT_TOKENS
        calls = -(-len(rows) // most)
        size = -(-len(rows) // calls)
        for start in range(0, len(rows), size):
            step.rows = min(size, len(rows) - start)
            step.ids = ids.data_ptr() + start * ids.element_size()
            step.own_rows = ctypes.addressof(rows) + start * ctypes.sizeof(native.OwnRow)
            step.logits = logits.data_ptr() + start * logits.stride(0) * logits.element_size()
            if not self._call(self._library.glm_decode, step):
                return None
        return logits

    def _stays(self) -> bool:
        """Whether the network is to be run as it is; takes its weights anew where they have moved."""
        if self._adapters is not None and adapter_of(self._model) is not None:
            return False
        if not self._network.stays(self._base):  # moved or converted since the last call
            network = network_of(self._base)
            if network is None:
                return False
            self._take(network)
        return True

    def _is_native(self, ids: Tensor, attention_mask: Tensor | None, cache: hf.Cache) -> bool:
        if type(cache) is not BufferCache or not self._stays():
            return False
        first = cache.layers[0]
        filled = first.filled_tokens
        if attention_mask is not None and attention_mask.shape != (ids.shape[0], filled + ids.shape[1]):
            return False
        if first.batch_size != ids.shape[0] or not ids.shape[1]:
            return False
        return all(layer.filled_tokens == filled for layer in cache.layers) and self._takes(cache)

    def _takes(self, cache: BufferCache) -> bool:
        """Whether the buffers are of a kind that the native code writes to; those of known addresses are."""
        if len(cache.layers) != self._network.decoder.layers:
            return False
        known = self._buffers if len(self._buffers) == len(cache.layers) else [None] * len(cache.layers)
        for layer, buffer in zip(cache.layers, known):
            if layer.is_initialized and layer.keys is not buffer:
                expected = (self._network.groups, self._network.width)
                if layer.dtype not in DTYPES or layer.keys.device.type != "cpu" or layer.dtype != cache.layers[0].dtype:
                    return False
                if (layer.keys.shape[1], layer.keys.shape[3]) != expected:
                    return False
        return True

    def _prepare(
        self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: BufferCache
    ) -> None:
        """Fills in the step, and makes room in the cache."""
        network, step = self._network, self._step
        rows, tokens = ids.shape
        filled = cache.layers[0].filled_tokens
        self._make_room(cache, tokens)
        cosines, sines = network.reach(self._base, filled + tokens)
        ids = ids.to(torch.int64).contiguous()
        if attention_mask is not None:
            attention_mask = attention_mask.to(torch.int64).contiguous()
        if position_ids is not None:
            position_ids = position_ids.to(torch.int64).expand(rows, tokens).contiguous()
        self._held = (ids, attention_mask, position_ids, cosines, sines)  # until the call is over
        step.rows, step.tokens, step.filled = rows, tokens, filled
        step.ids = ids.data_ptr()
        step.mask = None if attention_mask is None else attention_mask.data_ptr()
        step.positions = None if position_ids is None else position_ids.data_ptr()
        step.angles = len(cosines)
        step.cosines, step.sines = cosines.data_ptr(), sines.data_ptr()
        step.hidden = step.queries = step.context = None

    def _make_room(self, cache: BufferCache, tokens: int) -> None:
        self._reserve(cache, tokens)
        if len(self._buffers) == len(cache.layers) and all(
            layer.keys is buffer for layer, buffer in zip(cache.layers, self._buffers)
        ):
            return
        self._step.cache, self._step.cache_dtype = _described(cache), DTYPES[cache.layers[0].keys.dtype]
        self._buffers = [layer.keys for layer in cache.layers]

    def _reserve(self, cache: BufferCache, tokens: int) -> None:
        network = self._network
        for layer in cache.layers:
            if not layer.is_initialized or layer.filled_tokens + tokens > layer.capacity_tokens:
                layer.reserve(tokens, network.groups, network.width, network.dtype)

    def _few(self, rows: int, keep: int) -> Tensor | None:
        """A whole step in one call. None: the model has to do it, or to say what is wrong."""
        logits = torch.empty(rows, keep, self._network.vocabulary)
        self._step.keep, self._step.logits = keep, logits.data_ptr()
        return logits if self._call(self._library.glm_decode, self._step) else None

    def _many(self, ids: Tensor, attention_mask: Tensor | None, cache: BufferCache, keep: int) -> Tensor | None:
        """A prompt: attention over whole matrices is torch's, all else of a block native."""
        network, step = self._network, self._step
        rows, tokens = ids.shape
        filled = step.filled + tokens
        dtype = cache.layers[0].keys.dtype
        hidden = torch.empty(rows, tokens, network.hidden)
        queries = torch.empty(rows, tokens, network.heads, network.width, dtype=dtype)
        step.keep, step.hidden, step.queries = keep, hidden.data_ptr(), queries.data_ptr()
        if not self._call(self._library.glm_embed, step):
            return None
        mask = self._base.transformer.attention_mask(hidden, attention_mask, cache)
        for index, layer in enumerate(cache.layers):
            self._call(self._library.glm_before_attention, step, index)
            keys, values = (buffer.narrow(2, 0, filled) for buffer in (layer.keys, layer.values))
            context = attend(queries.transpose(1, 2), keys, values, mask).contiguous()
            step.context = context.data_ptr()
            self._call(self._library.glm_after_attention, step, index)
        logits = torch.empty(rows, keep, network.vocabulary)
        step.logits = logits.data_ptr()
        self._call(self._library.glm_logits, step)
        return logits

    def _call(self, function: Any, step: native.Step, *layer: int) -> bool:
        problem = function(self._network.address, ctypes.addressof(step), *layer, torch.get_num_threads())
        if problem == native.NO_MEMORY:
            raise MemoryError(f"no memory for a step of {step.rows} rows and {step.tokens} tokens")
        return bool(problem == native.FINE)


def _described(cache: BufferCache) -> Any:
    """The buffers of a cache as the native code reads them, an array with one `CacheLayer` for each layer."""
    layers = (native.CacheLayer * len(cache.layers))()
    for to, layer in zip(layers, cache.layers):
        to.keys, to.values = layer.keys.data_ptr(), layer.values.data_ptr()
        to.row, to.group = layer.keys.stride(0), layer.keys.stride(1)
    return layers


class _Places:
    """Where the buffers of one row's own cache are. It keeps none of them: who drops a cache gets its memory back.

    Args:
        cache: A cache whose buffers are there.
    """

    def __init__(self, cache: BufferCache) -> None:
        self._layers = _described(cache)
        self._buffers = [ref(layer.keys) for layer in cache.layers]  # values are replaced together with keys
        self.address = ctypes.addressof(self._layers)
        self.dtype = DTYPES[cache.layers[0].keys.dtype]

    def have_room(self, cache: BufferCache) -> bool:
        """Whether the buffers are still these, and take another token."""
        filled = cache.layers[0].filled_tokens
        for layer, buffer in zip(cache.layers, self._buffers):
            if not layer.filled_tokens == filled < layer.capacity_tokens or layer.keys is not buffer():
                return False
        return True


def logits_by_model(
    model: Any, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: hf.Cache, keep: int
) -> Tensor:
    """What the model itself gives for new tokens behind a cache.

    Args:
        model: The language model.
        ids: As in `Runner`, like the others.
        attention_mask: Also of any other form that the model takes.
        position_ids: Likewise.
        cache: Any that the model takes.
        keep: For how many of the last positions logits are wanted.

    Returns:
        Logits (B, keep, V), in the dtype of the model.
    """
    output = model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    )
    logits: Tensor = output.logits[:, -keep:]
    return logits

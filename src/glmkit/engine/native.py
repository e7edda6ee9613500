"""Whole steps of the ChatGLM2, ChatGLM3 and GLM-4 network in one native call, over the same cache and the same weights.

    runner_for(model)            once for each generation: looks whether nothing stands beside the plain network
        Network                  addresses and sizes of its weights, kept with the model until they change
    runner(ids, cache=...)
        few tokens               glm_decode: ids in, logits out
        many, quantised          each block in two halves around torch's attention
        many, float              the model itself: torch multiplies large float matrices well
        anything unusual         the model itself: other caches, masks, positions, an adapter

Float weights are the model's own memory, so they are multiplied as they are, and what is added up is float32. The models
know nothing of this.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glmkit import hf
from glmkit.adapters.switching import Adapters, LoraBeside, adapter_of
from glmkit.engine.cache import BufferCache
from glmkit.errors import UsageError
from glmkit.kernels import decoder as native
from glmkit.kernels.build import status
from glmkit.kernels.linear import Weight, weight_of
from glmkit.models.chatglm2 import ChatGLM2ForCausalLM
from glmkit.models.layers import attend
from glmkit.quant.linear import QuantizedLinear

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FIRST_ANGLES = 2048  # positions in the rotary tables, more when they are needed


def runner_for(model: Any) -> Runner | None:
    """What runs a model's steps natively; ask again for each generation, because a model may change in between.

    Args:
        model: Any language model, or a view of one with an adapter.

    Returns:
        None where the model itself has to do it; `why_not` says why.

    Raises:
        KernelsError: The user named a level of native code that does not work here.
    """
    network = _network_of(_own(model))
    return None if network is None else Runner(model, network)


def why_not(model: Any) -> str | None:
    """Why a model's steps do not run natively; None if they do.

    Args:
        model: Any language model, or a view of one with an adapter.
    """
    if adapter_of(model) is not None:
        return f"the adapter {adapter_of(model)!r} is active"
    own = _own(model)
    if type(own) is not ChatGLM2ForCausalLM:
        return f"{type(own).__name__} has no native step, only ChatGLM2, ChatGLM3 and GLM-4 do"
    if getattr(own, "glm_kernels", "auto") == "torch":
        return "it was loaded with kernels='torch'"
    if native.functions() is None:
        return f"there is no native code: {status().why}"
    return _obstacle(own) or next(_wrong_sizes(own), None)


def _own(model: Any) -> Any:
    """The model behind a view that has no adapter."""
    adapters = getattr(model, "glm_adapters", None)
    return adapters.model if isinstance(adapters, Adapters) and adapter_of(model) is None else model


def _obstacle(model: ChatGLM2ForCausalLM) -> str | None:
    """What stands beside the plain network."""
    if model.training:
        return "it is in training mode"
    if (model.config._attn_implementation or "sdpa") != "sdpa":
        return f"its attention is {model.config._attn_implementation}"
    if model.config.pre_seq_len or getattr(model.transformer, "prefix_encoder", None) is not None:
        return "it has a prefix"
    for name, module in model.named_modules():
        if _is_hooked(module):
            return f"{name or type(module).__name__} has a hook"
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return f"{name or type(module).__name__} computes in a way of its own"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor.data) is not Tensor or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return f"{name} is no plain tensor on the CPU"
    return None


def _is_hooked(module: nn.Module) -> bool:
    """Whether a hook may change what a module gives. Those of adapters do nothing while none is active."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not isinstance(getattr(hook, "__self__", None), (Adapters, LoraBeside)) for hook in hooks)


def _wrong_sizes(model: ChatGLM2ForCausalLM) -> Iterator[str]:
    """What the native code does not take of the weights themselves."""
    network, config = model.transformer, model.config
    width = config.kv_channels
    queries, keys = config.num_attention_heads * width, config.multi_query_group_num * width
    expected = (
        (config.hidden_size, queries + 2 * keys),
        (queries, config.hidden_size),
        (config.hidden_size, 2 * config.ffn_hidden_size),
        (config.ffn_hidden_size, config.hidden_size),
    )
    if width % 4 or config.ffn_hidden_size % 16:
        yield f"heads of {width} and an inner width of {config.ffn_hidden_size}: expected multiples of 4 and 16"
    for index, block in enumerate(network.encoder.layers):
        for layer, shape in zip(_linears(block), expected):
            if not _is_plain(layer):
                yield f"a {type(layer).__name__} of block {index} is no linear layer that the native code takes"
            elif (layer.in_features, layer.out_features) != shape:
                yield f"block {index} is a part of one"
    if not _is_plain(network.output_layer) or type(network.embedding.word_embeddings) is not nn.Embedding:
        yield "embedding or output layer is of another kind"
    elif network.embedding.word_embeddings.weight.dtype not in _DTYPES:
        yield f"the embedding is {network.embedding.word_embeddings.weight.dtype}"


def _linears(block: Any) -> tuple[Any, Any, Any, Any]:
    attention, mlp = block.self_attention, block.mlp
    return attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h


def _is_plain(layer: Any) -> bool:
    if type(layer) is QuantizedLinear:
        return layer.packed
    return type(layer) is nn.Linear and layer.weight.dtype in _DTYPES


# --- the weights ---


class Network:
    """A model's weights as the native code reads them: where they are, and float32 copies of the small ones.

    It holds no large tensor, or a model that moves elsewhere would leave its memory behind; `stays` says whether the
    addresses still hold.

    Args:
        model: A model that `why_not` has nothing against.
    """

    def __init__(self, model: ChatGLM2ForCausalLM) -> None:
        network, config = model.transformer, model.config
        self.state = _state(model)
        self.copies: list[tuple[Tensor, nn.Parameter]] = []  # float32, and what they are copies of
        self.weight_bytes = 0
        table = network.embedding.word_embeddings.weight
        blocks = (native.Block * config.num_layers)()
        for to, block in zip(blocks, network.encoder.layers):
            to.input_norm = self._floats(block.input_layernorm.weight)
            to.post_norm = self._floats(block.post_attention_layernorm.weight)
            to.query_key_value, to.dense, to.up, to.down = (self._weight(layer) for layer in _linears(block))
        self.is_quantised = all(
            isinstance(layer, QuantizedLinear) for block in network.encoder.layers for layer in _linears(block)
        )
        self.groups, self.heads, self.width = config.multi_query_group_num, config.num_attention_heads, config.kv_channels
        self.hidden, self.vocabulary, self.dtype = config.hidden_size, network.output_layer.out_features, table.dtype
        self.decoder = native.Decoder(
            layers=config.num_layers,
            hidden=self.hidden,
            inner=config.ffn_hidden_size,
            heads=self.heads,
            groups=self.groups,
            width=self.width,
            rotated=2 * (self.width // 4),
            vocabulary=table.shape[0],
            table_dtype=_DTYPES[table.dtype],
            eps=network.encoder.final_layernorm.eps,
            table=table.data_ptr(),
            final_norm=self._floats(network.encoder.final_layernorm.weight),
            blocks=blocks,
            output=self._weight(network.output_layer),
        )
        self.decoder.bytes = self.weight_bytes
        self.address = ctypes.addressof(self.decoder)
        self.ends = (table.data_ptr(), network.output_layer.weight.data_ptr())
        self.cosines, self.sines = self._angles(model, _FIRST_ANGLES)

    def _floats(self, parameter: nn.Parameter) -> int:
        own = parameter.detach()
        if own.dtype != torch.float32:
            own = own.float()
            self.copies.append((own, parameter))
        return own.data_ptr()

    def _weight(self, layer: Any) -> Weight:
        scale = layer.weight_scale.detach() if isinstance(layer, QuantizedLinear) else None
        made = weight_of(layer.weight.detach(), scale, layer.bias)
        if layer.bias is not None and made.bias != layer.bias.data_ptr():
            self.copies.append((made.kept[2], layer.bias))  # type: ignore[arg-type]
        self.weight_bytes += layer.weight.nbytes
        return made

    def refresh(self) -> None:
        """Copies the small weights again: somebody may have written to the model's own in place."""
        for own, parameter in self.copies:
            own.copy_(parameter.detach())

    def stays(self, model: Any) -> bool:
        """Whether a model's first and last weight are where they were. Whoever moves or converts a model moves all."""
        network = model.transformer
        return self.ends == (
            network.embedding.word_embeddings.weight.data_ptr(),
            network.output_layer.weight.data_ptr(),
        )

    def reach(self, model: Any, positions: int) -> None:
        """Makes the rotary tables long enough for so many positions."""
        if positions > len(self.cosines):
            self.cosines, self.sines = self._angles(model, max(positions, 2 * len(self.cosines)))

    def _angles(self, model: Any, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0, 1, ..., each (positions, R/2) float32: what the model's own `rotary` gives."""
        cosines, sines = model.transformer.rotary(torch.arange(positions)[None], torch.float32)
        return cosines[0].contiguous(), sines[0].contiguous()


_networks: WeakKeyDictionary[Any, Network] = WeakKeyDictionary()


def _network_of(model: Any) -> Network | None:
    if why_not(model) is not None:
        if isinstance(model, nn.Module):
            _networks.pop(model, None)
        return None
    known = _networks.get(model)
    with torch.no_grad():
        if known is None or known.state != _state(model):
            known = _networks[model] = Network(model)
        known.refresh()
    return known


def _state(model: ChatGLM2ForCausalLM) -> tuple[Any, ...]:
    """What a `Network` was made from, so that another one is made when it changes."""
    config = model.config
    tensors = tuple((parameter.data_ptr(), parameter.dtype) for parameter in model.parameters())
    return config.rotary_base_and_scale(), config.num_attention_heads, config.multi_query_group_num, tensors


# --- the steps ---


class Runner:
    """Runs a model's steps natively, for one generation at a time; `runner_for` makes it.

    Args:
        model: The model, or a view of it; called where native code does not fit.
        network: Its weights.
    """

    def __init__(self, model: Any, network: Network) -> None:
        self._model, self._network = model, network
        self._base: Any = _own(model)
        self._adapters = getattr(model, "glm_adapters", None)
        library = native.functions()
        assert library is not None
        self._library = library
        self._step = native.Step()
        self._address = ctypes.addressof(self._step)
        self._buffers: list[Tensor] = []  # keys of each layer, whose addresses the step has
        self._held: tuple[Tensor | None, ...] = ()

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
            few = rows * tokens <= native.MOST_TOKENS
            if few or self._network.is_quantised:
                self._prepare(ids, attention_mask, position_ids, cache)
                keep = min(keep, tokens)
                logits = self._few(rows, keep) if few else self._many(ids, attention_mask, cache, keep)
                if logits is not None:
                    for layer in cache.layers:
                        layer.filled_tokens += tokens
                    return logits
        return self._by_model(ids, attention_mask, position_ids, cache, keep)

    def _is_native(self, ids: Tensor, attention_mask: Tensor | None, cache: hf.Cache) -> bool:
        if type(cache) is not BufferCache or (self._adapters is not None and adapter_of(self._model) is not None):
            return False
        if not self._network.stays(self._base):  # moved or converted since the last call
            network = _network_of(self._base)
            if network is None:
                return False
            self._network = network
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
                if layer.dtype not in _DTYPES or layer.keys.device.type != "cpu" or layer.dtype != cache.layers[0].dtype:
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
        network.reach(self._base, filled + tokens)
        ids = ids.contiguous()
        if attention_mask is not None:
            attention_mask = attention_mask.to(torch.int64).contiguous()
        if position_ids is not None:
            position_ids = position_ids.expand(rows, tokens).contiguous()
        self._held = (ids, attention_mask, position_ids)  # until the call is over
        step.rows, step.tokens, step.filled = rows, tokens, filled
        step.ids = ids.data_ptr()
        step.mask = None if attention_mask is None else attention_mask.data_ptr()
        step.positions = None if position_ids is None else position_ids.data_ptr()
        step.angles = len(network.cosines)
        step.cosines, step.sines = network.cosines.data_ptr(), network.sines.data_ptr()
        step.hidden = step.queries = step.context = None

    def _make_room(self, cache: BufferCache, tokens: int) -> None:
        network = self._network
        for layer in cache.layers:
            if not layer.is_initialized or layer.filled_tokens + tokens > layer.capacity_tokens:
                layer.reserve(tokens, network.groups, network.width, network.dtype)
        if len(self._buffers) == len(cache.layers) and all(
            layer.keys is buffer for layer, buffer in zip(cache.layers, self._buffers)
        ):
            return
        layers = (native.CacheLayer * len(cache.layers))()
        for to, layer in zip(layers, cache.layers):
            to.keys, to.values = layer.keys.data_ptr(), layer.values.data_ptr()
            to.row, to.group = layer.keys.stride(0), layer.keys.stride(1)
        self._step.cache, self._step.cache_dtype = layers, _DTYPES[cache.layers[0].keys.dtype]
        self._buffers = [layer.keys for layer in cache.layers]

    def _few(self, rows: int, keep: int) -> Tensor | None:
        """A whole step in one call. None: the model has to do it, or to say what is wrong."""
        logits = torch.empty(rows, keep, self._network.vocabulary)
        self._step.keep, self._step.logits = keep, logits.data_ptr()
        return logits if self._call(self._library.glm_decode) else None

    def _many(self, ids: Tensor, attention_mask: Tensor | None, cache: BufferCache, keep: int) -> Tensor | None:
        """A prompt: attention over whole matrices is torch's, all else of a block native."""
        network, step = self._network, self._step
        rows, tokens = ids.shape
        filled = step.filled + tokens
        dtype = cache.layers[0].keys.dtype
        hidden = torch.empty(rows, tokens, network.hidden)
        queries = torch.empty(rows, tokens, network.heads, network.width, dtype=dtype)
        step.keep, step.hidden, step.queries = keep, hidden.data_ptr(), queries.data_ptr()
        if not self._call(self._library.glm_embed):
            return None
        mask = self._base.transformer.attention_mask(hidden, attention_mask, cache)
        for index, layer in enumerate(cache.layers):
            self._call(self._library.glm_before_attention, index)
            keys, values = (buffer.narrow(2, 0, filled) for buffer in (layer.keys, layer.values))
            context = attend(queries.transpose(1, 2), keys, values, mask).contiguous()
            step.context = context.data_ptr()
            self._call(self._library.glm_after_attention, index)
        logits = torch.empty(rows, keep, network.vocabulary)
        step.logits = logits.data_ptr()
        self._call(self._library.glm_logits)
        return logits

    def _call(self, function: Any, *layer: int) -> bool:
        problem = function(self._network.address, self._address, *layer, torch.get_num_threads())
        if problem == native.NO_MEMORY:
            raise MemoryError(f"no memory for a step of {self._step.rows} rows and {self._step.tokens} tokens")
        return bool(problem == native.FINE)

    def _by_model(
        self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: hf.Cache, keep: int
    ) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[:, -keep:].float()
        return logits

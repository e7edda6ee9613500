"""A model's weights as the native code reads them, and whether nothing stands beside the plain network.

Float weights are the model's own memory and are read where they are; norms and biases of 16 bits are copied to float32,
anew for each generation. The models know nothing of this.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glmkit.adapters.switching import Adapters, LoraBeside, adapter_of
from glmkit.kernels import decoder as native
from glmkit.kernels.build import status
from glmkit.kernels.linear import DTYPES, Weight, weight_of
from glmkit.models.chatglm2 import (
    MLP,
    Block,
    ChatGLM2ForCausalLM,
    ChatGLM2Model,
    Embedding,
    Encoder,
    SelfAttention,
)
from glmkit.models.layers import RMSNorm, attend
from glmkit.quant.linear import QuantizedLinear

_FIRST_ANGLES = 2048  # positions in the rotary tables, more when they are needed


def why_not(model: Any) -> str | None:
    """Why a model's steps do not run natively; None if they do.

    Args:
        model: Any language model, or a view of one with an adapter.
    """
    if adapter_of(model) is not None:
        return f"the adapter {adapter_of(model)!r} is active"
    own = base_of(model)
    if type(own) is not ChatGLM2ForCausalLM:
        return f"{type(own).__name__} has no native step, only ChatGLM2, ChatGLM3 and GLM-4 do"
    if getattr(own, "glm_kernels", "auto") == "torch":
        return "it was loaded with kernels='torch'"
    if native.functions() is None:
        return f"there is no native code: {status().why}"
    return _obstacle(own) or _other_part(own) or next(_wrong_sizes(own), None)


def base_of(model: Any) -> Any:
    """The model behind a view that has no adapter; anything else is its own."""
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
    if nn.modules.module._has_any_global_hook():
        return "there is a hook for all modules"
    for name, module in model.named_modules():
        if _is_hooked(module):
            return f"{name or type(module).__name__} has a hook"
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return f"{name or type(module).__name__} computes in a way of its own"
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not _is_at_hand(tensor):
                return f"{name}.{leaf} is no plain tensor on the CPU"
    return None


def _is_at_hand(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()


def _is_hooked(module: nn.Module) -> bool:
    """Whether a hook may change what a module gives. Those of adapters do nothing while none is active."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not isinstance(getattr(hook, "__self__", None), (Adapters, LoraBeside)) for hook in hooks)


def _other_part(model: ChatGLM2ForCausalLM) -> str | None:
    """What somebody has put where the network's own parts are expected, or taken out."""
    for part, kind in _parts(model.transformer):
        if type(part) is not kind:
            return f"a {type(part).__name__} stands in the place of a {kind.__name__}"
    blocks = model.transformer.encoder.layers
    if len(blocks) != model.config.num_layers:
        return f"it has {len(blocks)} blocks, its config says {model.config.num_layers}"
    if any(block.self_attention.attend is not attend for block in blocks):
        return "its attention is not the usual one"
    return None if len({norm.eps for norm in _norms(model.transformer)}) == 1 else "its norms differ in eps"


def _parts(network: Any) -> Iterator[tuple[Any, type]]:
    """Parts and what they have to be, each before what is in it."""
    yield network, ChatGLM2Model
    yield network.embedding, Embedding
    yield network.embedding.word_embeddings, nn.Embedding
    yield network.encoder, Encoder
    yield network.encoder.final_layernorm, RMSNorm
    for block in network.encoder.layers:
        yield block, Block
        yield block.input_layernorm, RMSNorm
        yield block.self_attention, SelfAttention
        yield block.post_attention_layernorm, RMSNorm
        yield block.mlp, MLP


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
    table, output = network.embedding.word_embeddings.weight, network.output_layer
    if not _is_plain(output):
        yield "the output layer is of another kind"
    elif {table.shape[1], output.in_features, *(len(norm.weight) for norm in _norms(network))} != {config.hidden_size}:
        yield f"embedding, norms and output layer are not all of the width {config.hidden_size}"
    elif table.dtype not in DTYPES:
        yield f"the embedding is {table.dtype}"


def _norms(network: Any) -> list[Any]:
    norms = [network.encoder.final_layernorm]
    for block in network.encoder.layers:
        norms += [block.input_layernorm, block.post_attention_layernorm]
    return norms


def _linears(block: Any) -> tuple[Any, Any, Any, Any]:
    attention, mlp = block.self_attention, block.mlp
    return attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h


def _is_plain(layer: Any) -> bool:
    if type(layer) is QuantizedLinear:
        return layer.packed
    if type(layer) is not nn.Linear or layer.weight.dtype not in DTYPES:
        return False
    shape: torch.Size = layer.weight.shape
    return shape == (layer.out_features, layer.in_features)  # or somebody has put in another weight


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
        self.groups, self.heads, self.width = (
            config.multi_query_group_num,
            config.num_attention_heads,
            config.kv_channels,
        )
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
            table_dtype=DTYPES[table.dtype],
            eps=network.encoder.final_layernorm.eps,
            table=table.data_ptr(),
            final_norm=self._floats(network.encoder.final_layernorm.weight),
            blocks=blocks,
            output=self._weight(network.output_layer),
        )
        self.decoder.bytes = self.weight_bytes
        self.address = ctypes.addressof(self.decoder)
        self.ends = (table.data_ptr(), network.output_layer.weight.data_ptr())
        self.angles = self._angles(model, _FIRST_ANGLES)

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

    def reach(self, model: Any, positions: int) -> tuple[Tensor, Tensor]:
        """The rotary tables, made longer where so many positions need it.

        Who reads them natively keeps them meanwhile: another thread may put longer ones in their place.
        """
        angles = self.angles
        if positions > len(angles[0]):
            angles = self.angles = self._angles(model, max(positions, 2 * len(angles[0])))
        return angles

    def _angles(self, model: Any, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0, 1, ..., (positions, R/2) float32: what the model's own `rotary` gives."""
        cosines, sines = model.transformer.rotary(torch.arange(positions)[None], torch.float32)
        return cosines[0].contiguous(), sines[0].contiguous()


_networks: WeakKeyDictionary[Any, Network] = WeakKeyDictionary()


def network_of(model: Any) -> Network | None:
    """A model's weights, looked at once more; None where `why_not` has a reason.

    Args:
        model: A model, as `base_of` gives it.
    """
    if why_not(model) is not None:
        if isinstance(model, nn.Module):
            _networks.pop(model, None)
        return None
    known = _networks.get(model)
    with torch.inference_mode(False), torch.no_grad():  # copies made in that mode could not be refreshed outside it
        if known is None or known.state != _state(model):
            known = _networks[model] = Network(model)
        known.refresh()
    return known


def _state(model: ChatGLM2ForCausalLM) -> tuple[Any, ...]:
    """What a `Network` was made from, so that another one is made when it changes."""
    config = model.config
    tensors = tuple((parameter.data_ptr(), parameter.dtype) for parameter in model.parameters())
    return config.rotary_base_and_scale(), config.num_attention_heads, config.multi_query_group_num, tensors

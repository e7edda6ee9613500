"""Texts to hidden states: ChatGLM3 as the text encoder of a picture model, such as Kolors.

    texts -> [gMASK] sop ids, padded on the left -> embedding, blocks -> states of chosen layers
                  input_ids (B, L)                                        (B, L, C) each

    layer   0                the embeddings
            1 … N            what block 1 … N gives, before the final norm
            -1, -2           counted from the end, as in `hidden_states` of transformers: -2 is the last but one

The network has no output layer and no class that generates; keys and values are not kept.

Padding belongs to the result: pictures are conditioned on all L places, so that places of padding have the values that
the official code gives them (they see every place; their position is 0).

Letters: `B` texts, `L` places, `C` hidden size, `N` blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.checkpoint import shown_path
from glmkit.errors import ConfigError, UsageError
from glmkit.loading import (
    KERNELS,
    Loaded,
    choose_device,
    choose_dtype,
    choose_family,
    open_model,
    read_config,
    read_tokenizer,
)
from glmkit.location import locate
from glmkit.models.chatglm2 import ChatGLM2Model
from glmkit.models.chatglm2_config import ChatGLM2Config
from glmkit.quant.linear import pack_model
from glmkit.quant.schemes import scheme_of
from glmkit.tokenizers import load_tokenizer
from glmkit.weights import load_model

PENULTIMATE = (-2,)
KOLORS_TOKENS = 256


class EncoderModel(ChatGLM2Model):
    """The network of ChatGLM2, ChatGLM3 and GLM-4 without its output layer, whether the checkpoint has one or not."""

    _keys_to_ignore_on_load_unexpected = (r"rotary_pos_emb\.inv_freq|\boutput_layer\.",)

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        del self.output_layer


@dataclass(frozen=True)
class Encoder:
    """A network and the tokenizer that belongs to it, for `encode`.

    Args:
        model: The network, without output layer if `load_encoder` made it.
        tokenizer: Its tokenizer.
    """

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Encoded:
    """Hidden states of texts.

    Args:
        states: Layer, as it was asked for -> (B, L, C) in the model's dtype.
        pooled: What the last block gives at each text's last token, (B, C); Kolors' pooled embedding.
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 0 for padding.
        position_ids: (B, L) int64, from 0 at the first token; 0 for padding.
        cut_tokens: How many tokens of each text were left out because L is too small.
    """

    states: dict[int, Tensor]
    pooled: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    cut_tokens: list[int]


def load_encoder(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: Any = "auto",
    quantize: str | None = None,
    kernels: str = "auto",
    family: str | None = None,
    revision: str | None = None,
    download: bool = False,
) -> Encoder:
    """Loads a network for `encode`: no output layer, nothing that generates.

    Args:
        path: A folder, a family name or a hub id of ChatGLM2, ChatGLM3 or GLM-4.
        tokenizer: The tokenizer's folder, where it is another one, as beside the text encoder of a picture model.
        dtype: See `glmkit.load`.
        device: One device, see `glmkit.load`.
        quantize: None, "int8" or "int4", done while loading; a quantised checkpoint needs none.
        kernels: See `glmkit.load`.
        family: See `glmkit.load`.
        revision: Branch, tag or commit if the model comes from the hub.
        download: Whether a bare family name may be fetched.

    Returns:
        The encoder.

    Raises:
        UsageError: A folder without tokenizer, or no such `quantize` or `kernels`.
        ConfigError: A model of another family.
        CheckpointError: The checkpoint is damaged.
    """
    if quantize not in (None, "int8", "int4"):
        raise UsageError(f"quantize={quantize!r}", hint="None, int8 or int4")
    if kernels not in KERNELS:
        raise UsageError(f"kernels={kernels!r}", hint=", ".join(KERNELS))
    row, place = choose_family(path, family), choose_device(device)
    location = locate(path, download=download, revision=revision)
    with open_model(location) as folder:
        config = read_config(folder, row, overrule=family is not None)
        if not isinstance(config, ChatGLM2Config):
            raise ConfigError(
                f"{shown_path(folder.path)} holds a {type(config).__name__.removesuffix('Config')}; text is encoded by"
                " ChatGLM2, ChatGLM3 and GLM-4"
            )
        own = load_tokenizer(tokenizer, config) if tokenizer is not None else read_tokenizer(folder, config)
        if own is None:
            raise UsageError(f"{shown_path(folder.path)} has no tokenizer", hint="name its folder: tokenizer=")
        model = load_model(
            folder,
            EncoderModel,
            _without_output_layer(config),
            choose_dtype(dtype, folder, place),
            place,
            quantize=quantize,
        )
    pack_model(model, kernels, any_dtype=dtype == "auto" and scheme_of(model.config) is not None)
    return Encoder(model, own)


def _without_output_layer(config: ChatGLM2Config) -> ChatGLM2Config:
    """A config that does not say how an output layer is quantised."""
    said = scheme_of(config)
    if said is None or said.output_layer is None:
        return config
    config = copy.deepcopy(config)
    config.quantization_config = said.to_config() | {"output_layer": None}
    return config


def encode(
    model: str | Path | Encoder | Loaded,
    texts: str | Sequence[str],
    *,
    layers: Sequence[int] = PENULTIMATE,
    length_tokens: int | None = KOLORS_TOKENS,
    batch_size: int = 8,
) -> Encoded:
    """Gives the hidden states of texts.

    Args:
        model: What `load_encoder` or `glmkit.load` gave. A name or folder is loaded for this one call.
        texts: One or more; no text in them becomes a control token.
        layers: Which states, see above; the default is Kolors'.
        length_tokens: `L`, with the two control tokens in front; longer texts lose their end. None: the longest text.
        batch_size: Texts computed together. The result does not depend on it but for rounding.

    Returns:
        The states, on the model's device.

    Raises:
        UsageError: No texts, no such layer, or a length without room for a token.
        ConfigError: A model of another family.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise UsageError("there are no texts to encode")
    if length_tokens is not None and length_tokens < 3:
        raise UsageError(f"length_tokens={length_tokens}: two control tokens and a token of text need 3")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: expected 1 or more")
    encoder = load_encoder(model) if isinstance(model, (str, Path)) else model
    tokenizer: Any = encoder.tokenizer
    if tokenizer is None:
        raise UsageError("the model has no tokenizer, so text cannot be read", hint="name its folder: tokenizer=")
    network = _network(encoder.model)
    last = network.config.num_layers
    places = {layer: _place(layer, last) for layer in layers}
    rows, cut_tokens = _rows(tokenizer, texts, length_tokens)
    inputs = _padded(rows, length_tokens, tokenizer.pad_token_id, network.device)
    parts = [
        _states(network, [one[start : start + batch_size] for one in inputs], {*places.values(), last})
        for start in range(0, len(rows), batch_size)
    ]
    return Encoded(
        states={layer: torch.cat([part[place] for part in parts]) for layer, place in places.items()},
        pooled=torch.cat([part[last][:, -1] for part in parts]),
        input_ids=inputs[0],
        attention_mask=inputs[1],
        position_ids=inputs[2],
        cut_tokens=cut_tokens,
    )


def _network(model: Any) -> ChatGLM2Model:
    """The network of an encoder's model, or that of a language model."""
    network = getattr(model, "transformer", model)
    if not isinstance(network, ChatGLM2Model):
        raise ConfigError(f"{type(model).__name__}: text is encoded by ChatGLM2, ChatGLM3 and GLM-4")
    return network


def _place(layer: int, last: int) -> int:
    """A layer counted from 0, the embeddings, to the last block's number."""
    if not -last - 1 <= layer <= last:
        raise UsageError(f"layers has {layer}: the model has 0 to {last}, or -{last + 1} to -1 counted from the end")
    return layer % (last + 1)


def _rows(tokenizer: Any, texts: Sequence[str], length_tokens: int | None) -> tuple[list[list[int]], list[int]]:
    """The ids of each text, and how many of them were left out at its end."""
    rows = [[*tokenizer.prefix_ids, *tokenizer.encode_text(text)] for text in texts]
    most = length_tokens or max(map(len, rows))
    return [row[:most] for row in rows], [max(0, len(row) - most) for row in rows]


def _padded(rows: list[list[int]], length_tokens: int | None, pad: int, device: torch.device) -> list[Tensor]:
    """input_ids, attention_mask and position_ids, padded on the left as the official tokenizer does."""
    width = length_tokens or max(map(len, rows))
    pads = [width - len(row) for row in rows]
    columns = [
        [[pad] * count + row for count, row in zip(pads, rows)],
        [[0] * count + [1] * len(row) for count, row in zip(pads, rows)],
        [[0] * count + list(range(len(row))) for count, row in zip(pads, rows)],
    ]
    return [torch.tensor(one, device=device) for one in columns]


@torch.no_grad()
def _states(network: ChatGLM2Model, inputs: Sequence[Tensor], places: Collection[int]) -> dict[int, Tensor]:
    """The states of one batch; only those that are asked for are kept."""
    kept: dict[int, Tensor] = {}
    modules = [network.get_input_embeddings(), *network.encoder.layers]
    hooks = [
        modules[place].register_forward_hook(lambda *call, place=place: kept.__setitem__(place, call[2]))
        for place in places
    ]
    try:
        network(*inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return kept

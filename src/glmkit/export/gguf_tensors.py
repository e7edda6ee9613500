"""Which tensors a GGUF file has, how they are stored, and their bytes.

    official tensor                                   in GGUF                      kind
    transformer.embedding.word_embeddings.weight      token_embd.weight            matrix
    transformer.encoder.layers.N.
      input_layernorm.weight                          blk.N.attn_norm.weight       float32
      self_attention.query_key_value.weight  q|k|v    blk.N.attn_qkv.weight        matrix of a block
      self_attention.query_key_value.bias             blk.N.attn_qkv.bias          float32
      self_attention.dense.weight                     blk.N.attn_output.weight     matrix of a block
      post_attention_layernorm.weight                 blk.N.ffn_norm.weight        float32
      mlp.dense_h_to_4h.weight            gate|up     blk.N.ffn_up.weight          matrix of a block
      mlp.dense_4h_to_h.weight                        blk.N.ffn_down.weight        matrix of a block
    transformer.encoder.final_layernorm.weight        output_norm.weight           float32
    transformer.output_layer.weight                   output.weight                matrix

    weights         matrices of blocks           the other two matrices
    None            the source's numbers as they are: F32, BF16 or F16; of a quantised source Q8_0 and Q4_0
    f16             F16                          F16
    q8_0 or int8    Q8_0                         Q8_0
    q4_0 or int4    Q4_0, searched scales        Q8_0

Q8_0 and Q4_0 have a float16 scale for each 32 columns. Our own int4 is the same numbers in another order, and a scale
for a row is one that all its groups repeat; so nothing is quantised twice.

Source: llama.cpp, src/models/chatglm.cpp; ggml, block_q4_0 and block_q8_0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmkit.errors import OutputError, UsageError
from glmkit.export.constants import Packed, Weights
from glmkit.quant.linear import GROUP, unpack_nibbles
from glmkit.quant.search import quantize_groups
from glmkit.registration import LANGUAGE_MODELS
from glmkit.weights import empty_model

WEIGHTS = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0", "int8": "Q8_0", "int4": "Q4_0"}
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
QUANTISED = {8: "Q8_0", 4: "Q4_0"}
_BLOCK = "transformer.encoder.layers."
_NAMES = (
    ("transformer.embedding.word_embeddings.", "token_embd."),
    ("transformer.encoder.final_layernorm.", "output_norm."),
    ("transformer.output_layer.", "output."),
    (_BLOCK, "blk."),
    (".input_layernorm.", ".attn_norm."),
    (".self_attention.query_key_value.", ".attn_qkv."),
    (".self_attention.dense.", ".attn_output."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".mlp.dense_h_to_4h.", ".ffn_up."),
    (".mlp.dense_4h_to_h.", ".ffn_down."),
)
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18}
_ROWS = 1024  # quantised at a time


@dataclass(frozen=True)
class Planned:
    """A tensor of the file.

    Args:
        name: In the file.
        kind: Its ggml type.
        shape: (rows, columns) or (columns,).
    """

    name: str
    kind: str
    shape: tuple[int, ...]


def gguf_name(own: str) -> str:
    """What llama.cpp calls an official tensor.

    Args:
        own: "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight".

    Returns:
        "blk.0.ffn_down.weight".
    """
    for ours, theirs in _NAMES:
        own = own.replace(ours, theirs)
    return own


def plan(opened: Weights, weights: str | None) -> dict[str, Planned]:
    """Lists the tensors of the file.

    Args:
        opened: The checkpoint.
        weights: See above.

    Returns:
        Name in the model -> what it becomes, in the order in which the checkpoint is read.

    Raises:
        UsageError: A matrix has no such form, or is quantised already.
    """
    return dict(_planned(opened, weights))


def _planned(opened: Weights, weights: str | None) -> Iterator[tuple[str, Planned]]:
    model = empty_model(LANGUAGE_MODELS[type(opened.config)], opened.config)
    for stored, own in opened.names.items():
        if own.endswith(".weight_scale"):
            continue
        info = opened.folder.tensors[stored]
        owner, _, leaf = own.rpartition(".")
        bits = int(getattr(model.get_submodule(owner), "bits", 0)) if leaf == "weight" else 0
        shape = (*info.shape[:-1], info.shape[-1] * 8 // bits) if bits else tuple(info.shape)
        kind = "F32" if len(shape) == 1 else _kind(own, info.dtype, bits, weights)
        if kind in QUANTISED.values() and shape[-1] % GROUP:
            raise UsageError(
                f"{own} has {shape[-1]} columns, and {kind} has groups of {GROUP}",
                hint="weights f16, or none; a quantised checkpoint of these sizes has no form in GGUF",
            )
        yield own, Planned(gguf_name(own), kind, shape)


def _kind(own: str, dtype: torch.dtype, bits: int, weights: str | None) -> str:
    """The ggml type of a matrix."""
    if bits and weights is not None and WEIGHTS[weights] != QUANTISED[bits]:
        raise UsageError(
            f"the source is quantised to {bits} bits, and weights={weights!r} would round its numbers once more",
            hint="leave out weights, which keeps its numbers; or export the checkpoint that it was quantised from",
        )
    if bits:
        return QUANTISED[bits]
    if weights is None:
        return FLOATS[dtype]
    wanted = WEIGHTS[weights]
    return "Q8_0" if wanted == "Q4_0" and not own.startswith(_BLOCK) else wanted


def encode(found: Tensor | Packed, planned: Planned) -> np.ndarray[Any, Any]:
    """Makes what stands in the file.

    Args:
        found: The tensor, as it was read.
        planned: What it becomes.

    Returns:
        The numbers, or the bytes of their blocks, in the order of the file.

    Raises:
        OutputError: A number does not fit into float16.
    """
    if isinstance(found, Packed):
        codes = found.weight if found.bits == 8 else unpack_nibbles(found.weight)
        return pack(codes, _half(found.scale, planned.name), found.bits)
    if planned.kind == "F32":
        return found.float().numpy()
    if planned.kind == "BF16":
        return found.bfloat16().view(torch.int16).numpy()
    if planned.kind == "F16":
        return _half(found, planned.name).numpy()
    made = np.empty((len(found), found.shape[1] // GROUP * _BLOCK_BYTES[planned.kind]), np.uint8)
    for start in range(0, len(found), _ROWS):
        made[start : start + _ROWS] = _quantize(found[start : start + _ROWS], planned)
    return made


def _half(tensor: Tensor, name: str) -> Tensor:
    half = tensor.half()
    if not half.isfinite().all():
        raise OutputError(f"{name} has numbers that float16 does not hold", hint="leave out weights, if they are given")
    return half


def _quantize(rows: Tensor, planned: Planned) -> np.ndarray[Any, Any]:
    if planned.kind == "Q4_0":
        packed, scale = quantize_groups(rows)
        return pack(unpack_nibbles(packed), scale, 4)
    groups = rows.float().unflatten(1, (-1, GROUP))
    scale = _half(groups.abs().amax(-1) / 127, planned.name)
    scale = torch.where(scale == 0, 1, scale)  # of a group of zeros
    codes = (groups / scale[..., None].float()).round_().clamp_(-127, 127).to(torch.int8)
    return pack(codes.flatten(1), scale, 8)


def pack(codes: Tensor, scale: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Blocks as ggml has them: a float16 scale and 32 codes; of 4 bits the first 16 in the low nibbles, plus 8.

    Args:
        codes: int8 (N, K).
        scale: float16 (N,) or (N, K / 32).
        bits: 8 or 4.

    Returns:
        uint8 (N, bytes of a row).
    """
    blocks = codes.unflatten(1, (-1, GROUP))
    scales = scale if scale.ndim == 2 else scale[:, None].expand(blocks.shape[:2])
    if bits == 4:
        low, high = (blocks + 8).chunk(2, dim=-1)
        blocks = low | (high << 4)
    both = torch.cat((scales.contiguous()[..., None].view(torch.uint8), blocks.view(torch.uint8)), dim=-1)
    return both.flatten(1).numpy()

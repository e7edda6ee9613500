"""The official row-wise int8 and int4 format of ChatGLM, in plain torch on every device.

For each output row `o` of a weight `w`: `scale[o] = max|w[o]| / 127` (int4: 7) and `q = round(w / scale)`. In int4 a
byte holds two columns, the even one in the high nibble; both nibbles are two's complement. Quantised are the four
linears of a block; embedding, output layer, norms and biases stay as they are. One release, chatglm-6b-int4-qe, has the
embedding quantised too, and its output layer is that same packed table.

Source: quantization.py of ChatGLM-6B, ChatGLM2-6B and GLM-130B. What differs: no CUDA binaries, and a row of zeros gets
scale 1 instead of 0/0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glmkit.errors import UsageError
from glmkit.quant.linear import QuantizedLinear, dequantize, pack_nibbles

_QUANTISED = ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h")


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantises a weight in the official way, bit for bit.

    That includes rows whose largest number is below about 1e-3: float16 holds their scales coarsely, and a quotient
    that then rounds to 128 becomes -128. Trained weights have no such rows.

    Args:
        weight: (out, in). Wider ones than float16 and bfloat16 are divided as they are, by scales in float16.
        bits: 8 or 4.

    Returns:
        Packed weight, int8 (out, in) or (out, in / 2), and the scale of each row, (out,), in float16 or bfloat16.

    Raises:
        UsageError: An odd number of columns, which int4 cannot hold.
    """
    _check_columns(weight.shape[1], bits)
    scale = weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1)
    scale = scale.to(torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    quantised = (weight / scale[:, None].to(weight.dtype)).round().to(torch.int8)
    if bits == 4:
        quantised = pack_nibbles(quantised)
    return quantised, scale


def _check_columns(columns: int, bits: int) -> None:
    if columns * bits % 8:
        raise UsageError(
            f"a layer with {columns} columns has no official int4 form, which holds two columns in a byte",
            hint="use official-int8, quantize(8)",
        )


class OfficialQuantizedEmbedding(nn.Module):
    """An embedding with the tensors of an official int8 or int4 checkpoint, `weight` and `weight_scale`.

    Args:
        weight: Packed rows, int8 (V, C) or (V, C / 2).
        weight_scale: (V,).
        bits: 8 or 4.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(self, weight: Tensor, weight_scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.num_embeddings, self.embedding_dim = weight.shape[0], weight.shape[1] * (8 // bits)
        self.scale_dtype = weight_scale.dtype
        self.register_state_dict_post_hook(_narrow_scale)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int) -> OfficialQuantizedEmbedding:
        """Quantises an embedding; on the meta device only the shapes are made."""
        return cls(*_quantised(embedding.weight, bits), bits)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows in the dtype of the checkpoint's scales."""
        scale = self.weight_scale[ids.flatten()].to(self.scale_dtype)
        return dequantize(self.weight[ids.flatten()], scale, self.bits).unflatten(0, ids.shape)


def quantize_linear(linear: nn.Linear, bits: int) -> QuantizedLinear:
    """Quantises a linear layer; on the meta device only the shapes are made."""
    return QuantizedLinear(*_quantised(linear.weight, bits), linear.bias, bits)


def _quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packed weight and scales of a matrix; on the meta device only their shapes."""
    if not weight.is_meta:
        return quantize_rows(weight.detach(), bits)
    rows, columns = weight.shape
    _check_columns(columns, bits)
    packed = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device="meta")
    return packed, torch.empty(rows, dtype=torch.float16, device="meta")


def _narrow_scale(layer: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Saves the scale in the dtype it was computed in, also after `model.float()`, so that loading changes nothing."""
    name = f"{prefix}weight_scale"
    state[name] = state[name].to(layer.scale_dtype)  # type: ignore[arg-type]


def is_quantised_layer(name: str) -> bool:
    """Whether the module of this name is quantised in the official format."""
    return ".layers." in name and name.endswith(_QUANTISED)


def quantize_model(model: nn.Module, bits: int, *, embeddings: bool | None = None) -> nn.Module:
    """Replaces the linears of all blocks, one at a time, and notes it in the config: the official `.quantize(bits)`.

    What is quantised already stays as it is.

    Args:
        model: A model of any family.
        bits: 4 or 8.
        embeddings: Whether the embedding is quantised too (ChatGLM-6B only, whose output layer is the embedding). None:
            as the config says.

    Returns:
        The same model.

    Raises:
        UsageError: Other bits, the model is already quantised to other bits, or int4 of odd columns.
    """
    if bits not in (4, 8):
        raise UsageError(f"quantize({bits!r}): the official format has 4 or 8 bits", hint="quantize(4) or quantize(8)")
    present = getattr(model.config, "quantization_bit", 0) or 0
    if present not in (0, bits):
        raise UsageError(f"the model is already quantised to {present} bits", hint="load the unquantised checkpoint")
    if isinstance(getattr(model.config, "quantization_config", None), dict):
        raise UsageError("the model is already quantised in a format of its own", hint="leave out quantize()")
    if embeddings is None:
        embeddings = bool(getattr(model.config, "quantization_embeddings", False))
    chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantised_layer(name)}
    for module in chosen.values():
        _check_columns(module.in_features, bits)
    if embeddings:
        _quantize_embedding(model, bits)
    for name in list(chosen):
        module = chosen.pop(name)  # its memory goes before the next is made
        model.set_submodule(name, quantize_linear(module, bits))
    model.config.quantization_bit = bits  # type: ignore[union-attr]
    return model


def _quantize_embedding(model: nn.Module, bits: int) -> None:
    """Quantises the embedding of ChatGLM-6B; its output layer becomes the same packed table."""
    table = getattr(getattr(model, "transformer", None), "word_embeddings", None)
    if isinstance(table, OfficialQuantizedEmbedding):
        return
    if not isinstance(table, nn.Embedding) or not isinstance(getattr(model, "lm_head", None), nn.Linear):
        raise UsageError(
            f"the embedding of {type(model).__name__} cannot be quantised",
            hint="only ChatGLM-6B has a release with a quantised embedding; leave it out",
        )
    packed = OfficialQuantizedEmbedding.from_embedding(table, bits)
    head = QuantizedLinear(packed.weight, packed.weight_scale, None, bits)
    head.weight, head.weight_scale = packed.weight, packed.weight_scale  # the same parameters, not others on their data
    model.set_submodule("transformer.word_embeddings", packed)
    model.set_submodule("lm_head", head)
    tied = {f"lm_head.{leaf}": f"transformer.word_embeddings.{leaf}" for leaf in ("weight", "weight_scale")}
    model._tied_weights_keys = tied  # type: ignore[assignment]
    model.config.quantization_embeddings = True  # type: ignore[union-attr]

"""int8 and nf4 of bitsandbytes, where it is installed: for a base that stays as it is while something beside it learns.

Quantised are the four linears of each block, as in the official format, while the checkpoint is read. The weights are
not written in these formats: they are for memory, and the checkpoint has them in full.

Source: LLM.int8() (arXiv:2208.07339) with transformers' threshold for outliers; NF4 (arXiv:2305.14314), with the
constants of its blocks in float32.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.errors import MissingDependencyError

BITS = {"bnb-int8": 8, "bnb-nf4": 4}
"""Name of a format -> bits of a weight."""

_OUTLIERS = 6.0  # activations above it are multiplied in 16 bit


def quantized_linear(weight: Tensor, bias: nn.Parameter | None, kind: str, device: torch.device) -> nn.Module:
    """Makes the quantised layer of a weight.

    Args:
        weight: (out, in), floating point, in the dtype that the model computes in.
        bias: (out,) or None; it is kept as it is.
        kind: "bnb-int8" or "bnb-nf4".
        device: Where the layer goes.

    Returns:
        bitsandbytes' Linear8bitLt or Linear4bit, frozen.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
    """
    package = bitsandbytes()
    rows, columns = weight.shape
    with torch.device("meta"):
        if kind == "bnb-int8":
            layer = package.nn.Linear8bitLt(
                columns, rows, bias is not None, has_fp16_weights=False, threshold=_OUTLIERS
            )
        else:
            layer = package.nn.Linear4bit(
                columns, rows, bias is not None, compute_dtype=weight.dtype, compress_statistics=False, quant_type="nf4"
            )
    weight = weight.cpu().contiguous()  # from there bitsandbytes takes what is not quantised yet
    if kind == "bnb-int8":
        layer.weight = package.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        made = package.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
        )
        layer.weight = made.to(device)
        # On some CPUs the first call without gradient would pack the weights anew, and there were no gradient after it.
        layer.support_avx512bf16_for_cpu = False
    layer.bias = bias
    result: nn.Module = layer
    return result


def bitsandbytes() -> Any:
    """The package; it says once and not at every product that int8 products begin in float16.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import bitsandbytes as package
    except ImportError:
        raise MissingDependencyError("bitsandbytes", "quant") from None
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return package

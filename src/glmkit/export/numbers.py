"""Numbers of a checkpoint in another dtype, one tensor at a time, and never an infinity that was none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from glmkit.errors import OutputError, UsageError
from glmkit.writing import Shaped, ShapedTensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def to_bytes(size: str) -> int:
    """A size that a user wrote.

    Args:
        size: "2GB", "500MB", or a number of bytes.

    Raises:
        UsageError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", size.strip().lower())
    found = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if found < 1:
        raise UsageError(f"{size!r} is no size", hint="2GB, 500MB, or a number of bytes")
    return found


def chosen_dtype(dtype: str) -> torch.dtype | None:
    """The dtype that a user named.

    Args:
        dtype: "auto", or a name of `DTYPES`.

    Returns:
        The dtype; None: each tensor keeps its own.

    Raises:
        UsageError: There is no such dtype.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r}", hint=f"auto, {', '.join(DTYPES)}")
    return DTYPES.get(dtype)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Args:
        name: Its name, for the message.
        tensor: Any tensor.
        dtype: The new dtype.

    Raises:
        OutputError: Its numbers do not fit into it.
    """
    result = tensor.to(dtype)
    if result.numel() and not all(math.isfinite(end) for end in torch.aminmax(result)):  # no copy, as isfinite makes
        raise OutputError(
            f"{name} has numbers that {str(dtype).removeprefix('torch.')} does not hold",
            hint="choose a wider dtype: --dtype bfloat16 or float32",
        )
    return result


def recast(
    tensors: Mapping[str, ShapedTensor], fetch: Callable[[str], Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, ShapedTensor], Callable[[str], Tensor]]:
    """The tensors of a folder as they will be in another dtype.

    A prefix keeps its numbers, which are large for float16.

    Args:
        tensors: Name -> shape and dtype.
        fetch: Gives the tensor of a name.
        dtype: Of all floating-point numbers; None: each tensor keeps its own.

    Returns:
        The same, in the new dtype.

    Raises:
        UsageError: The tensors are quantised, and their scales have a dtype of their own.
    """
    if dtype is None:
        return dict(tensors), fetch
    if any(name.endswith("_scale") for name in tensors):
        raise UsageError("a quantised checkpoint has no other dtype", hint="leave out --dtype")
    result: dict[str, ShapedTensor] = {}
    for name, one in tensors.items():
        keeps = not one.dtype.is_floating_point or ".prefix_encoder." in f".{name}"
        result[name] = Shaped(tuple(one.shape), one.dtype if keeps else dtype)

    def fetched(name: str) -> Tensor:
        tensor, wanted = fetch(name), result[name].dtype
        return tensor if tensor.dtype == wanted else rounded(name, tensor, wanted)

    return result, fetched


def coarsest(before: Mapping[str, ShapedTensor], after: Mapping[str, ShapedTensor]) -> torch.dtype | None:
    """The dtype to which tensors were rounded on the way.

    Args:
        before: Name -> tensor, of the source.
        after: Name -> tensor, of the result; other names are left aside.

    Returns:
        The one with the fewest digits; None where no number was rounded.
    """
    kinds = {
        one.dtype
        for name, one in after.items()
        if name in before and one.dtype != before[name].dtype and one.dtype.is_floating_point
    }
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=None)


def dtype_names(tensors: Mapping[str, ShapedTensor]) -> list[str]:
    """The names of the dtypes in a folder, sorted.

    Args:
        tensors: Name -> tensor.
    """
    return sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values()})

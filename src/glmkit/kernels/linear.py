"""Quantised weights in the blocks that the native code reads, and their products.

    arena = Arena()                                     2 MiB pages: the weights are read in whole at each token
    weight, scale = pack(weight, scale, bits, arena)    official rows -> blocks; unpack(layer) gives the rows back
    y = product(layer, x)                               of a layer whose `weight` and `weight_scale` are those

    N rows, K columns; M vectors. N is a multiple of 16 and K of 32, other layers stay with torch.
    blocks   uint8 (N/16, K/32, 512) of int8, (N/16, K/32, 256) of int4
    scales   float32 (N,), one for each row; or float16 (N/16, K/32, 16), one for each group of 32 columns (int4)

The vectors are rounded to int8 in groups of 32 columns, each with a scale of its own: an error of about 0.5 to 1 % of a
product's norm. Products with float matrices round nothing. No gradient flows through any of them.

What the bytes of a block mean is written in source/linear.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glmkit.errors import KernelsError, UsageError
from glmkit.kernels.build import library

BLOCK_ROWS = 16
BLOCK_COLUMNS = 32
_PAGE_BYTES = 2 << 20
_MAP_BYTES = 64 << 20
_ALIGNMENT = 64  # a cache line, and the widest vector
_FLOAT_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_INT8, _INT4, _INT4_GROUPS = 4, 5, 6
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of numbers that the native code reads and writes -> what it calls them."""


class PackedLayer(Protocol):
    """A module whose `weight` and `weight_scale` are those that `pack` made; its bias is the usual one, or None."""

    weight: Any
    weight_scale: Any
    bias: Any
    scale_dtype: torch.dtype


class Weight(ctypes.Structure):
    """One matrix as the native code sees it (`struct Weight` of source/linear.h); `weight_of` makes it.

    It holds addresses, so it keeps the tensors they belong to. A copy is empty.
    """

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )
    kept: tuple[Tensor | None, ...] = ()
    made_from: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type[Weight], tuple[()]]:
        return Weight, ()


# --- memory ---


class Arena:
    """Memory for weights in pages of 2 MiB, where the system has them; it lives as long as a tensor in it.

    A product reads every weight once. With pages of 4 KiB a good part of that time goes into finding them.

    Args:
        nbytes: What is expected to come, in bytes. More than that grows by further maps.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._next_bytes = nbytes
        self._free: Tensor | None = None  # uint8: what is left of the newest map

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Carves a tensor out of it, aligned to 64 bytes and filled with zeros.

        Args:
            shape: Its shape.
            dtype: Its dtype.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.zeros(tuple(shape), dtype=dtype)
        taken = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._free is None or self._free.numel() < taken:
            self._free = _huge_pages(max(taken, self._next_bytes, _MAP_BYTES))
            self._next_bytes = 0
        piece, self._free = self._free[:nbytes], self._free[taken:]
        return piece.view(dtype).view(tuple(shape))


def _huge_pages(nbytes: int) -> Tensor:
    """At least so many zero bytes of a map of their own, from a 2 MiB boundary on; pages cost memory once used."""
    whole = -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
    try:
        # Private: shared memory, which is Python's default, has no huge pages and stays shared after a fork.
        mapped = mmap.mmap(-1, whole + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {whole} bytes of weights: {error.strerror}") from error
    data = torch.frombuffer(mapped, dtype=torch.uint8)  # holds the map
    start = -data.data_ptr() % _PAGE_BYTES
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return data[start : start + whole]


# --- blocks ---


def fits(n: int, k: int, bits: int, group_size: int | None) -> bool:
    """Whether the native code takes a layer of these sizes.

    Args:
        n: Rows, the layer's outputs.
        k: Columns, its inputs.
        bits: 8 or 4.
        group_size: Columns that share a scale; None for one scale in each row.
    """
    kind = group_size is None or (group_size == BLOCK_COLUMNS and bits == 4)
    return bits in (4, 8) and kind and n > 0 and k > 0 and n % BLOCK_ROWS == 0 and k % BLOCK_COLUMNS == 0


def packed_bytes(n: int, k: int, bits: int, group_size: int | None) -> int:
    """What an arena needs for a layer that `fits`, in bytes; the arguments are those of `fits`."""
    scales = 4 * n if group_size is None else 2 * n * (k // group_size)
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in (n * k * bits // 8, scales))


def pack(weight: Tensor, scale: Tensor, bits: int, arena: Arena) -> tuple[Tensor, Tensor] | None:
    """Lays a quantised matrix out in blocks.

    Args:
        weight: int8 (N, K), for int4 (N, K/2) with the even column in the high nibble.
        scale: (N,) or (N, K/32), floating point.
        bits: 8 or 4.
        arena: Where the blocks go.

    Returns:
        Blocks and their scales as this file's head says; None if a group's scale is not exact in float16, as one in
        bfloat16 may be: such a layer stays with torch.

    Raises:
        UsageError: Sizes that `fits` refuses, or tensors that are none of the above.
        KernelsError: There is no native code.
    """
    native = _native()
    n, k = weight.shape[0], weight.shape[-1] * 8 // bits
    group_size = None if scale.ndim == 1 else BLOCK_COLUMNS
    expected = (n,) if scale.ndim == 1 else (n, k // BLOCK_COLUMNS)
    good = weight.dtype == torch.int8 and weight.ndim == 2 and scale.is_floating_point() and scale.shape == expected
    if not good or not fits(n, k, bits, group_size) or weight.device.type != "cpu" or scale.device.type != "cpu":
        raise UsageError(
            f"no blocks can be made of a weight {_described(weight)} with scales {_described(scale)} and {bits} bits",
            hint=f"int8 on the CPU, N % {BLOCK_ROWS} == 0, K % {BLOCK_COLUMNS} == 0; scales (N,), or (N, K/32) of int4",
        )
    if group_size is None:
        kind = _INT8 if bits == 8 else _INT4
        scales = arena.tensor((n,), torch.float32).copy_(scale)
    else:
        kind = _INT4_GROUPS
        half = scale.to(torch.float16)
        if not torch.equal(half.to(scale.dtype), scale):
            return None
        laid = half.view(n // BLOCK_ROWS, BLOCK_ROWS, -1).transpose(1, 2)
        scales = arena.tensor(tuple(laid.shape), torch.float16).copy_(laid)
    blocks = arena.tensor((n // BLOCK_ROWS, k // BLOCK_COLUMNS, 64 * bits), torch.uint8)
    rows = weight.contiguous()
    native.glm_pack(kind, n, k, rows.data_ptr(), blocks.data_ptr(), torch.get_num_threads())
    return blocks, scales


def unpack(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`, bit for bit.

    Args:
        layer: A packed layer.

    Returns:
        Weight and scale as they were given to `pack`, the scale in `layer.scale_dtype`; in memory of their own.

    Raises:
        UsageError: The layer is not packed.
        KernelsError: There is no native code.
    """
    packed = weight_of(layer.weight.detach(), layer.weight_scale.detach())
    if packed.kind < _INT8:
        raise UsageError("the layer is not packed: its weight is a float matrix")
    bits = 8 if packed.kind == _INT8 else 4
    rows = torch.empty(packed.n, packed.k * bits // 8, dtype=torch.int8)
    _native().glm_unpack(packed.kind, packed.n, packed.k, packed.data, rows.data_ptr(), torch.get_num_threads())
    scale = layer.weight_scale.detach()
    if packed.kind == _INT4_GROUPS:
        scale = scale.transpose(1, 2).flatten(0, 1)
    return rows, scale.to(layer.scale_dtype, copy=True).contiguous()


# --- products ---


def weight_of(weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Weight:
    """Describes a matrix to the native code.

    Args:
        weight: Blocks of `pack`; or a matrix (N, K) in float32, bfloat16 or float16, which stays where it is.
        scale: The blocks' scales.
        bias: (N,) in any dtype, or None.

    Returns:
        The description, which keeps the tensors.

    Raises:
        UsageError: A tensor of another shape or dtype, on another device, or not contiguous.
    """
    if weight.dtype in _FLOAT_KINDS and weight.ndim == 2 and scale is None:
        kind, (n, k) = _FLOAT_KINDS[weight.dtype], weight.shape
        good = True
    else:
        kind, n, k = _kind_of_blocks(weight, scale)
        good = kind > 0
    tensors = [tensor for tensor in (weight, scale) if tensor is not None]
    good &= all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    if bias is not None:
        good &= bias.shape == (n,) and bias.device.type == "cpu"
    if not good:
        given = ", ".join(_described(tensor) for tensor in (weight, scale, bias) if tensor is not None)
        raise UsageError(f"the native code takes no weight like this: {given}", hint="blocks of pack, or float rows")
    own_bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    made = Weight(kind, n, k, *(None if one is None else one.data_ptr() for one in (weight, scale, own_bias)))
    made.kept = (weight, scale, own_bias)
    return made


def _kind_of_blocks(weight: Tensor, scale: Tensor | None) -> tuple[int, int, int]:
    """Kind, N and K of packed tensors; kind 0 if they are none."""
    if weight.dtype != torch.uint8 or weight.ndim != 3 or scale is None:
        return 0, 0, 0
    n, k, nbytes = weight.shape[0] * BLOCK_ROWS, weight.shape[1] * BLOCK_COLUMNS, weight.shape[2]
    if scale.dtype == torch.float32 and scale.shape == (n,) and nbytes in (256, 512):
        return _INT8 if nbytes == 512 else _INT4, n, k
    grouped = scale.dtype == torch.float16 and scale.shape == (*weight.shape[:2], BLOCK_ROWS)
    return (_INT4_GROUPS, n, k) if grouped and nbytes == 256 else (0, 0, 0)


def multiply(weight: Weight, x: Tensor) -> Tensor:
    """`W x + b` for many vectors.

    Args:
        weight: Of `weight_of`.
        x: (..., K) on the CPU in float32, bfloat16 or float16; any number of vectors, also none.

    Returns:
        (..., N) in the dtype of x. A vector's result does not depend on those beside it.

    Raises:
        UsageError: x of another width or dtype, or elsewhere.
        KernelsError: There is no native code.
    """
    dtype = DTYPES.get(x.dtype)
    shape = x.shape
    if dtype is None or not shape or shape[-1] != weight.k or not x.is_cpu:
        raise UsageError(f"x is {_described(x)}; expected (..., {weight.k}) in float32, bfloat16 or float16 on the CPU")
    y = torch.empty((*shape[:-1], weight.n), dtype=x.dtype)
    m = x.numel() // weight.k
    if m:
        x = x.contiguous()
        if _native().glm_linear(ctypes.byref(weight), x.data_ptr(), y.data_ptr(), m, dtype, torch.get_num_threads()):
            raise MemoryError(f"no memory to multiply {m} vectors of {weight.k} numbers")
    return y


def product(layer: PackedLayer, x: Tensor) -> Tensor:
    """`W x + b` of a packed layer; see `multiply`.

    Args:
        layer: A layer whose `weight` and `weight_scale` are those of `pack`. What is made of them is kept with it, and
            made anew when they or the bias change.
        x: (..., K).
    """
    own = layer.__dict__
    parameters = own["_parameters"]  # a third of the time that `layer.weight` takes
    weight, scale, bias = parameters["weight"], parameters["weight_scale"], parameters.get("bias")
    state: tuple[int, ...] = (weight.data_ptr(), scale.data_ptr())
    if bias is not None:  # the kernels read a float32 copy; inference tensors do not count their changes
        state += (bias.data_ptr(), 0 if bias.is_inference() else bias._version)
    made: Weight | None = own.get("_native")
    if made is None or made.made_from != state:
        made = weight_of(weight.detach(), scale.detach(), bias)
        made.made_from = state
        own["_native"] = made
    return multiply(made, x)


_declared: ctypes.CDLL | None = None


def _native() -> ctypes.CDLL:
    """The library, whose functions know their arguments."""
    global _declared
    loaded = library()
    if loaded is not _declared:
        if loaded is None:
            raise KernelsError("no native code is in use", hint="glm doctor says why")
        loaded.glm_linear.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 3
        for function in (loaded.glm_pack, loaded.glm_unpack):
            function.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 2 + [ctypes.c_int]
            function.restype = None
        _declared = loaded
    assert loaded is not None
    return loaded


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"

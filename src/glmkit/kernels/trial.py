"""The trial of a new library, in a process that may die of it: `python trial.py LIBRARY ABI [OPENMP_RUNTIME]`.

Small products of every kind of weight are compared with Python's own arithmetic. The vectors hold whole numbers, the
largest of each 32 is 127, so rounding them to int8 changes nothing and the products are right to float32.

Leaves with 0, or with the reason on standard error. It imports the standard library only, because it runs alone.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator

_ROWS, _COLUMNS, _GROUP = 48, 96, 32
_VECTORS = (1, 3, 8, 37)
_THREADS = 2
_TOLERANCE = 2e-6  # of sum |w||x|: float32 sums of 96 products
_TILE_VECTORS, _TILE_TOLERANCE = 32, 0.01  # from so many on, tiles round int4 of groups once more (source/amx.h)
_REFUSED = 2  # of glm_tiles
_INT8, _INT4, _INT4_GROUPS = 4, 5, 6
_FLOATS = {1: "f", 2: "", 3: "e"}  # kind -> format of struct; bfloat16 has none


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "bias")),
    )


def main(path: str, abi: int, runtime: str | None = None) -> str | None:
    """Tries every product of a library.

    Args:
        path: The library.
        abi: What its `glm_abi` must return.
        runtime: The OpenMP library that it will meet in torch's process; loaded first.

    Returns:
        What is wrong; None if nothing is.
    """
    if runtime is not None:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path)
    library.glm_linear.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 3
    for name in ("glm_pack", "glm_unpack"):
        getattr(library, name).argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 2 + [ctypes.c_int]
    if library.glm_abi() != abi:
        return f"its interface is {library.glm_abi()}, expected {abi}"
    if library.glm_tiles() == _REFUSED:
        return "the system does not let programs use the CPU's tiles"
    numbers = _numbers(20_231_027)
    bias = [next(numbers) / 16 for _ in range(_ROWS)]
    for kind in (*_FLOATS, _INT8, _INT4, _INT4_GROUPS):
        made = _float_weight(kind, numbers) if kind in _FLOATS else _packed_weight(library, kind, numbers)
        if isinstance(made, str):
            return made
        data, scale, matrix = made
        weight = _Weight(kind, _ROWS, _COLUMNS, _address(data), _address(scale), _address(struct.pack("48f", *bias)))
        for m in _VECTORS:
            x = [[next(numbers) for _ in range(_COLUMNS)] for _ in range(m)]
            for vector in x:
                vector[::_GROUP] = [127] * (_COLUMNS // _GROUP)
            y = (ctypes.c_float * (m * _ROWS))()
            given = struct.pack(f"{m * _COLUMNS}f", *(number for vector in x for number in vector))
            if library.glm_linear(ctypes.byref(weight), _address(given), y, m, 0, _THREADS):
                return "it has no memory"
            tolerance = _TILE_TOLERANCE if kind == _INT4_GROUPS and m >= _TILE_VECTORS else _TOLERANCE
            for i, vector in enumerate(x):
                for n, row in enumerate(matrix):
                    products = [w * v for w, v in zip(row, vector)]
                    allowed = tolerance * sum(map(abs, (*products, bias[n])))
                    if not abs(y[i * _ROWS + n] - sum(products) - bias[n]) <= allowed:  # a NaN is wrong too
                        return f"wrong product: kind {kind}, vector {i} of {m}, row {n}"
    return None


def _numbers(seed: int) -> Iterator[int]:
    """Whole numbers from -127 to 127, always the same ones."""
    while True:
        seed = (seed * 1_103_515_245 + 12_345) % 2**31
        yield (seed >> 16) % 255 - 127


def _float_weight(kind: int, numbers: Iterator[int]) -> tuple[bytes, bytes, list[list[float]]]:
    """Rows of small numbers that 16 bits hold exactly."""
    matrix = [[next(numbers) / 64 for _ in range(_COLUMNS)] for _ in range(_ROWS)]
    flat = [number for row in matrix for number in row]
    if kind == 2:  # the upper half of a float32
        wide = struct.pack(f"<{len(flat)}f", *flat)
        return b"".join(wide[at + 2 : at + 4] for at in range(0, len(wide), 4)), b"", matrix
    return struct.pack(f"{len(flat)}{_FLOATS[kind]}", *flat), b"", matrix


def _packed_weight(
    library: ctypes.CDLL, kind: int, numbers: Iterator[int]
) -> tuple[bytes, bytes, list[list[float]]] | str:
    """Rows of int8 or int4 in the blocks that the library makes of them, and back; or what is wrong with those."""
    low, high = (-128, 127) if kind == _INT8 else (-8, 7)
    quantised = [[next(numbers) % (high - low + 1) + low for _ in range(_COLUMNS)] for _ in range(_ROWS)]
    quantised[0][:2], quantised[-1][-2:] = [low, high], [high, low]
    if kind == _INT8:
        rows = bytes(q & 255 for row in quantised for q in row)
    else:
        rows = bytes((row[at] & 15) << 4 | row[at + 1] & 15 for row in quantised for at in range(0, _COLUMNS, 2))
    blocks, back = ctypes.create_string_buffer(len(rows)), ctypes.create_string_buffer(len(rows))
    library.glm_pack(kind, _ROWS, _COLUMNS, _address(rows), ctypes.addressof(blocks), _THREADS)
    library.glm_unpack(kind, _ROWS, _COLUMNS, ctypes.addressof(blocks), ctypes.addressof(back), _THREADS)
    if back.raw != rows:
        return f"blocks of kind {kind} do not give their rows back"
    groups = _COLUMNS // _GROUP if kind == _INT4_GROUPS else 1
    scales = [[(abs(next(numbers)) + 1) / 1024 for _ in range(groups)] for _ in range(_ROWS)]
    width = _COLUMNS // groups
    matrix = [[q * own[at // width] for at, q in enumerate(row)] for row, own in zip(quantised, scales)]
    if kind != _INT4_GROUPS:
        return blocks.raw, struct.pack(f"{_ROWS}f", *(own for (own,) in scales)), matrix
    order = [scales[first + r][g] for first in range(0, _ROWS, 16) for g in range(groups) for r in range(16)]
    return blocks.raw, struct.pack(f"{len(order)}e", *order), matrix


_kept: list[bytes] = []


def _address(data: bytes) -> int | None:
    """Where bytes lie, which stay there until the end."""
    _kept.append(data)
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value if data else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))

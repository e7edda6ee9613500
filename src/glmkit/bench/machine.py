"""What the machine is, and what it can do at best: the speed at which it reads memory and multiplies matrices.

Measured in the same run as everything else, because such machines drift by a third within an hour.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from glmkit import machine as facts
from glmkit.kernels.build import library, status

_BUFFER_BYTES = 2**30  # no cache holds it
_LEAST_SECONDS = 0.15  # of a loop without memory, so that its start does not count
_REPEATS = 5
_MOST_SECONDS = 2.0  # for one way, about
_MATRICES = (2048, 4096)


@dataclass(frozen=True)
class Limits:
    """The best figures of this machine, with as many threads as torch has.

    Args:
        read_bytes: Bytes read from memory in a second.
        bfloat16_ops: Multiplications and additions of bfloat16 matrices in a second; 0 if not measured.
        int8_ops: The same of int8.
        how: Which way each was reached.
    """

    read_bytes: float
    bfloat16_ops: float
    int8_ops: float
    how: dict[str, str]


def limits(*, matrices: tuple[int, ...] = _MATRICES, buffer_bytes: int = _BUFFER_BYTES) -> Limits:
    """Measures the machine; the best of some tries counts, for others can only slow it down.

    Args:
        matrices: Sizes of square products to try.
        buffer_bytes: How much memory is read.

    Returns:
        Its limits.
    """
    reading = best({"torch sum of float32": _torch_reading(buffer_bytes)} | _native_reading(buffer_bytes))
    bfloat16 = best({f"torch bfloat16 {size}^3": _product(size) for size in matrices})
    int8 = best({f"torch int8 {size}^3": _int8_product(size) for size in matrices} | _native_int8())
    return Limits(reading[1], bfloat16[1], int8[1], {"read": reading[0], "bfloat16": bfloat16[0], "int8": int8[0]})


def description() -> dict[str, Any]:
    """Names and versions that belong to every figure.

    Returns:
        Plain values ready for JSON.
    """
    native, processor = status(), facts.cpu()
    return {
        "cpu": processor["name"],
        "cores": processor["cores"],
        "hardware_threads": processor["hardware_threads"],
        "memory_bytes": facts.memory_bytes("MemTotal"),
        "huge_pages": facts.huge_pages(),
        "threads": torch.get_num_threads(),
        "kernels": native.level,
        "features": list(native.features),
        "compiler": native.compiler,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "glmkit": version("glmkit"),
    }


# --- the ways ---

Way = Callable[[], float]  # works once and returns how much that was: bytes, or multiplications and additions


def best(ways: dict[str, Way]) -> tuple[str, float]:
    """Tries ways of doing the same.

    Args:
        ways: Name -> what to do.

    Returns:
        Name and amount per second of the fastest; "" and 0 if there is none, or none that this torch can do.
    """
    fastest = ("", 0.0)
    for name, way in ways.items():
        warm = time.perf_counter()
        try:
            way()
        except RuntimeError:  # an operator that this build or CPU does not have
            continue
        warm = time.perf_counter() - warm
        for _ in range(min(_REPEATS, 1 + int(_MOST_SECONDS / warm))):
            started = time.perf_counter()
            amount = way()
            speed = amount / (time.perf_counter() - started)
            fastest = max(fastest, (name, speed), key=lambda found: found[1])
    return fastest


def _torch_reading(size: int) -> Way:
    numbers = torch.ones(size // 4)

    def read() -> float:
        numbers.sum()
        return size

    return read


def _native_reading(size: int) -> dict[str, Way]:
    native = library()
    if native is None:
        return {}
    from glmkit.kernels.linear import Arena

    buffer = Arena(size).tensor((size,), torch.uint8)
    buffer.fill_(1)

    def read() -> float:
        read_once(native, buffer, torch.get_num_threads())
        return size

    return {"native, 2 MiB pages": read}


def _native_int8() -> dict[str, Way]:
    native = library()
    if native is None:
        return {}
    started, rounds = time.perf_counter(), 20_000
    multiply_once(native, rounds, torch.get_num_threads())
    rounds = int(rounds * max(1.0, _LEAST_SECONDS / (time.perf_counter() - started)))
    return {"native, registers only": lambda: float(multiply_once(native, rounds, torch.get_num_threads()))}


def read_once(native: ctypes.CDLL, buffer: Tensor, threads: int) -> int:
    """Reads memory once, by native code.

    Args:
        native: The library of the kernels.
        buffer: What is read, uint8.
        threads: Each reads as many whole lines.

    Returns:
        The sum of the 64-bit words that were read, modulo 2^64.
    """
    function = native.glm_read_bandwidth
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_uint64
    return int(function(buffer.data_ptr(), buffer.numel(), threads))


def multiply_once(native: ctypes.CDLL, rounds: int, threads: int) -> int:
    """Computes products of int8 in registers.

    Args:
        native: The library of the kernels.
        rounds: How often each thread does it.
        threads: How many.

    Returns:
        How many multiplications and additions that were.
    """
    function = native.glm_int8_peak
    function.argtypes, function.restype = (ctypes.c_int64, ctypes.c_int), ctypes.c_int64
    return int(function(rounds, threads))


def _product(size: int) -> Way:
    a = torch.ones(size, size, dtype=torch.bfloat16)

    def multiply() -> float:
        a @ a
        return 2.0 * size**3

    return multiply


def _int8_product(size: int) -> Way:
    a = torch.ones(size, size, dtype=torch.int8)

    def multiply() -> float:
        torch._int_mm(a, a)
        return 2.0 * size**3

    return multiply

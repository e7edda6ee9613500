"""Which of the native code's levels this CPU can run, and with which flags each is compiled.

A level is one compilation of the same sources:

    amx       avx512, bfloat16 products, and tiles of int8 and bfloat16
    avx512    16 lanes in one register, and products of int8 that are added up in int32
    avx2      16 lanes in two registers
    portable  plain loops, for any CPU and architecture

The CPU's own level is the first of these that it can run. `GLMKIT_KERNELS` overrules it; "torch" stands for no native
code at all.

Source: the names of features are those of /proc/cpuinfo, in which Linux lists only what it lets programs use.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

from glmkit.errors import UsageError

VARIABLE = "GLMKIT_KERNELS"
TORCH = "torch"
_CPUINFO = Path("/proc/cpuinfo")
_AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
_AVX512 = {**_AVX2, **{f"avx512{part}": f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")}} | {
    "avx512_vnni": "-mavx512vnni"
}
_BFLOAT16 = {"avx512_bf16": "-mavx512bf16"}
_AMX = {**_AVX512, **_BFLOAT16, **{f"amx_{part}": f"-mamx-{part}" for part in ("tile", "int8", "bf16")}}
# Level -> feature that the CPU must have -> the compiler's flag for it. The fastest comes first.
_NEEDS: dict[str, dict[str, str]] = {"amx": _AMX, "avx512": _AVX512, "avx2": _AVX2, "portable": {}}
LEVELS = tuple(_NEEDS)


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """The features of the CPU that some level needs; on other architectures and systems none."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        lines = _CPUINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(_AMX) & frozenset(flags)


def possible_levels() -> tuple[str, ...]:
    """The levels that this CPU can run, the fastest first."""
    return tuple(level for level, needs in _NEEDS.items() if needs.keys() <= cpu_features())


def wanted_levels() -> tuple[tuple[str, ...], bool]:
    """The levels to try, in this order, and whether the user named the level.

    Returns:
        Levels, empty for no native code; and True if they come from `GLMKIT_KERNELS`.

    Raises:
        UsageError: `GLMKIT_KERNELS` is none of the levels, or one that this CPU cannot run.
    """
    named = os.environ.get(VARIABLE, "").strip().lower()
    possible = possible_levels()
    if not named:
        return possible, False
    hint = f"this CPU can run {', '.join((*possible, TORCH))}; without {VARIABLE} the first is taken"
    if named == TORCH:
        return (), True
    if named not in LEVELS:
        raise UsageError(f"{VARIABLE}={named}: expected one of {', '.join((*LEVELS, TORCH))}", hint=hint)
    if named not in possible:
        missing = ", ".join(sorted(_NEEDS[named].keys() - cpu_features()))
        raise UsageError(f"{VARIABLE}={named}: this CPU has no {missing}", hint=hint)
    return (named,), True


def compiler_flags(level: str) -> list[str]:
    """The compiler's flags for the instructions of a level.

    Args:
        level: One of `LEVELS`. avx512 uses bfloat16 products where the CPU has them.
    """
    needs = dict(_NEEDS[level])
    if level == "avx512" and cpu_features() >= _BFLOAT16.keys():
        needs |= _BFLOAT16
    return list(needs.values())

"""Products on tiles (source/amx.h), with the tile instructions modelled in plain C++ (emulated_tiles.h), so that they
run on every CPU; and what the compiler makes of the real instructions.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from glmkit.kernels import trial
from glmkit.kernels.build import ABI, SOURCE, find_compiler
from glmkit.kernels.levels import compiler_flags, possible_levels

Array = NDArray[np.float64]
INT8, INT4, INT4_GROUPS = 4, 5, 6
RANGE, GROUP = 256, 32
REFUSED = "GLM_TEST_TILES_REFUSED"
TILES_FROM = 32  # vectors

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


class Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "bias")),
    )


def compiled(library: Path, source: Path, flags: list[str]) -> Path:
    compiler = find_compiler()
    assert compiler is not None
    command = [*compiler[0], "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-math-errno", "-fopenmp", *flags]
    subprocess.run([*command, "-o", str(library), str(source)], check=True, capture_output=True, timeout=300)
    return library


@pytest.fixture(
    scope="module",
    params=[  # of two one is enough each time; both take long to compile
        pytest.param("portable", marks=pytest.mark.slow if "avx512" in possible_levels() else ()),
        pytest.param("avx512", marks=pytest.mark.skipif("avx512" not in possible_levels(), reason="no AVX-512")),
    ],
)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = ["-DGLM_EMULATE_TILES", f"-I{Path(__file__).parent}", *compiler_flags(request.param)]
    return ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("tiles") / f"{request.param}.so", SOURCE, flags)))


def address(array: NDArray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


class Rows:
    """A quantised matrix: its numbers, their scales, and the blocks that the library makes of them."""

    def __init__(self, library: ctypes.CDLL, kind: int, n: int, k: int, seed: int = 0, *, bias: bool = True) -> None:
        random = np.random.default_rng(seed)
        low, high = (-128, 127) if kind == INT8 else (-8, 7)
        self.kind, self.n, self.k = kind, n, k
        self.q = random.integers(low, high, (n, k), endpoint=True, dtype=np.int8)
        self.bias = random.standard_normal(n).astype(np.float32) if bias else None
        if kind == INT4_GROUPS:  # of either sign, as the search makes them
            sign = random.choice([-1, 1], (n, k // GROUP))
            self.scale: NDArray = (sign * random.uniform(0.003, 0.02, (n, k // GROUP))).astype(np.float16)
        else:
            self.scale = random.uniform(0.003, 0.02, n).astype(np.float32)
        self.pack(library)

    def pack(self, library: ctypes.CDLL) -> None:
        rows = self.q
        if self.kind != INT8:
            rows = (rows[:, ::2] << 4 | rows[:, 1::2] & 15).astype(np.int8)
        rows, self.blocks = np.ascontiguousarray(rows), np.empty(rows.size, np.uint8)
        library.glm_pack(self.kind, self.n, self.k, address(rows), address(self.blocks), 2)

    def weight(self) -> Weight:
        scale = self.scale
        if self.kind == INT4_GROUPS:  # (N/16, K/32, 16)
            scale = np.ascontiguousarray(scale.reshape(self.n // 16, 16, -1).transpose(0, 2, 1))
        self.kept = scale
        bias = None if self.bias is None else self.bias.ctypes.data
        return Weight(self.kind, self.n, self.k, self.blocks.ctypes.data, scale.ctypes.data, bias)

    def numbers(self) -> Array:
        scale = self.scale.astype(np.float64)
        return self.q * (np.repeat(scale, GROUP, axis=1) if self.kind == INT4_GROUPS else scale[:, None])

    def tile_numbers(self) -> Array:
        """The weights that tiles multiply with: those of groups are rounded to int8, with a scale for each range."""
        if self.kind != INT4_GROUPS:
            return self.numbers()
        out = np.empty(self.q.shape)
        for start in range(0, self.k, RANGE):
            part = self.scale[:, start // GROUP : (start + RANGE) // GROUP].astype(np.float64)
            step = 8 / 127 * np.abs(part).max(axis=1, keepdims=True)
            eighths = np.repeat(np.rint(256 * part / step), GROUP, axis=1)  # of 1/256
            out[:, start : start + RANGE] = np.floor((self.q[:, start : start + RANGE] * eighths + 128) / 256) * step
        return out


def product(library: ctypes.CDLL, rows: Rows, x: NDArray, threads: int = 1) -> NDArray[np.float32]:
    """x (M, K) float32 times the rows, (M, N)."""
    x = np.ascontiguousarray(x, np.float32)
    y = np.full((len(x), rows.n), 12345.0, np.float32)
    weight = rows.weight()
    failed = library.glm_linear(ctypes.byref(weight), address(x), address(y), len(x), 0, threads)
    assert failed == 0
    return y


def rounded(x: NDArray, width: int) -> Array:
    """Vectors as the kernel multiplies them: int8 with one scale for each `width` columns."""
    out = np.empty(x.shape)
    for start in range(0, x.shape[1], width):
        part = x[:, start : start + width].astype(np.float32)
        size = np.abs(part).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), size, out=np.zeros_like(size), where=size > 1e-30)
        out[:, start : start + width] = np.rint(part * inverse).astype(np.float64) * (size / 127)
    return out


def expected(rows: Rows, x: NDArray) -> Array:
    tiles = len(x) >= TILES_FROM
    weight = rows.tile_numbers() if tiles else rows.numbers()
    return rounded(x, RANGE if tiles else GROUP) @ weight.T + (0 if rows.bias is None else rows.bias.astype(np.float64))


def error(y: NDArray, truth: Array) -> float:
    return float(np.linalg.norm(y - truth) / np.linalg.norm(truth))


SIZES = [
    (1, 16, 32), (5, 48, 96), (16, 48, 64), (17, 16, 32), (31, 48, 96),  # beside tiles
    (32, 16, 32), (33, 48, 96), (40, 48, 320), (47, 80, 512), (64, 272, 544), (65, 528, 608), (512, 48, 1056),
    (545, 32, 288),
]  # fmt: skip


@pytest.mark.parametrize("kind", [INT8, INT4, INT4_GROUPS])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_products_are_exact_for_rounded_vectors(library: ctypes.CDLL, kind: int, m: int, n: int, k: int) -> None:
    rows = Rows(library, kind, n, k, seed=m)
    x = np.random.default_rng(m + n).standard_normal((m, k)) * 3
    y = product(library, rows, x)
    assert error(y, expected(rows, x)) < 1e-6
    np.testing.assert_array_equal(product(library, rows, x, threads=2), y)


@pytest.mark.parametrize("kind", [INT8, INT4, INT4_GROUPS])
def test_the_widest_layers(library: ctypes.CDLL, kind: int) -> None:
    for m, n, k in ((33, 4096, 96), (32, 16, 13696), (48, 32, 4096)):
        rows = Rows(library, kind, n, k, bias=False)
        x = np.random.default_rng(1).standard_normal((m, k))
        assert error(product(library, rows, x, threads=2), expected(rows, x)) < 1e-6


@pytest.mark.parametrize("kind", [INT8, INT4, INT4_GROUPS])
def test_the_largest_numbers_do_not_overflow(library: ctypes.CDLL, kind: int) -> None:
    rows = Rows(library, kind, 32, 13696, bias=False)
    rows.q[:16] = rows.q.min()
    rows.q[16:] = rows.q.max()
    if kind == INT4_GROUPS:
        rows.scale[:] = np.float16(0.01) * np.sign(rows.scale[:, :1])  # both signs of the largest product
    rows.pack(library)
    x = np.ones((32, 13696)) * np.where(np.arange(32) % 2, -1, 1)[:, None]
    np.testing.assert_allclose(product(library, rows, x), x @ rows.tile_numbers().T, rtol=2e-6)
    np.testing.assert_allclose(product(library, rows, x), x @ rows.numbers().T, rtol=0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's mprotect")
@pytest.mark.parametrize("kind", [INT8, INT4, INT4_GROUPS])
def test_nothing_is_read_behind_the_weights(library: ctypes.CDLL, kind: int) -> None:
    """The last of 11 blocks in a row is half a tile; what lies behind it cannot be read."""
    rows = Rows(library, kind, 48, 352)
    before = product(library, rows, np.ones((32, 352)))
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE * (1 + rows.blocks.size // mmap.PAGESIZE))
    whole = np.frombuffer(memory, np.uint8)
    end = whole.size - mmap.PAGESIZE
    whole[end - rows.blocks.size : end] = rows.blocks
    assert ctypes.CDLL(None).mprotect(address(whole[end:]), mmap.PAGESIZE, 0) == 0
    rows.blocks = whole[end - rows.blocks.size : end]
    np.testing.assert_array_equal(product(library, rows, np.ones((32, 352))), before)


@pytest.mark.parametrize("kind", [INT8, INT4, INT4_GROUPS])
def test_a_vector_does_not_depend_on_the_others(library: ctypes.CDLL, kind: int) -> None:
    rows = Rows(library, kind, 48, 352)
    x = np.random.default_rng(2).standard_normal((83, 352))
    alone = product(library, rows, x)
    others = x * 1000
    others[40] = x[40]
    np.testing.assert_array_equal(product(library, rows, others)[40], alone[40])
    for m in (41, 48, 64):
        np.testing.assert_array_equal(product(library, rows, x[:m]), alone[:m])
    np.testing.assert_array_equal(product(library, rows, x[::-1])[::-1], alone)


@pytest.mark.parametrize("kind", [INT8, INT4, INT4_GROUPS])
def test_what_is_not_finite_stays_in_its_vector(library: ctypes.CDLL, kind: int) -> None:
    rows = Rows(library, kind, 48, 352)
    x = np.random.default_rng(3).standard_normal((35, 352))
    clean = product(library, rows, x)
    x[4, 7], x[20, 351], x[33, 100] = np.nan, np.inf, -np.inf
    x[9] = 0
    x[10] = 1e-35  # too small to be told from nothing
    y = product(library, rows, x)
    bad = [4, 20, 33]
    assert np.isnan(y[bad]).all()
    assert rows.bias is not None
    np.testing.assert_array_equal(y[[9, 10]], np.stack([rows.bias, rows.bias]))
    good = [i for i in range(35) if i not in (*bad, 9, 10)]
    np.testing.assert_array_equal(y[good], clean[good])


def test_scales_of_groups_may_be_zero_tiny_or_not_finite(library: ctypes.CDLL) -> None:
    rows = Rows(library, INT4_GROUPS, 32, 512, bias=False)
    rows.scale[3] = 0
    rows.scale[4] = 6e-8  # the smallest number of float16
    rows.scale[5, :8] = 0
    rows.scale[6, 1:] = 6e-8
    x = np.random.default_rng(4).standard_normal((32, 512))
    y = product(library, rows, x)
    assert error(y, expected_with_zeros(rows, x)) < 1e-6
    assert (y[:, 3] == 0).all()
    rows.scale[20, 9], rows.scale[21, 3] = np.inf, np.nan
    y = product(library, rows, x)
    assert np.isnan(y[:, [20, 21]]).all()
    assert np.isfinite(np.delete(y, [20, 21], axis=1)).all()


def expected_with_zeros(rows: Rows, x: NDArray) -> Array:
    with np.errstate(invalid="ignore"):
        return rounded(x, RANGE) @ np.nan_to_num(rows.tile_numbers()).T


def test_dtypes_of_vectors(library: ctypes.CDLL) -> None:
    rows = Rows(library, INT4_GROUPS, 304, 352)
    x = np.random.default_rng(5).standard_normal((37, 352)).astype(np.float16)
    y = np.zeros((37, 304), np.float16)
    weight = rows.weight()
    assert library.glm_linear(ctypes.byref(weight), address(x), address(y), 37, 2, 2) == 0
    np.testing.assert_array_equal(y, product(library, rows, x.astype(np.float32)).astype(np.float16))


def test_a_refusal_means_vectors(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may forbid tiles. It is asked once, so this needs a library of its own."""
    monkeypatch.setenv(REFUSED, "1")
    other = ctypes.CDLL(str(shutil.copy(library._name, tmp_path / "refused.so")))
    rows = Rows(other, INT4_GROUPS, 32, 512, bias=False)
    x = np.random.default_rng(0).standard_normal((40, 512))
    assert error(product(other, rows, x), rounded(x, GROUP) @ rows.numbers().T) < 1e-6
    assert (library.glm_tiles(), other.glm_tiles()) == (1, 2)
    assert trial.main(library._name, ABI) is None
    assert trial.main(other._name, ABI) == "the system does not let programs use the CPU's tiles"


def test_what_rounding_costs(library: ctypes.CDLL) -> None:
    """The figures that amx.h states: of weights that are rounded twice, and of vectors in ranges."""
    random = np.random.default_rng(6)
    n, k = 256, 4096
    rows = Rows(library, INT4_GROUPS, 16, 32)
    x = random.standard_normal((64, k))
    for outlier, low, high in ((1.0, 0.006, 0.008), (10.0, 0.010, 0.016)):
        w = random.standard_normal((n, k))
        w *= np.where(random.random((n, k)) < 1 / 500, outlier, 1.0)
        groups = w.reshape(n, -1, GROUP)
        at = np.abs(groups).argmax(axis=2)[..., None]
        scale = (np.take_along_axis(groups, at, 2) / -8).astype(np.float16)
        rows.q = np.clip(np.rint(groups / scale), -8, 7).astype(np.int8).reshape(n, k)
        rows.scale, rows.n, rows.k = scale[..., 0], n, k
        stored = x @ rows.numbers().T
        assert low < error(x @ rows.tile_numbers().T, stored) < high
        assert error(stored, x @ w.T) > 5 * error(x @ rows.tile_numbers().T, stored)
        assert error(rounded(x, RANGE) @ rows.numbers().T, stored) < 0.008


# --- the real instructions ---


ONLY_TILES = """
#include "amx.h"
extern "C" bool available() { return glm::tiles_available(); }
extern "C" void multiply(const glm::Weight* w, const glm::Activations* a, float* y, int rows) {
    glm::tile_product(*w, *a, y, w->n, 0, rows);
}
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or shutil.which("objdump") is None, reason="needs x86 and objdump"
)
def test_the_real_instructions_are_there(tmp_path: Path) -> None:
    (tmp_path / "tiles.cpp").write_text(ONLY_TILES)
    flags = [f"-I{SOURCE.parent}", *compiler_flags("amx")]
    try:
        path = compiled(tmp_path / "tiles.so", tmp_path / "tiles.cpp", flags)
    except subprocess.CalledProcessError as failed:
        if b"unrecognized" in failed.stderr or b"no such instruction" in failed.stderr:
            pytest.skip("this compiler or assembler does not know tiles")
        raise
    listing = objdump("-d", "--no-show-raw-insn", str(path))
    names = ("tdpbssd", "tdpbsud", "tileloadd", "tilestored", "tilezero", "tilerelease", "xgetbv", "syscall")
    counts = {name: len(re.findall(rf"\b{name}\b", listing)) for name in names}
    assert all(counts.values()), counts
    assert "tdpbssd %tmm6,%tmm4,%tmm0" in listing  # weights, vectors, sums: the order of AT&T
    # The configuration is a constant: whatever the compiler does with stores, it is complete before it is loaded.
    places = re.findall(r"ldtilecfg .*\(%rip\)\s+# ([0-9a-f]+)", listing)
    assert len(places) == len(re.findall(r"\bldtilecfg\b", listing)) > 0
    memory = {
        int(address, 16) + i: byte
        for address, words in re.findall(
            r"^ ([0-9a-f]+) ((?:[0-9a-f]{2,8} ){1,4})", objdump("-s", str(path)), flags=re.M
        )
        for i, byte in enumerate(bytes.fromhex(words.replace(" ", "")))
    }
    layout = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])
    for place in places:
        assert int(place, 16) % 64 == 0
        assert bytes(memory[int(place, 16) + i] for i in range(64)) == layout
    # Where the CPU has no tiles the answer is no, not a fault.
    tiles = "amx_int8" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
    available = ctypes.CDLL(str(path)).available
    available.restype = ctypes.c_bool
    assert tiles or not available()


def objdump(*arguments: str) -> str:
    return subprocess.run(["objdump", *arguments], capture_output=True, text=True, check=True).stdout

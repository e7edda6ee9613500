"""Native products against float64, on every level that this CPU can run; blocks, and what must not crash."""

from __future__ import annotations

import copy
import ctypes
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glmkit.errors import KernelsError, UsageError
from glmkit.kernels import build, linear
from glmkit.kernels.levels import VARIABLE, possible_levels

GROUP = 32
TILE_VECTORS, TILE_GROUP = 32, 256  # so many vectors are multiplied in tiles where the CPU has them, in larger groups
# What float32 sums may be off by, of sum |w||x|: a thousand roundings of 6e-8 in a row that mostly cancel.
TIGHT = 1e-5
FLOAT_KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = ("int8", "int4", "int4-groups")
KINDS = (*FLOAT_KINDS, *QUANTISED)


@pytest.fixture(scope="module", params=possible_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        build._choose.cache_clear()
        try:
            assert build.level() == name
        except KernelsError as error:
            if build.find_compiler() is None:
                pytest.skip(error.message)
            raise
        yield name
    build._choose.cache_clear()


class Layer(nn.Module):
    """The tensors of a quantised layer as `glmkit.kernels.linear` expects them, and the matrix they stand for."""

    def __init__(self, rows: Tensor, scale: Tensor, bits: int, bias: Tensor | None, arena: linear.Arena) -> None:
        super().__init__()
        self.rows, self.row_scale, self.scale_dtype, self.bits = rows, scale, scale.dtype, bits
        packed = linear.pack(rows, scale, bits, arena)
        assert packed is not None
        self.weight, self.weight_scale = (nn.Parameter(tensor, requires_grad=False) for tensor in packed)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def matrix(self) -> Tensor:
        """(N, K) in float64, computed from the official rows by hand."""
        q = self.rows.to(torch.int32)
        if self.bits == 4:
            q = torch.stack((q >> 4, ((q & 15) ^ 8) - 8), dim=-1).flatten(1)
        scale = self.row_scale.double()
        wide = scale[:, None] if scale.ndim == 1 else scale.repeat_interleave(GROUP, dim=1)
        return q.double() * wide


def make_layer(kind: str, n: int, k: int, *, bias: bool = True, seed: int = 0) -> Layer:
    made = torch.Generator().manual_seed(seed)
    bits = 8 if kind == "int8" else 4
    rows = torch.randint(-128, 128, (n, k * bits // 8), generator=made, dtype=torch.int8)
    rows[0, 0], rows[-1, -1] = -128, 127  # of int4: -8 and 0, 7 and -1
    rows[n // 2] = -128 if bits == 8 else -120  # -8 and -8
    rows[n // 2 + 1] = 0
    shape = (n, k // GROUP) if kind == "int4-groups" else (n,)
    scale = (torch.rand(shape, generator=made) / 100 + 1e-4).half()
    return Layer(rows, scale, bits, torch.randn(n, generator=made) if bias else None, linear.Arena())


def made_weight(kind: str, n: int, k: int, *, bias: bool = True) -> tuple[linear.Weight, Tensor, Tensor]:
    """A weight, its matrix (N, K) and its bias (N,), both in float64."""
    if kind in QUANTISED:
        layer = make_layer(kind, n, k, bias=bias)
        own = torch.zeros(n).double() if layer.bias is None else layer.bias.double()
        return linear.weight_of(layer.weight, layer.weight_scale, layer.bias), layer.matrix(), own
    made = torch.Generator().manual_seed(1)
    matrix = (torch.randn(n, k, generator=made) / 10).to(FLOAT_KINDS[kind])
    own = torch.randn(n, generator=made)
    weight = linear.weight_of(matrix, None, own if bias else None)
    return weight, matrix.double(), own.double() if bias else torch.zeros(n).double()


def made_vectors(m: int, k: int, seed: int = 3) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


def on_tiles(m: int) -> bool:
    library = build.library()
    return library is not None and library.glm_tiles() == 1 and m >= TILE_VECTORS


def rounded(x: Tensor) -> Tensor:
    """The float64 values of x (M, K) in groups of columns: int8 times max|x| / 127, halves to the even number."""
    groups = x.float().split(TILE_GROUP if on_tiles(x.shape[0]) else GROUP, dim=1)
    return torch.cat([_rounded_group(group) for group in groups], dim=1)


def _rounded_group(x: Tensor) -> Tensor:
    largest = x.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(largest > 1e-30, 127 / largest, 0)
    return (x * inverse).round().double() * (largest / 127).double()


def expect_product(kind: str, y: Tensor, x: Tensor, matrix: Tensor, bias: Tensor) -> None:
    """Exact for what the native code multiplies; and within 1 % of the norm for what it was asked to multiply.

    Tiles round int4 with scales of groups once more, which tests/test_kernels_amx.py follows number by number.
    """
    again = kind == "int4-groups" and on_tiles(x.shape[0])
    seen = x.double() if kind in FLOAT_KINDS else rounded(x)
    size = seen.abs() @ matrix.abs().T + bias.abs()
    assert ((y.double() - (seen @ matrix.T + bias)).abs() <= (0.01 if again else TIGHT) * size + 1e-30).all()
    exact = x.double() @ matrix.T
    assert (y.double() - bias - exact).norm() <= (0.015 if again else 0.01) * exact.norm()


# --- products ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 12, 13, 31, 64, 200])
def test_products_of_any_number_of_vectors(level: str, kind: str, m: int) -> None:
    weight, matrix, bias = made_weight(kind, 48, 64)
    x = made_vectors(m, 64)
    expect_product(kind, linear.multiply(weight, x), x, matrix, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k", "m"), [(16, 32, 1), (16, 32, 13), (48, 96, 7), (4608, 32, 3), (16, 13696, 2)])
def test_products_of_any_size(level: str, kind: str, n: int, k: int, m: int) -> None:
    weight, matrix, bias = made_weight(kind, n, k, bias=False)
    x = made_vectors(m, k)
    expect_product(kind, linear.multiply(weight, x), x, matrix, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_large(level: str, kind: str) -> None:
    weight, matrix, bias = made_weight(kind, 256, 4096)
    x = made_vectors(33, 4096)
    expect_product(kind, linear.multiply(weight, x), x, matrix, bias)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 33), (5, 31), (130, 70)])
@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_float_matrices_have_any_size(level: str, kind: str, n: int, k: int) -> None:
    weight, matrix, bias = made_weight(kind, n, k)
    for m in (1, 6):
        x = made_vectors(m, k)
        expect_product(kind, linear.multiply(weight, x), x, matrix, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_float32_rounded_once(level: str, kind: str, dtype: torch.dtype) -> None:
    weight, _, _ = made_weight(kind, 80, 64)
    for m in (1, 3, 21):
        x = made_vectors(m, 64).to(dtype)
        y = linear.multiply(weight, x)
        assert y.dtype == dtype
        assert torch.equal(y, linear.multiply(weight, x.float()).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_those_beside_it(level: str, kind: str) -> None:
    weight, _, _ = made_weight(kind, 64, 320)
    x = made_vectors(192, 320)

    def in_parts_of(m: int) -> Tensor:
        return torch.cat([linear.multiply(weight, part) for part in x.split(m)])

    few, many = in_parts_of(1), in_parts_of(192)
    for m in (2, 3, 7, 8, 12, 16, 31):
        assert torch.equal(in_parts_of(m), few), m
    for m in (32, 64, 96):
        assert torch.equal(in_parts_of(m), many), m
    if not on_tiles(192) or kind in FLOAT_KINDS:
        assert torch.equal(few, many)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_and_strides(level: str, kind: str) -> None:
    weight, _, _ = made_weight(kind, 48, 64)
    x = made_vectors(12, 64)
    y = linear.multiply(weight, x)
    assert torch.equal(linear.multiply(weight, x.view(2, 3, 2, 64)), y.view(2, 3, 2, 48))
    assert torch.equal(linear.multiply(weight, x[3]), y[3])
    assert torch.equal(linear.multiply(weight, x.T.contiguous().T), y)
    assert linear.multiply(weight, x[:0]).shape == (0, 48)
    assert linear.multiply(weight, x.view(4, 3, 64)[:, :0]).shape == (4, 0, 48)


# --- numbers at the edge ---


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_negative_zeros_and_denormals(level: str, kind: str) -> None:
    weight, matrix, bias = made_weight(kind, 32, 64)
    for value in (0.0, -0.0, 1e-42, -1e-38):
        x = torch.full((5, 64), value)
        assert torch.equal(linear.multiply(weight, x), bias.float().expand(5, -1)), value
    x = made_vectors(5, 64)
    x[1, :GROUP], x[2], x[3, 7] = 0.0, 0.0, -0.0
    expect_product(kind, linear.multiply(weight, x), x, matrix, bias)


@pytest.mark.parametrize("kind", QUANTISED)
def test_an_outlier_spoils_its_own_group_only(level: str, kind: str) -> None:
    weight, matrix, _ = made_weight(kind, 32, 128, bias=False)
    x = made_vectors(4, 128)
    x[:, 5] = 1e6
    y = linear.multiply(weight, x).double()
    seen = rounded(x)
    assert ((y - seen @ matrix.T).abs() <= TIGHT * (seen.abs() @ matrix.abs().T)).all()
    rest = x.double()
    rest[:, :GROUP] = 0
    # Rounding 96 numbers of size 1 moves a product by about 1 / 254 / sqrt(3) of its norm; the outlier, 1e6 times as
    # large, would have made nothing of them.
    others = linear.multiply(weight, rest.float()).double() - rest @ matrix.T
    assert others.norm() <= 0.01 * (rest @ matrix.T).norm()


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_largest_numbers_of_a_byte_do_not_overflow(level: str, kind: str) -> None:
    n, k = 32, 4096
    bits = 8 if kind == "int8" else 4
    rows = torch.full((n, k * bits // 8), -128 if bits == 8 else -120, dtype=torch.int8)
    rows[::2] = 127 if bits == 8 else 0x77
    shape = (n, k // GROUP) if kind == "int4-groups" else (n,)
    layer = Layer(rows, torch.full(shape, 0.5).half(), bits, None, linear.Arena())
    x = torch.full((9, k), 3.0)
    x[1::2] = -3.0
    y = linear.product(layer, x)
    assert torch.allclose(y.double(), x.double() @ layer.matrix().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("m", [13, 40])
def test_what_is_not_finite_spoils_its_own_vector_only(level: str, kind: str, bad: float, m: int) -> None:
    weight, matrix, _ = made_weight(kind, 48, 64)
    x = made_vectors(m, 64)
    good = linear.multiply(weight, x)
    for row, column in ((0, 0), (4, 40), (m - 1, 63)):
        spoilt = x.clone()
        spoilt[row, column] = bad
        y = linear.multiply(weight, spoilt)
        touched = matrix[:, column] != 0 if kind in FLOAT_KINDS else torch.ones(48, dtype=torch.bool)
        assert not y[row][touched].isfinite().any()
        others = [i for i in range(m) if i != row]
        assert torch.equal(y[others], good[others])


# --- memory ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_beside_the_result_and_any_address_will_do(
    level: str, kind: str, dtype: torch.dtype
) -> None:
    native = build.library()
    assert native is not None
    n, k = 48, 64
    weight, _, _ = made_weight(kind, n, k)
    code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
    for m in (1, 3, 14, 33):
        x = made_vectors(m, k).to(dtype)
        expected = linear.multiply(weight, x)
        for shift in (1, 3):  # numbers, not aligned to anything else
            held = torch.zeros(m * k + 8, dtype=dtype)
            held[shift : shift + m * k] = x.flatten()
            result = torch.full((m * n + 64,), 7.0, dtype=dtype)
            start = 32 + shift
            address = result.data_ptr() + start * dtype.itemsize
            failed = native.glm_linear(
                ctypes.byref(weight), held.data_ptr() + shift * dtype.itemsize, address, m, code, 2
            )
            assert failed == 0
            assert torch.equal(result[start : start + m * n].view(m, n), expected)
            assert (result[:start] == 7).all()
            assert (result[start + m * n :] == 7).all()


def test_several_threads_at_once_get_the_same(level: str) -> None:
    layers = [make_layer(kind, 64, 256) for kind in QUANTISED]
    x = made_vectors(20, 256)
    expected = [linear.product(layer, x) for layer in layers]
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(30):
                for layer, right in zip(layers, expected):
                    if not torch.equal(linear.product(layer, x), right):
                        wrong.append("another result")
        except Exception as error:  # a thread's exception would be lost
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_number_of_threads_does_not_change_the_result(level: str) -> None:
    native = build.library()
    assert native is not None
    for kind in KINDS:
        weight, _, _ = made_weight(kind, 160, 64)
        x = made_vectors(9, 64)
        results = []
        for threads in (1, 2, 5):
            y = torch.zeros(9, 160)
            assert native.glm_linear(ctypes.byref(weight), x.data_ptr(), y.data_ptr(), 9, 0, threads) == 0
            results.append(y)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is loaded")
def test_torch_and_the_kernels_share_one_openmp(level: str) -> None:
    native, bundled = build.library(), Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    assert native is not None
    if not build.status().openmp or not bundled.exists():
        pytest.skip("torch brings no libgomp, or the compiler has none")
    address = ctypes.cast(native.omp_get_max_threads, ctypes.c_void_p).value  # looked up as the library does it
    assert address is not None
    (path,) = (
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
    )
    assert Path(path).samefile(bundled)


def test_an_arena_has_aligned_pieces_and_grows() -> None:
    arena = linear.Arena(1000)
    first, second = arena.tensor((3, 5), torch.float32), arena.tensor((7,), torch.uint8)
    large = arena.tensor((70 << 20,), torch.uint8)
    assert first.data_ptr() % (2 << 20) == 0
    assert second.data_ptr() == first.data_ptr() + 64
    assert large.data_ptr() % 64 == 0
    assert (first.shape, second.dtype, first.sum(), second.sum()) == ((3, 5), torch.uint8, 0, 0)
    large[-1] = 1
    first.fill_(2)
    assert second.sum() == 0
    assert arena.tensor((0, 4), torch.float16).shape == (0, 4)


def test_memory_of_an_arena_outlives_it_as_long_as_a_tensor_uses_it() -> None:
    arena = linear.Arena()
    piece = arena.tensor((1 << 20,), torch.float32)
    kept = piece.fill_(3)[5:10]
    gone = weakref.ref(arena)
    del arena, piece
    assert gone() is None
    assert kept.tolist() == [3.0] * 5
    rss = resident_bytes()
    large = linear.Arena().tensor((200 << 20,), torch.uint8).fill_(1)
    assert resident_bytes() - rss > 150 << 20
    del large
    assert resident_bytes() - rss < 50 << 20


def resident_bytes() -> int:
    path = Path("/proc/self/statm")
    if not path.exists():
        pytest.skip("only Linux says how much memory is used")
    return int(path.read_text().split()[1]) * 4096


# --- blocks ---


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 96), (32, 13696)])
def test_blocks_give_the_rows_back_bit_for_bit(level: str, kind: str, n: int, k: int) -> None:
    layer = make_layer(kind, n, k)
    rows, scale = linear.unpack(layer)
    assert torch.equal(rows, layer.rows)
    assert torch.equal(scale, layer.row_scale)
    assert scale.dtype == torch.float16
    assert layer.weight.nbytes == layer.rows.nbytes
    group = GROUP if kind == "int4-groups" else None
    assert linear.packed_bytes(n, k, layer.bits, group) >= layer.weight.nbytes + layer.weight_scale.nbytes


def test_where_each_number_of_a_block_lies(level: str) -> None:
    rows = torch.arange(-512, 512).view(16, 64).mul(37).to(torch.int8)
    blocks, _ = linear.pack(rows, torch.ones(16), 8, linear.Arena())  # type: ignore[misc]
    for r, column in ((0, 0), (3, 5), (15, 31), (7, 32), (15, 63)):
        c, j = column % 32 // 4, column % 4
        assert int(blocks[0, column // 32, 64 * c + 4 * r + j]) == int(rows[r, column]) + 128
    q = torch.arange(16 * 64).view(16, 64).mul(7) % 16 - 8
    packed = ((q[:, 0::2] << 4) | (q[:, 1::2] & 15)).to(torch.int8)
    blocks, _ = linear.pack(packed, torch.ones(16), 4, linear.Arena())  # type: ignore[misc]
    for r, column in ((0, 0), (3, 5), (15, 31), (7, 32), (15, 63)):
        c, j, high = column % 32 // 8, column % 4, column % 8 >= 4
        byte = int(blocks[0, column // 32, 64 * c + 4 * r + j])
        assert (byte >> 4 if high else byte & 15) == int(q[r, column]) + 8


def test_scales_in_bfloat16_or_float32(level: str) -> None:
    rows = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    scale = (torch.rand(16) + 0.1).bfloat16()
    layer = Layer(rows, scale, 8, None, linear.Arena())
    assert torch.equal(linear.unpack(layer)[1], scale)
    # 2 ** -30 and 1e6 have no float16, and 1 + 2 ** -20 is cut; a layer with such a group stays with torch.
    for value in (2.0**-30, 1e6, 1 + 2.0**-20, float("nan")):
        scale = torch.full((16, 2), 0.5)
        scale[3, 1] = value
        assert linear.pack(rows, scale, 4, linear.Arena()) is None
    scale[3, 1] = 2.0**-20  # a denormal that float16 has
    layer = Layer(rows, scale, 4, None, linear.Arena())
    assert torch.equal(linear.unpack(layer)[1], scale)
    x = made_vectors(2, 64)
    assert (linear.product(layer, x).double() - rounded(x) @ layer.matrix().T).abs().max() < 1e-4


def test_a_layer_follows_its_tensors(level: str) -> None:
    layer, other = make_layer("int8", 32, 64), make_layer("int8", 32, 64, seed=9)
    x = made_vectors(2, 64)
    before = linear.product(layer, x)
    with torch.no_grad():
        layer.bias += 1  # type: ignore[operator]
    assert torch.allclose(linear.product(layer, x), before + 1, atol=1e-5)
    layer.bias = nn.Parameter(other.bias.detach().bfloat16(), requires_grad=False)  # type: ignore[union-attr]
    layer.weight, layer.weight_scale = other.weight, other.weight_scale
    expected = linear.multiply(linear.weight_of(other.weight, other.weight_scale, layer.bias), x)
    assert torch.equal(linear.product(layer, x), expected)
    layer.bias = None
    assert torch.allclose(linear.product(layer, x), expected - layer_bias(other), atol=1e-2)
    duplicate = copy.deepcopy(layer)
    del layer
    assert torch.equal(
        linear.product(duplicate, x), linear.multiply(linear.weight_of(other.weight, other.weight_scale), x)
    )


def test_a_layer_made_in_inference_mode(level: str) -> None:
    with torch.inference_mode():
        layer = make_layer("int4-groups", 32, 64)
        y = linear.product(layer, made_vectors(2, 64))
    assert torch.equal(linear.product(layer, made_vectors(2, 64)), y)


def layer_bias(layer: Layer) -> Tensor:
    assert layer.bias is not None
    return layer.bias.detach()


# --- what does not fit ---


@pytest.mark.parametrize(
    ("n", "k", "bits", "group", "expected"),
    [
        (16, 32, 8, None, True),
        (4608, 4096, 4, None, True),
        (16, 64, 4, 32, True),
        (16, 64, 8, 32, False),
        (16, 64, 4, 64, False),
        (24, 64, 4, None, False),
        (16, 48, 8, None, False),
        (0, 32, 8, None, False),
        (16, 32, 3, None, False),
    ],
)
def test_which_sizes_fit(n: int, k: int, bits: int, group: int | None, expected: bool) -> None:
    assert linear.fits(n, k, bits, group) is expected


def test_wrong_tensors_are_refused_in_python(level: str) -> None:
    arena, rows, scale = linear.Arena(), torch.zeros(16, 32, dtype=torch.int8), torch.ones(16)
    for bad in (
        (rows.to(torch.uint8), scale, 8),
        (rows.float(), scale, 8),
        (rows, scale[:15], 8),
        (rows, torch.ones(16, 1, 1), 8),
        (rows, torch.ones(16, 1), 8),
        (rows[:15], scale[:15], 8),
        (rows[:, :16], scale, 8),
        (rows[0], scale, 8),
        (rows.to("meta"), scale, 8),
        (rows, scale.to(torch.int32), 8),
    ):
        with pytest.raises(UsageError, match="no blocks can be made"):
            linear.pack(*bad, arena)
    layer = make_layer("int4", 16, 32)
    for weight in (
        (layer.weight, None, None),
        (layer.weight, layer.weight_scale.half(), None),
        (layer.weight, layer.weight_scale[:8], None),
        (layer.weight, layer.weight_scale, torch.ones(17)),
        (torch.ones(4, 4), torch.ones(4), None),
        (torch.ones(4, 4).T[:2], None, None),
        (torch.ones(4, 4, dtype=torch.float64), None, None),
        (torch.ones(2, 4, 4), None, None),
    ):
        with pytest.raises(UsageError, match="takes no weight like this"):
            linear.weight_of(*weight)
    for x in (
        torch.ones(3, 31),
        torch.ones(3, 64),
        torch.tensor(1.0),
        torch.ones(3, 32, dtype=torch.float64),
        torch.ones(3, 32, dtype=torch.int8),
        torch.ones(3, 32, device="meta"),
    ):
        with pytest.raises(UsageError, match=r"expected \(\.\.\., 32\)"):
            linear.product(layer, x)
    layer.weight = nn.Parameter(torch.ones(4, 32), requires_grad=False)
    layer.weight_scale = None  # type: ignore[assignment]
    with pytest.raises((UsageError, AttributeError)):
        linear.unpack(layer)

// Many vectors times quantised rows, on the CPU's tiles (Intel AMX): the same weights as in linear.h, and eight times the
// products a cycle that vectors give. Prompts and large batches come here.
//
// A tile is a register of 16 rows of 64 bytes. One instruction multiplies 16 vectors by 64 columns of 16 weight rows:
//
//     A  16 vectors x 64 columns, int8        B  64 columns x 16 weight rows, four columns of a row side by side
//     C  16 vectors x 16 weight rows, int32   C += A B;   2 x 2 tiles of C, 2 of A and 2 of B are all eight that there are
//
// Two blocks of int8 weights (linear.h) are a tile B as they lie in memory, so they are never touched; the instruction
// for unsigned weights takes their plus 128 along, and 128 times the sum of the vector's numbers is taken off again.
// Int4 weights are unpacked for 256 rows x 512 columns at a time, which then stay in the cache while the vectors pass:
//
//     for 256 weight rows, for 512 vectors:
//         for 512 columns (a slab):           unpack the weights                       128 KiB, second level
//             for 32 weight rows:                                                       16 KiB, first level
//                 for 32 vectors:             2 x 2 tiles over 256 columns, twice       16 KiB, from the second level
//                     int32 -> float32, times the scales, added to the sums            512 KiB, second level
//
// Numbers. Vectors are rounded to int8 in ranges of 256 columns with a scale each, so an outlier spoils its range only
// (linear.h: 32 columns). Scales of groups of 32 weights cannot be applied within a tile, so such weights are rounded
// once more, to int8 with one scale for a row's range: the largest group's int4 step is then 127 / 8 = 15.9 steps of
// int8. What that adds, as a share of the product with the weights as they are stored: 0.7 % for normal weights, 1.3 %
// where one weight of 500 is ten times larger; rounding normal weights to int4 itself costs 8 % (tests/test_kernels_amx.py
// measures both). What a vector gives does not depend on the others beside it, nor on the number of threads.
//
// From how many vectors on it pays: a weight takes about 0.10 cycles to come from memory, 0.07 to be unpacked, and m / 128
// to be multiplied on vectors at their best, against m / 1024 on tiles, which count in sixteens. Tiles win from some 16
// vectors on. They are used from 32: steps that check drafts, and small batches, then give the very numbers of single steps.
//
// The instructions have been modelled (tests/emulated_tiles.h), not run: no CPU with tiles was at hand.

#pragma once

#include "linear.h"

#if defined(__AMX_INT8__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(GLM_EMULATE_TILES)
#include "emulated_tiles.h"  // a model of the instructions, for tests on other CPUs
#endif

namespace glm {

constexpr int kSide = 16;               // rows of a tile, and columns of a tile of int32
constexpr int kTileColumns = 64;        // int8 columns of a tile
constexpr int kTileBytes = kSide * kTileColumns;
constexpr int kRange = 256;             // columns with one scale
constexpr int kSlab = 2 * kRange;       // columns of weights that are unpacked at a time
constexpr int kStripeBlocks = 16;       // blocks of 16 rows that are unpacked at a time
constexpr int kVectorsAtOnce = 512;     // whose float32 sums stay in the cache
constexpr int kSlabTiles = kSlab / kTileColumns;
constexpr int kSlabRanges = kSlab / kRange;

#if defined(__AMX_INT8__) || defined(GLM_EMULATE_TILES)

// The layout of the eight tile registers, as the instruction reads it: sixteen rows of 64 bytes each. It is a constant on
// purpose: gcc 12 drops what is stored to a local one before its own intrinsic loads it.
struct TileConfiguration {
    uint8_t palette = 1, start_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64, "the instruction reads 64 bytes");
alignas(64) constexpr TileConfiguration kTileConfiguration;

#if !defined(GLM_EMULATE_TILES)

// The instructions. Not the compiler's intrinsics: gcc's do not say that a tile is loaded from memory, so that stores to
// it may move behind, and want register numbers as literals.
namespace amx {

inline void configure(const TileConfiguration& layout) { asm volatile("ldtilecfg %0" ::"m"(layout) : "memory"); }
inline void release() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void load(const void* from, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store(void* to, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// C += A B with signed numbers in A, and unsigned or signed ones in B.
template <bool kUnsigned, int kC, int kA, int kB>
inline void dot() {
    if constexpr (kUnsigned) {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    } else {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
}

// C += A B with bfloat16 in both, in pairs: two columns of A, two rows of B side by side.
template <int kC, int kA, int kB>
inline void dot_bfloat16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// The CPU has tiles of int8 and bfloat16, the system saves them, and this process may use them: Linux wants to be asked once.
inline bool permitted() {
#if defined(__linux__)
    constexpr unsigned kSavesExtended = 1u << 27, kHasTiles = 1u << 22 | 1u << 24 | 1u << 25, kSavesTiles = 1u << 17 | 1u << 18;
    constexpr long kRequest = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    unsigned a, b, c, d, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavesExtended)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kHasTiles) != kHasTiles) return false;
    asm volatile("xgetbv" : "=a"(a), "=d"(high) : "c"(0));
    return (a & kSavesTiles) == kSavesTiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace amx

#endif

// Hidden, or libraries of several builds in one process would share the answer, and the memory below.
[[gnu::visibility("hidden")]] inline bool tiles_available() {
    static const bool available = amx::permitted();
    return available;
}

struct TileScratch {
    alignas(64) uint8_t weights[kStripeBlocks][kSlabTiles][kTileBytes];
    alignas(64) float scale[kStripeBlocks][kSlabRanges][kSide];  // of weights that were rounded again
    alignas(64) int32_t products[2][2][kSide][kSide];
    alignas(64) float sums[kStripeBlocks / 2][kVectorsAtOnce][2 * kSide];
};

inline void store_bytes(int8_t* to, const Ints& x) {
    typedef int8_t Narrow __attribute__((vector_size(kNativeBytes / 4)));
    for (int p = 0; p < kParts; ++p) {
        const Narrow bytes = __builtin_convertvector(x.part[p], Narrow);
        std::memcpy(to + p * sizeof bytes, &bytes, sizeof bytes);
    }
}

// Rounded vectors lie in tiles, slab after slab:  q [slab][m/16][tile of the slab][16 vectors][64 columns];
// scale and offset [range][vector]. This is the first tile of a slab of 16 vectors.
inline int slab_tiles(int k, int slab) { return std::min(kSlabTiles, (k + kTileColumns - 1) / kTileColumns - slab * kSlabTiles); }
inline int8_t* vector_tiles(const Activations& a, int slab, int vector) {
    const size_t whole = static_cast<size_t>(slab) * kSlabTiles * tile_rows(a.m);
    return a.q + (whole + static_cast<size_t>(vector / kSide) * slab_tiles(a.k, slab)) * kTileBytes;
}

// Rounds one range of vector number `row` of `a`; `x` is where the range begins. A number that is not finite makes the
// range's scale NaN, and so the result.
inline void round_tile_range(const Activations& a, int row, int range, const float* x) {
    const int start = range * kRange, width = std::min(kRange, a.k - start);
    Floats sizes = spread(0.0f), bad = spread(0.0f);
    for (int c = 0; c < width; c += kLanes) {
        const Floats part = load(x + c);
        sizes = larger(absolute(part), sizes);
        bad = fused(part, spread(0.0f), bad);  // 0, or NaN
    }
    const float size = largest(sizes);
    const bool tiny = !(size > 1e-30f);
    const Floats inverse = spread(tiny ? 0.0f : 127.0f / size);
    int8_t* to = vector_tiles(a, start / kSlab, row) + start % kSlab / kTileColumns * kTileBytes + row % kSide * kTileColumns;
    Ints totals = spread(0);
    for (int c = 0; c < width; c += kLanes) {
        const Ints values = nearest(load(x + c) * inverse);
        store_bytes(to + c / kTileColumns * kTileBytes + c % kTileColumns, values);
        totals = totals + values;
    }
    if (width % kTileColumns) std::memset(to + width / kTileColumns * kTileBytes + kGroup, 0, kGroup);
    int32_t total[kLanes];
    store(total, totals);
    uint32_t all = 0;  // what is not finite is rounded to anything
    for (int i = 0; i < kLanes; ++i) all += static_cast<uint32_t>(total[i]);
    const size_t at = static_cast<size_t>(range) * tile_rows(a.m) * kSide + row;
    a.scale[at] = (tiny ? 0.0f : size / 127.0f) + sum(bad);
    a.offset[at] = static_cast<int32_t>(all * -128u);
}

typedef uint16_t Words __attribute__((vector_size(64), may_alias));
typedef int8_t SignedBytes __attribute__((vector_size(64), may_alias));

// Int4 blocks with one scale a row: the numbers as they are.
inline void unpack_rows(const uint8_t* block, int groups, uint8_t* to) {
    for (int chunk = 0; chunk < groups * 4; ++chunk, block += 64, to += 128) {
        Words both;
        std::memcpy(&both, block, sizeof both);
        const Words low = both & 0x0f0f, high = (both >> 4) & 0x0f0f;
        const SignedBytes first = reinterpret_cast<const SignedBytes&>(low) - 8;
        const SignedBytes second = reinterpret_cast<const SignedBytes&>(high) - 8;
        std::memcpy(to, &first, 64);
        std::memcpy(to + 64, &second, 64);
    }
}

// Two bytes of every word: (nibble - 8) * factor / 256, rounded. `even` and `odd` hold a nibble in each word.
inline void store_scaled(uint8_t* to, const Words& even, const Words& odd, const Words& factor, const Words& start) {
    const Words bytes = ((even * factor + start) >> 8) | ((odd * factor + start) & 0xff00);
    std::memcpy(to, &bytes, 64);
}

// Int4 blocks with a scale for each group: rounded to int8, with one scale for all groups given here.
inline void unpack_groups(const uint8_t* block, const uint16_t* group_scale, int groups, uint8_t* to, float* scale) {
    Floats sizes = spread(0.0f), bad = spread(0.0f);
    for (int g = 0; g < groups; ++g) {
        const Floats one = load_float16(group_scale + g * kBlockRows);
        sizes = larger(absolute(one), sizes);
        bad = fused(one, spread(0.0f), bad);
    }
    store(scale, fused(sizes, spread(8.0f / 127.0f), bad));
    // 8 int4 steps of the largest group are 127; 256 times that still fits 16 bits. Where all are zero the factor is, too.
    const Floats inverse = spread(127.0f / 8.0f * 256.0f) / larger(sizes, spread(1e-30f));
    for (int g = 0; g < groups; ++g) {
        const Ints factors = nearest(load_float16(group_scale + g * kBlockRows) * inverse);
        int32_t pairs[kLanes];
        store(pairs, factors);
        for (int i = 0; i < kLanes; ++i) pairs[i] = static_cast<int32_t>((static_cast<uint32_t>(pairs[i]) & 0xffffu) * 0x10001u);
        Words factor, both;
        std::memcpy(&factor, pairs, sizeof factor);
        const Words start = 128 - 8 * factor;
        for (int chunk = 0; chunk < 4; ++chunk, block += 64, to += 128) {
            std::memcpy(&both, block, sizeof both);
            store_scaled(to, both & 15, (both >> 8) & 15, factor, start);
            store_scaled(to + 64, (both >> 4) & 15, both >> 12, factor, start);
        }
    }
}

// One block row's weights of a slab, as tiles that lie one after another.
template <int kKind>
const uint8_t* weight_tiles(const Weight& w, int block, int slab, TileScratch& scratch, int place) {
    constexpr size_t kBytes = kKind == kInt8 ? 512 : 256;
    const size_t all = w.k / kGroup, first = static_cast<size_t>(slab) * (kSlab / kGroup), at = block * all + first;
    const int groups = static_cast<int>(std::min<size_t>(kSlab / kGroup, all - first));
    const uint8_t* from = static_cast<const uint8_t*>(w.data) + at * kBytes;
    uint8_t* to = scratch.weights[place][0];
    if constexpr (kKind == kInt8) {
        if (groups % 2 == 0) return from;
        std::memcpy(to, from, groups * kBytes);  // half a tile is missing; what stands there is multiplied by zeros
    } else if constexpr (kKind == kInt4) {
        unpack_rows(from, groups, to);
    } else {
        constexpr int kRangeGroups = kRange / kGroup;
        const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + at * kBlockRows;
        for (int g = 0, range = 0; g < groups; g += kRangeGroups, ++range) {
            unpack_groups(from + g * kBytes, scale + g * kBlockRows, std::min(kRangeGroups, groups - g), to + g * kGroup * kSide,
                          scratch.scale[place][range]);
        }
    }
    return to;
}

// kRows x kColumns tiles of products over `count` tiles of columns: of vectors at `a`, and `step` bytes on, with weights.
template <bool kUnsigned, int kRows, int kColumns>
inline void multiply_tiles(const int8_t* a, size_t step, const uint8_t* const* weights, int count, TileScratch& scratch) {
    amx::zero<0>();
    if constexpr (kColumns == 2) amx::zero<1>();
    if constexpr (kRows == 2) amx::zero<2>();
    if constexpr (kRows == 2 && kColumns == 2) amx::zero<3>();
    for (int t = 0; t < count; ++t) {
        const size_t at = static_cast<size_t>(t) * kTileBytes;
        amx::load<4>(a + at, kTileColumns);
        amx::load<6>(weights[0] + at, kTileColumns);
        amx::dot<kUnsigned, 0, 4, 6>();
        if constexpr (kColumns == 2) amx::load<7>(weights[1] + at, kTileColumns);
        if constexpr (kColumns == 2) amx::dot<kUnsigned, 1, 4, 7>();
        if constexpr (kRows == 2) amx::load<5>(a + step + at, kTileColumns);
        if constexpr (kRows == 2) amx::dot<kUnsigned, 2, 5, 6>();
        if constexpr (kRows == 2 && kColumns == 2) amx::dot<kUnsigned, 3, 5, 7>();
    }
    constexpr size_t kStride = kSide * sizeof(int32_t);
    amx::store<0>(scratch.products[0][0], kStride);
    if constexpr (kColumns == 2) amx::store<1>(scratch.products[0][1], kStride);
    if constexpr (kRows == 2) amx::store<2>(scratch.products[1][0], kStride);
    if constexpr (kRows == 2 && kColumns == 2) amx::store<3>(scratch.products[1][1], kStride);
}

// Where tiles of products go: 32 vectors from number `vector` on, fewer at the end, and block rows `place` and the next of
// the stripe; `sums` are those of the first vector.
struct TilePlace {
    int vector, vectors, range, place;
    float* sums;
};

// Adds the products over a range to the sums. It takes as long as a third of the products, so it is kept short.
template <int kKind, int kRows, int kColumns>
inline void add_products(const Activations& a, const TilePlace& to, TileScratch& scratch) {
    const size_t at = static_cast<size_t>(to.range) * tile_rows(a.m) * kSide + to.vector;
    Floats own[kColumns];
    for (int j = 0; j < kColumns; ++j) own[j] = load(scratch.scale[to.place + j][to.range % kSlabRanges]);
    for (int row = 0; row < kRows; ++row) {
        const float* scale = a.scale + at + row * kSide;
        const int32_t* offset = a.offset + at + row * kSide;
        float* sums = to.sums + row * kSide * 2 * kSide;
        const int32_t(*products)[kSide][kSide] = scratch.products[row];
        const int vectors = std::min(to.vectors - row * kSide, kSide);
        for (int i = 0; i < vectors; ++i, sums += 2 * kSide) {
            const Floats factor = spread(scale[i]);
#pragma GCC unroll 2
            for (int j = 0; j < kColumns; ++j) {
                Ints product = load_ints(products[j][i]);
                if constexpr (kKind == kInt8) product = product + spread(offset[i]);
                Floats value = to_floats(product);
                if constexpr (kKind == kInt4Groups) value = value * own[j];
                store(sums + j * kSide, fused(value, factor, load(sums + j * kSide)));
            }
        }
    }
}

// The products of a slab's ranges with 32 vectors and two block rows.
template <int kKind, int kRows, int kColumns>
void tile_slab(const Activations& a, int slab, TilePlace to, const uint8_t* const* weights, TileScratch& scratch) {
    constexpr int kRangeTiles = kRange / kTileColumns;
    const int tiles = slab_tiles(a.k, slab);
    const int8_t* from = vector_tiles(a, slab, to.vector);
    for (int t = 0; t < tiles; t += kRangeTiles) {
        const size_t skip = static_cast<size_t>(t) * kTileBytes;
        const uint8_t* here[2] = {weights[0] + skip, kColumns == 2 ? weights[1] + skip : nullptr};
        multiply_tiles<kKind == kInt8, kRows, kColumns>(from + skip, static_cast<size_t>(tiles) * kTileBytes, here,
                                                        std::min(tiles - t, kRangeTiles), scratch);
        to.range = slab * kSlabRanges + t / kRangeTiles;
        add_products<kKind, kRows, kColumns>(a, to, scratch);
    }
}

// Up to 512 vectors from number `start` on times the block rows first..last, at most 16 of them.
template <int kKind>
void tile_stripe(const Weight& w, const Activations& a, int start, int first, int last, float* y, size_t ldy, TileScratch& scratch) {
    const int vectors = std::min(a.m - start, kVectorsAtOnce), count = last - first;
    for (int place = 0; place < count; place += 2) std::memset(scratch.sums[place / 2], 0, sizeof scratch.sums[0][0] * vectors);
    for (int slab = 0; slab * kSlab < a.k; ++slab) {
        const uint8_t* weights[kStripeBlocks];
        for (int place = 0; place < count; ++place) weights[place] = weight_tiles<kKind>(w, first + place, slab, scratch, place);
        for (int place = 0; place < count; place += 2) {
            for (int at = 0; at < vectors; at += 2 * kSide) {
                const TilePlace to{start + at, std::min(vectors - at, 2 * kSide), 0, place, scratch.sums[place / 2][at]};
                const bool two_rows = to.vectors > kSide, two_columns = count - place > 1;
                if (two_rows && two_columns) tile_slab<kKind, 2, 2>(a, slab, to, weights + place, scratch);
                if (two_rows && !two_columns) tile_slab<kKind, 2, 1>(a, slab, to, weights + place, scratch);
                if (!two_rows && two_columns) tile_slab<kKind, 1, 2>(a, slab, to, weights + place, scratch);
                if (!two_rows && !two_columns) tile_slab<kKind, 1, 1>(a, slab, to, weights + place, scratch);
            }
        }
    }
    for (int place = 0; place < count; ++place) {
        const size_t column = static_cast<size_t>(first + place) * kBlockRows;
        const Floats scale = kKind == kInt4Groups ? spread(1.0f) : load(static_cast<const float*>(w.scale) + column);
        const Floats bias = w.bias ? load(w.bias + column) : spread(0.0f);
        for (int i = 0; i < vectors; ++i) {
            const Floats total = load(scratch.sums[place / 2][i] + place % 2 * kSide);
            store(y + static_cast<size_t>(start + i) * ldy + column, fused(total, scale, bias));
        }
    }
}

// Each thread's memory, kept from call to call. A function apart, or its address is looked up for every tile.
[[gnu::visibility("hidden"), gnu::noinline]] inline TileScratch& tile_scratch() {
    static thread_local TileScratch scratch;
    return scratch;
}

// `product` of linear.h for vectors that were rounded by `round_tile_range`.
inline void tile_product(const Weight& w, const Activations& a, float* y, size_t ldy, int first_block, int last_block) {
    TileScratch& scratch = tile_scratch();
    amx::configure(kTileConfiguration);
    for (int first = first_block; first < last_block; first += kStripeBlocks) {
        const int last = std::min(first + kStripeBlocks, last_block);
        for (int start = 0; start < a.m; start += kVectorsAtOnce) {
            if (w.kind == kInt8) tile_stripe<kInt8>(w, a, start, first, last, y, ldy, scratch);
            if (w.kind == kInt4) tile_stripe<kInt4>(w, a, start, first, last, y, ldy, scratch);
            if (w.kind == kInt4Groups) tile_stripe<kInt4Groups>(w, a, start, first, last, y, ldy, scratch);
        }
    }
    amx::release();
}

#endif

}  // namespace glm

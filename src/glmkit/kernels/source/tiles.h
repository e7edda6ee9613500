// Products of bfloat16 in tiles of 16 rows, 16 columns and 32 products each, added up in float32: the form that AMX has,
// and that AVX-512 with bfloat16 can follow. GLM_TILES is defined where there are such.
//
//     to (16, 16) [+]= a (16, 32) b (32, 16)       a: rows of 32 numbers        b: rows of 16 pairs (k, k + 1)

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "lanes.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define GLM_TILES

namespace glm {

constexpr int kTileRows = 16;
constexpr int kTileK = 32;

// Operands and results of several products: the first, how many numbers (a), pairs (b) or floats (to) the rows of one lie
// apart, and how many the next one begins behind it; 0 where all share it.
template <class Number>
struct Tiles {
    Number* first;
    size_t stride, next;
};
using TilesA = Tiles<const uint16_t>;
using TilesB = Tiles<const uint32_t>;
using TilesTo = Tiles<float>;

constexpr int kHalfRows = kTileRows / 2;  // whose addresses fit into the CPU's registers

// Half a product, over `steps` tiles along k.
inline void multiply_pairs(const uint16_t* a, size_t a_stride, const uint32_t* b, size_t b_stride, int steps, float* to, size_t to_stride, bool adds) {
    __m512 sums[kHalfRows];
    const char* rows[kHalfRows];
#pragma GCC unroll 8
    for (int i = 0; i < kHalfRows; ++i) {
        rows[i] = reinterpret_cast<const char*>(a + i * a_stride);
        sums[i] = adds ? _mm512_loadu_ps(to + i * to_stride) : _mm512_setzero_ps();
    }
    for (int k = 0; k < steps * kTileK / 2; ++k) {
        const __m512i columns = _mm512_loadu_si512(b + k * b_stride);
#pragma GCC unroll 8
        for (int i = 0; i < kHalfRows; ++i) {
            int32_t pair;
            std::memcpy(&pair, rows[i] + 4 * k, sizeof pair);
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)columns);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kHalfRows; ++i) _mm512_storeu_ps(to + i * to_stride, sums[i]);
}

#if defined(__AMX_INT8__) || defined(GLM_EMULATE_TILES)

// kCount products at once, because each waits long for its sums; b is tile 4, a is tile 5.
template <int kCount>
inline void multiply_on_tiles(const TilesA& a, const TilesB& b, int steps, const TilesTo& to, int from, bool adds) {
    const auto each = [&](auto use) {
        use(std::integral_constant<int, 0>());
        if constexpr (kCount > 1) use(std::integral_constant<int, 1>());
        if constexpr (kCount > 2) use(std::integral_constant<int, 2>());
        if constexpr (kCount > 3) use(std::integral_constant<int, 3>());
    };
    each([&](auto i) {
        if (adds) return amx::load<i>(to.first + (from + i) * to.next, to.stride * sizeof(float));
        amx::zero<i>();
    });
    for (int step = 0; step < steps; ++step) {
        each([&](auto i) {
            if (i == 0 || a.next) amx::load<5>(a.first + (from + i) * a.next + step * kTileK, a.stride * sizeof(uint16_t));
            if (i == 0 || b.next) amx::load<4>(b.first + (from + i) * b.next + step * kTileK / 2 * b.stride, b.stride * sizeof(uint32_t));
            amx::dot_bfloat16<i, 5, 4>();
        });
    }
    each([&](auto i) { amx::store<i>(to.first + (from + i) * to.next, to.stride * sizeof(float)); });
}

#endif

// `count` products, each over `steps` tiles along k. What one gives does not depend on how many there are.
inline void multiply_bfloat16(const TilesA& a, const TilesB& b, int steps, const TilesTo& to, int count, bool adds) {
    int i = 0;
#if defined(__AMX_INT8__) || defined(GLM_EMULATE_TILES)
    if (tiles_available()) {
        for (; i + 4 <= count; i += 4) multiply_on_tiles<4>(a, b, steps, to, i, adds);
        for (; i < count; ++i) multiply_on_tiles<1>(a, b, steps, to, i, adds);
    }
#endif
    for (; i < count; ++i) {
        for (size_t row = 0; row < kTileRows; row += kHalfRows) {
            multiply_pairs(a.first + i * a.next + row * a.stride, a.stride, b.first + i * b.next, b.stride, steps,
                           to.first + i * to.next + row * to.stride, to.stride, adds);
        }
    }
}

// Holds the tile registers for a thread as long as it lives, where there are such.
struct TileRegisters {
    TileRegisters() {
#if defined(__AMX_INT8__) || defined(GLM_EMULATE_TILES)
        if (tiles_available()) amx::configure(kTileConfiguration);
#endif
    }
    ~TileRegisters() {
#if defined(__AMX_INT8__) || defined(GLM_EMULATE_TILES)
        if (tiles_available()) amx::release();
#endif
    }
};

// 32 rows of 16 float32 lanes -> 16 rows, one for each lane, of 16 pairs of bfloat16; rows of the result lie `stride` pairs
// apart. First pairs of rows, then a transposition: squares of 8, 4, 2 and 1 change places across the diagonal.
inline void lane_pairs(const float* from, uint32_t* to, size_t stride) {
    __m512i rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const __m256i even = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + 2 * i * kLanes));
        const __m256i odd = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + (2 * i + 1) * kLanes));
        rows[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int size = 8; size > 0; size /= 2) {
        const __mmask16 right = _mm512_test_epi32_mask(places, _mm512_set1_epi32(size));
        const __m512i away = _mm512_xor_si512(places, _mm512_set1_epi32(size));
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            if (i & size) continue;
            const __m512i upper = rows[i], lower = rows[i + size];
            rows[i] = _mm512_mask_permutexvar_epi32(upper, right, away, lower);
            rows[i + size] = _mm512_mask_permutexvar_epi32(lower, static_cast<__mmask16>(~right), away, upper);
        }
    }
    for (int i = 0; i < kLanes; ++i) _mm512_storeu_si512(to + i * stride, rows[i]);
}

// Two rows of bfloat16 -> one row of pairs; `width` is a multiple of 32.
inline void row_pairs(const uint16_t* first, const uint16_t* second, int width, uint32_t* to) {
    for (int c = 0; c < width; c += kLanes) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + c)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + c)));
        _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

}  // namespace glm

#endif

// Rows of a matrix times one, a few or many vectors: y[m][n] = sum over k of weight[n][k] * x[m][k], plus bias[n].
//
// Quantised weights lie in blocks of 16 rows x 32 columns, so that one vector holds four columns of 16 rows, a weight is
// read once for a tile of up to 12 vectors, and memory is read in one straight line:
//
//     row 0..15 of the matrix -> [block 0: columns 0..31][block 1: columns 32..63] ...  then rows 16..31
//     int4 block, 256 bytes:  4 chunks of 64; chunk c, row r, j < 4:  q[r][8c+j] + 8  |  (q[r][8c+4+j] + 8) << 4
//     int8 block, 512 bytes:  8 chunks of 64; chunk c, row r, j < 4:  q[r][4c+j] + 128
//
// The vectors are rounded to int8 in groups of 32 columns, each with its own scale, so an outlier spoils its group only.
// A group's products are summed exactly in int32, then scaled and added up in float32, group after group: what a vector
// gives does not depend on the others beside it.
//
// Float weights are taken as torch holds them, row by row, and the vectors unrounded.

#pragma once

#include <algorithm>
#include <cstddef>

#include "lanes.h"

namespace glm {

enum Kind : int32_t { kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kInt8 = 4, kInt4 = 5, kInt4Groups = 6 };

constexpr int kGroup = 32;      // columns of a block, and of a group of rounded activations
constexpr int kQuad = 4;        // vectors that lie side by side in `Activations`
constexpr int kBlockRows = 16;  // rows of a block: one in each lane

struct Weight {
    int32_t kind;
    int32_t n, k;
    const void* data;
    const void* scale;  // float32 (n) for kInt8 and kInt4; float16 (n/16, k/32, 16) for kInt4Groups
    const float* bias;  // (n) or null
};

inline bool is_quantised(const Weight& w) { return w.kind >= kInt8; }
inline int row_blocks(const Weight& w) { return (w.n + kBlockRows - 1) / kBlockRows; }
inline size_t block_bytes(int kind) { return kind == kInt8 ? 512 : 256; }

// m vectors of k numbers: as they are, and rounded in groups. Four vectors lie side by side, so that a tile finds the
// same four columns of its vectors close together:  q [m/4][k/4][4 vectors][4 columns], scale and offset [m/4][k/32][4].
struct Activations {
    int m, k;
    const float* x;         // (m, k); only float weights read it
    int8_t* q;
    float* scale;
    int32_t* offset;        // -8 times the sum of the group's q: what weights stored plus 8 give too much
    bool tiles;             // q, scale and offset are laid out for the CPU's tiles (amx.h)
};

// Many vectors go to the CPU's tiles where it has them. A build for such a CPU has amx.h, which defines these.
#if defined(__AMX_INT8__) || defined(GLM_EMULATE_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
constexpr int kTileVectors = 32;  // from so many on; amx.h says why
bool tiles_available();
void round_tile_range(const Activations& a, int row, int range, const float* x);
void tile_product(const Weight& w, const Activations& a, float* y, size_t ldy, int first_block, int last_block);

inline bool takes_tiles(int m) {
    if constexpr (kHasTiles) return m >= kTileVectors && tiles_available();
    return false;
}

inline size_t quads(int m) { return static_cast<size_t>((m + kQuad - 1) / kQuad); }

inline size_t tile_rows(int m) { return static_cast<size_t>((m + 15) / 16); }  // tiles that m vectors fill, 16 in each

// How many scales the rounded vectors have, and how many bytes they need, at an address that 64 divides.
inline size_t scales(int m, int k) {
    return takes_tiles(m) ? tile_rows(m) * 16 * ((k + 255) / 256) : quads(m) * kQuad * (static_cast<size_t>(k) / kGroup);
}

inline size_t activation_bytes(int m, int k) {
    const size_t numbers = takes_tiles(m) ? tile_rows(m) * 16 * ((k + 63) / 64 * 64) : quads(m) * kQuad * k;
    return numbers + scales(m, k) * 8 + 64;
}

// Lays an `Activations` over memory of `activation_bytes(m, k)`.
inline Activations make_activations(const float* x, int m, int k, void* memory) {
    const size_t groups = scales(m, k);
    char* at = static_cast<char*>(memory);
    float* scale = reinterpret_cast<float*>(at);
    int32_t* offset = reinterpret_cast<int32_t*>(at + groups * 4);
    return {m, k, x, reinterpret_cast<int8_t*>(at + groups * 8), scale, offset, takes_tiles(m)};
}

// Rounds group `g` of vector number `row` of `a`, 32 numbers. One that is not finite makes the group's scale NaN, and so
// the result.
inline void round_group(const Activations& a, int row, size_t g, const float* x) {
    const size_t quad = row / kQuad, place = row % kQuad, groups = a.k / kGroup;
    const Floats first = load(x), second = load(x + kLanes);
    const float size = largest(larger(absolute(first), absolute(second)));
    const float bad = sum((first + second) * spread(0.0f));  // 0, or NaN
    const bool tiny = !(size > 1e-30f);
    const Floats inverse = spread(tiny ? 0.0f : 127.0f / size);
    int32_t values[kGroup];
    store(values, nearest(first * inverse));
    store(values + kLanes, nearest(second * inverse));
    int8_t* to = a.q + ((quad * a.k + g * kGroup) * kQuad + place * 4);
    int32_t total = 0;
    for (int i = 0; i < kGroup; ++i) {
        to[i / 4 * 4 * kQuad + i % 4] = static_cast<int8_t>(values[i]);
        total += static_cast<int8_t>(values[i]);
    }
    const size_t at = (quad * groups + g) * kQuad + place;
    a.scale[at] = (tiny ? 0.0f : size / 127.0f) + bad;
    a.offset[at] = -kOffset4 * total;
}

// Columns that are rounded together, and must be when a vector is rounded part by part.
inline int rounding_columns(int m) { return takes_tiles(m) ? 256 : kGroup; }

// Rounds columns `first` up to `first + count` of vector number `row` of `a`: whole groups, or what is left of the last.
inline void round_columns(const Activations& a, int row, int first, int count, const float* x) {
    const int size = rounding_columns(a.m);
    for (int c = 0; c < count; c += size) {
        if constexpr (kHasTiles) {
            if (a.tiles) {
                round_tile_range(a, row, (first + c) / size, x + c);
                continue;
            }
        }
        round_group(a, row, (first + c) / size, x + c);
    }
}

// Rounds vector number `row` of `a`.
inline void round_row(const Activations& a, int row, const float* x) {
    round_columns(a, row, 0, a.k, x);
}

// One group of 32 columns of 16 rows, times kRows vectors. `q`, `offset` point to the group in the first quad.
template <int kKind, int kRows>
inline void add_group(Ints (&sums)[kRows], const uint8_t* block, const int8_t* q, size_t quad_bytes, const int32_t* offset,
                      size_t quad_groups) {
    constexpr int kShift = kKind == kInt8 ? (kOffset8 == 128 ? 4 : -1) : 0;
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
        if constexpr (kShift < 0) {
            sums[i] = Ints{};
        } else {
            sums[i] = spread(offset[i / kQuad * quad_groups + i % kQuad]) << kShift;
        }
    }
    constexpr int kChunks = kKind == kInt8 ? 8 : 4;
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) {
        const Bytes bytes = load_bytes(block + 64 * c);
        if constexpr (kKind == kInt8) {
#pragma GCC unroll 12
            for (int i = 0; i < kRows; ++i) add_dot8(sums[i], bytes, q + i / kQuad * quad_bytes + 16 * c + i % kQuad * 4);
        } else {
            const Bytes low = low_nibbles(bytes), high = high_nibbles(bytes);
#pragma GCC unroll 12
            for (int i = 0; i < kRows; ++i) add_dot4(sums[i], low, q + i / kQuad * quad_bytes + 32 * c + i % kQuad * 4);
#pragma GCC unroll 12
            for (int i = 0; i < kRows; ++i) add_dot4(sums[i], high, q + i / kQuad * quad_bytes + 32 * c + 16 + i % kQuad * 4);
        }
    }
}

// 16 rows (block row `n16`) times kRows vectors from number `first` on, a multiple of four.
template <int kKind, int kRows>
void quantised_tile(const Weight& w, const Activations& a, int first, int n16, float* y, size_t ldy) {
    constexpr size_t kBytes = kKind == kInt8 ? 512 : 256;
    constexpr int kAhead = kKind == kInt8 ? 8 : 12;  // blocks; far enough to hide a trip to memory
    const size_t groups = w.k / kGroup, quad = first / kQuad;
    const uint8_t* block = static_cast<const uint8_t*>(w.data) + n16 * groups * kBytes;
    const uint16_t* group_scale = static_cast<const uint16_t*>(w.scale) + n16 * groups * kBlockRows;
    const int8_t* q = a.q + quad * kQuad * a.k;
    const float* scale = a.scale + quad * groups * kQuad;
    const int32_t* offset = a.offset + quad * groups * kQuad;
    const size_t quad_bytes = static_cast<size_t>(kQuad) * a.k, quad_groups = groups * kQuad;
    Floats out[kRows];
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) out[i] = spread(0.0f);
    for (size_t g = 0; g < groups; ++g) {
#pragma GCC unroll 8
        for (size_t line = 0; line < kBytes; line += 64) __builtin_prefetch(block + kAhead * kBytes + line);
        Ints sums[kRows];
        add_group<kKind, kRows>(sums, block, q, quad_bytes, offset, quad_groups);
        Floats own = spread(1.0f);
        if constexpr (kKind == kInt4Groups) own = load_float16(group_scale);
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
            Floats both = spread(scale[i / kQuad * quad_groups + i % kQuad]);
            if constexpr (kKind == kInt4Groups) both = own * both;
            out[i] = fused(to_floats(sums[i]), both, out[i]);
        }
        block += kBytes;
        group_scale += kBlockRows;
        q += kGroup * kQuad;
        scale += kQuad;
        offset += kQuad;
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
        if constexpr (kKind != kInt4Groups) out[i] = out[i] * load(static_cast<const float*>(w.scale) + n16 * kBlockRows);
        if (w.bias) out[i] = out[i] + load(w.bias + n16 * kBlockRows);
        store(y + (first + i) * ldy + n16 * kBlockRows, out[i]);
    }
}

constexpr int kTile = kParts == 1 ? 12 : 4;  // vectors at once: as many sums as the CPU has registers for

template <int kKind>
void quantised_product(const Weight& w, const Activations& a, float* y, size_t ldy, int first_block, int last_block) {
    constexpr int kStripe = 4;  // block rows that stay in the cache while all vectors pass
    for (int from = first_block; from < last_block; from += kStripe) {
        const int to = std::min(from + kStripe, last_block);
        for (int i = 0; i < a.m;) {
            const int left = a.m - i;
            const int rows = left >= kTile ? kTile : left >= 8 && kTile >= 8 ? 8 : std::min(left, 4);
            for (int n16 = from; n16 < to; ++n16) {
                if (rows == kTile) {
                    quantised_tile<kKind, kTile>(w, a, i, n16, y, ldy);
                } else if (rows == 8) {
                    quantised_tile<kKind, kTile >= 8 ? 8 : 1>(w, a, i, n16, y, ldy);
                } else if (rows == 4) {
                    quantised_tile<kKind, 4>(w, a, i, n16, y, ldy);
                } else if (rows == 3) {
                    quantised_tile<kKind, 3>(w, a, i, n16, y, ldy);
                } else if (rows == 2) {
                    quantised_tile<kKind, 2>(w, a, i, n16, y, ldy);
                } else {
                    quantised_tile<kKind, 1>(w, a, i, n16, y, ldy);
                }
            }
            i += rows;
        }
    }
}

template <int kKind>
inline Floats load_weights(const void* data, size_t at) {
    if constexpr (kKind == kFloat32) return load(static_cast<const float*>(data) + at);
    if constexpr (kKind == kBFloat16) return load_bfloat16(static_cast<const uint16_t*>(data) + at);
    return load_float16(static_cast<const uint16_t*>(data) + at);
}

template <int kKind>
inline float load_weight(const void* data, size_t at) {
    if constexpr (kKind == kFloat32) return static_cast<const float*>(data)[at];
    if constexpr (kKind == kBFloat16) return from_bfloat16(static_cast<const uint16_t*>(data)[at]);
    return from_float16(static_cast<const uint16_t*>(data)[at]);
}

constexpr size_t kAheadBytes = 4096;  // how far ahead float weights are fetched; whole tiles of them

// kColumns neighbouring rows of a float matrix times kRows vectors, lanes along k. The first vectors fetch the matrix from
// memory, the others find it in the cache.
template <int kKind, int kColumns, int kRows, bool kFetch>
void float_tile(const Weight& w, const float* x, int n, float* y, size_t ldy) {
    constexpr size_t kBytes = kKind == kFloat32 ? 4 : 2;
    const size_t k = w.k, whole = k / kLanes * kLanes;
    const size_t tile_bytes = kColumns * k * kBytes, ahead = (kAheadBytes + tile_bytes - 1) / tile_bytes * tile_bytes;
    Floats sums[kColumns * kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kColumns * kRows; ++i) sums[i] = spread(0.0f);
    for (size_t at = 0; at < whole; at += kLanes) {
        Floats vectors[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) vectors[i] = load(x + i * k + at);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            if constexpr (kFetch) __builtin_prefetch(static_cast<const char*>(w.data) + ((n + c) * k + at) * kBytes + ahead);
            const Floats weights = load_weights<kKind>(w.data, (n + c) * k + at);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) sums[c * kRows + i] = fused(weights, vectors[i], sums[c * kRows + i]);
        }
    }
    if constexpr (kColumns * kRows == kLanes) {
        if (whole == k) {
            float totals[kLanes];
            store(totals, sums_of(sums));
            for (int i = 0; i < kRows; ++i) {
                for (int c = 0; c < kColumns; ++c) y[i * ldy + n + c] = totals[i * kColumns + c] + (w.bias ? w.bias[n + c] : 0.0f);
            }
            return;
        }
    }
    for (int c = 0; c < kColumns; ++c) {
        for (int i = 0; i < kRows; ++i) {
            float total = sum(sums[c * kRows + i]);
            for (size_t at = whole; at < k; ++at) total = std::fma(load_weight<kKind>(w.data, (n + c) * k + at), x[i * k + at], total);
            y[i * ldy + n + c] = total + (w.bias ? w.bias[n + c] : 0.0f);
        }
    }
}

template <int kKind, int kRows, bool kFetch>
void float_rows(const Weight& w, const float* x, float* y, size_t ldy, int first, int last) {
    int n = first;
    for (; n + 4 <= last; n += 4) float_tile<kKind, 4, kRows, kFetch>(w, x, n, y, ldy);
    for (; n < last; ++n) float_tile<kKind, 1, kRows, kFetch>(w, x, n, y, ldy);
}

template <int kKind>
void float_product(const Weight& w, const Activations& a, float* y, size_t ldy, int first_block, int last_block) {
    for (int block = first_block; block < last_block; ++block) {
        const int first = block * kBlockRows, last = std::min(first + kBlockRows, w.n);
        for (int i = 0; i < a.m;) {
            const float* x = a.x + static_cast<size_t>(i) * a.k;
            float* to = y + i * ldy;
            const int rows = std::min(a.m - i, 4);
            if (rows == 4 && i) float_rows<kKind, 4, false>(w, x, to, ldy, first, last);
            if (rows == 4 && !i) float_rows<kKind, 4, true>(w, x, to, ldy, first, last);
            if (rows == 3) float_rows<kKind, 3, true>(w, x, to, ldy, first, last);
            if (rows == 2) float_rows<kKind, 2, true>(w, x, to, ldy, first, last);
            if (rows == 1) float_rows<kKind, 1, true>(w, x, to, ldy, first, last);
            i += rows;
        }
    }
}

// How many block rows a thread takes at once. Tiles want many: their vectors come from far for each share.
inline int blocks_at_once(const Activations& a, int blocks, int threads) {
    return a.tiles ? std::min(16, (blocks + threads - 1) / threads) : 4;
}

// Columns 16 * first_block up to 16 * last_block of y, on the calling thread; callers share the blocks between threads.
inline void product(const Weight& w, const Activations& a, float* y, size_t ldy, int first_block, int last_block) {
    if constexpr (kHasTiles) {
        if (a.tiles && is_quantised(w)) return tile_product(w, a, y, ldy, first_block, last_block);
    }
    switch (w.kind) {
        case kFloat32: return float_product<kFloat32>(w, a, y, ldy, first_block, last_block);
        case kBFloat16: return float_product<kBFloat16>(w, a, y, ldy, first_block, last_block);
        case kFloat16: return float_product<kFloat16>(w, a, y, ldy, first_block, last_block);
        case kInt8: return quantised_product<kInt8>(w, a, y, ldy, first_block, last_block);
        case kInt4: return quantised_product<kInt4>(w, a, y, ldy, first_block, last_block);
        case kInt4Groups: return quantised_product<kInt4Groups>(w, a, y, ldy, first_block, last_block);
    }
}

// Eight int4 columns as the official format packs them, even column in the high nibble, two's complement, to the order
// of a block, plus 8; and back. c0 is the first column.
inline uint32_t block_nibbles(uint32_t word) {
    const uint32_t even = (word >> 4) & 0x0f0f0f0fu, odd = word & 0x0f0f0f0fu;   // bytes c0 c2 c4 c6, c1 c3 c5 c7
    const uint32_t first = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
    const uint32_t second = (even >> 16 & 0xff) | (odd >> 16 & 0xff) << 8 | (even >> 24) << 16 | (odd >> 24) << 24;
    return (first | second << 4) ^ 0x88888888u;
}

inline uint32_t row_nibbles(uint32_t word) {
    word ^= 0x88888888u;
    const uint32_t first = word & 0x0f0f0f0fu, second = (word >> 4) & 0x0f0f0f0fu;  // bytes c0 c1 c2 c3, c4 c5 c6 c7
    const uint32_t low = (first & 0x0f) << 4 | (first >> 8 & 0x0f) | (first >> 16 & 0x0f) << 12 | (first >> 24) << 8;
    const uint32_t high = (second & 0x0f) << 4 | (second >> 8 & 0x0f) | (second >> 16 & 0x0f) << 12 | (second >> 24) << 8;
    return low | high << 16;
}

// 16 rows of official bytes to blocks (or back): words of four bytes change places, and their bits as above.
template <bool kToBlocks>
void relay_block_row(int kind, int k, const uint8_t* from, uint8_t* to) {
    const size_t words = kind == kInt8 ? k / 4 : k / 8;  // of a row
    for (size_t word = 0; word < words; ++word) {
        for (size_t row = 0; row < kBlockRows; ++row) {
            const size_t in_row = (row * words + word) * 4, in_block = (word * kBlockRows + row) * 4;
            uint32_t value;
            std::memcpy(&value, from + (kToBlocks ? in_row : in_block), 4);
            if (kind == kInt8) {
                value ^= 0x80808080u;
            } else {
                value = kToBlocks ? block_nibbles(value) : row_nibbles(value);
            }
            std::memcpy(to + (kToBlocks ? in_block : in_row), &value, 4);
        }
    }
}

}  // namespace glm

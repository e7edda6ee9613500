// Attention of a few new tokens to a long cache, for heads in groups that share keys and values.
//
// A lane is one (token, head) pair of one row and one group, so up to 16 pairs read each key and each value once:
//
//     pair        0           1         ...  G-1         G           ...           token by token, G heads of a group
//                 (t 0, h 0)  (t 0, h 1)     (t 0, h G-1) (t 1, h 0)
//     queries     [width][16 lanes], times log2(e) / sqrt(width): weights are powers of two
//
//     keys |-- range 0: 512 --|-- range 1: 512 --|-- range 2 ... --|    a task: one range, one row, one group, 16 lanes
//            chunk chunk ...                                            32 or 64 keys, whose scores are held at once
//
// A task runs through its chunks and carries the largest score, the sum of weights and the weighted values of each lane;
// `combine` adds the ranges up in their order. Ranges and chunks are counted from a row's first visible key, and what a
// lane does not see has the weight 0: so a lane's result depends neither on threads nor padding nor on other tokens.
//
// Source: Milakov and Gimelshein 2018 (arXiv:1805.02867) for softmax in one pass, as FlashAttention has it.

#pragma once

#include <algorithm>
#include <cstddef>

#include "lanes.h"
#include "numbers.h"
#include "tiles.h"

namespace glm {

constexpr int kRangeKeys = 512;
constexpr float kNothing = -1e30f;  // a score below all others, finite so that differences are numbers

// Keys and values of one row and one group, from the first that is visible on.
struct Keys {
    const void* keys;    // (count, width)
    const void* values;  // (count, width)
    int dtype, width;
};

// What a task leaves: 16 lanes, each with its largest score, its sum of weights and its weighted values.
struct Partial {
    float *largest, *sum;  // (16)
    float* values;         // (16, width)

    static size_t floats(int width) { return static_cast<size_t>(kLanes) * (width + 2); }
    static Partial at(float* memory) { return {memory, memory + kLanes, memory + 2 * kLanes}; }
};

// 2^x for x <= 0, to a unit in the last place or two; below 2^-125 it stays there. NaN stays NaN.
inline Floats power_of_two(const Floats& x) {
    const Floats high = larger(spread(-125.0f), x), shifter = spread(12582912.0f);  // 1.5 * 2^23: its ulp is 1
    const Floats shifted = high + shifter;
    const Floats rest = high - (shifted - shifter);  // -0.5 to 0.5
    Floats y = spread(1.5353362e-4f);                // minimax on that interval, as in Cephes' exp2f
    for (const float c : {1.3398874e-3f, 9.6184373e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.0f}) {
        y = fused(y, rest, spread(c));
    }
    return as_floats(bits_of(y) + (bits_of(shifted) << 23));
}

// The state of 16 lanes on their way through the keys.
struct Softmax {
    Floats limit;  // how many keys each lane sees
    float fewest;  // the smallest of these
    Floats largest = spread(kNothing), sum = spread(0.0f);

    explicit Softmax(const float* limits) : limit(load(limits)), fewest(*std::min_element(limits, limits + kLanes)) {}

    // Makes weights of scores, (count, 16), of the keys from `first` on. Returns what all weights so far shrink by.
    Floats add(float* scores, int first, int count) {
        if (first + count > fewest) {
            for (int key = 0; key < count; ++key) {
                const Floats number = spread(static_cast<float>(first + key));
                store(scores + key * kLanes, where_less(number, limit, load(scores + key * kLanes), spread(kNothing)));
            }
        }
        Floats top = largest;
        for (int key = 0; key < count; ++key) top = larger(load(scores + key * kLanes), top);
        const Floats shrink = power_of_two(largest - top);
        Floats sums[4] = {spread(0.0f), spread(0.0f), spread(0.0f), spread(0.0f)};
        for (int key = 0; key < count; ++key) {
            Floats weight = power_of_two(load(scores + key * kLanes) - top);
            if (first + count > fewest) weight = where_less(spread(static_cast<float>(first + key)), limit, weight, spread(0.0f));
            store(scores + key * kLanes, weight);
            sums[key % 4] = sums[key % 4] + weight;
        }
        largest = top;
        sum = fused(sum, shrink, (sums[0] + sums[1]) + (sums[2] + sums[3]));
        return shrink;
    }
};

// kRows rows of  to (rows, 16) [+]= a (rows, k) times b (k, 16); a's numbers lie `row_step` and `k_step` apart.
template <int kRows>
inline void multiply_rows(const float* a, size_t row_step, size_t k_step, const float* b, int k, float* to, bool adds) {
    Floats sums[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sums[i] = adds ? load(to + i * kLanes) : spread(0.0f);
    for (int j = 0; j < k; ++j) {
        const Floats lanes = load(b + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) sums[i] = fused(spread(a[i * row_step + j * k_step]), lanes, sums[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) store(to + i * kLanes, sums[i]);
}

inline void multiply(const float* a, size_t row_step, size_t k_step, const float* b, int rows, int k, float* to, bool adds) {
    constexpr int kRows = kParts == 1 ? 8 : kParts == 2 ? 4 : 2;  // as many sums as there are registers for
    int row = 0;
    for (; row + kRows <= rows; row += kRows) {
        multiply_rows<kRows>(a + row * row_step, row_step, k_step, b, k, to + row * kLanes, adds);
    }
    for (; row < rows; ++row) multiply_rows<1>(a + row * row_step, row_step, k_step, b, k, to + row * kLanes, adds);
}

// Any dtype, any width: keys and values as float32.
//
//     scores (keys, 16) = keys (keys, width) queries (width, 16)        values (width, 16) += values^T (width, keys) weights
class PlainAttention {
  public:
    static constexpr int kChunk = 32;
    static size_t floats(int width) { return static_cast<size_t>(kLanes) * (kChunk + width) + static_cast<size_t>(kChunk) * width; }
    static size_t query_floats(int width) { return static_cast<size_t>(kLanes) * width; }

    // A query's number of channel `c`, and the next, in a lane.
    static void put_query(float* queries, int c, int lane, float first, float second) {
        queries[c * kLanes + lane] = first;
        queries[(c + 1) * kLanes + lane] = second;
    }

    // Keys `first` to `last` of a row and group; `limits` says how many each lane sees.
    static void run(const Keys& from, const float* queries, const float* limits, int first, int last, float* memory, Partial to) {
        const int width = from.width;
        float *scores = memory, *sums = scores + kLanes * kChunk, *wide = sums + kLanes * width;
        Softmax softmax(limits);
        std::fill(sums, sums + kLanes * width, 0.0f);
        for (int key = first; key < last; key += kChunk) {
            const int count = std::min(kChunk, last - key);
            multiply(widened(from.keys, from, key, count, wide), width, 1, queries, count, width, scores, false);
            const Floats shrink = softmax.add(scores, key, count);
            for (int c = 0; c < width; ++c) store(sums + c * kLanes, load(sums + c * kLanes) * shrink);
            multiply(widened(from.values, from, key, count, wide), 1, width, scores, width, count, sums, true);
        }
        store(to.largest, softmax.largest);
        store(to.sum, softmax.sum);
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int c = 0; c < width; ++c) to.values[lane * width + c] = sums[c * kLanes + lane];
        }
    }

  private:
    // float32 is copied too: the copy is read many times, and memory once in a straight line.
    static const float* widened(const void* numbers, const Keys& from, int key, int count, float* memory) {
        widen(numbers, static_cast<size_t>(key) * from.width, count * from.width, from.dtype, memory);
        return memory;
    }
};

// The same numbers as `PlainAttention` gives, to the last bit, where four lanes are enough: a step of one token with few
// heads in a group. Then a vector holds four keys of four lanes, and values are added along their width.
//
//     scores (keys / 4, 4 keys, 4 lanes)        values (lanes, width) += weights (keys, lanes) values (keys, width)
class NarrowAttention {
  public:
    static constexpr int kPairs = 4;
    static bool takes(int pairs, int width) { return kHasQuads && pairs <= kPairs && width % kLanes == 0; }

    static void run(const Keys& from, const float* queries, const float* limits, int pairs, int first, int last, float* memory, Partial to) {
        constexpr int kChunk = PlainAttention::kChunk;
        const int width = from.width;
        float *scores = memory, *narrow_queries = scores + kPairs * kChunk, *wide = narrow_queries + kPairs * width;
        for (int c = 0; c < width; ++c) std::copy(queries + c * kLanes, queries + c * kLanes + kPairs, narrow_queries + c * kPairs);
        std::fill(to.values, to.values + pairs * width, 0.0f);
        float largest[kPairs], sums[kPairs] = {};
        std::fill(largest, largest + kPairs, kNothing);
        for (int key = first; key < last; key += kChunk) {
            const int count = std::min(kChunk, last - key);
            float shrink[kPairs];
            multiply_keys(numbers(from.keys, from, key, count, wide), width, narrow_queries, count, scores);
            weigh(scores, limits, key, count, largest, sums, shrink);
            const float* values = numbers(from.values, from, key, count, wide);
            for (int c = 0; c < width; c += kLanes) {
                if (pairs == 4) add_values<4>(values + c, width, scores, count, shrink, to.values + c);
                if (pairs == 3) add_values<3>(values + c, width, scores, count, shrink, to.values + c);
                if (pairs == 2) add_values<2>(values + c, width, scores, count, shrink, to.values + c);
                if (pairs == 1) add_values<1>(values + c, width, scores, count, shrink, to.values + c);
            }
        }
        std::copy(largest, largest + kPairs, to.largest);
        std::copy(sums, sums + kPairs, to.sum);
    }

  private:
    static const float* numbers(const void* all, const Keys& from, int key, int count, float* memory) {
        const size_t at = static_cast<size_t>(key) * from.width;
        if (from.dtype == kAsFloat32) return static_cast<const float*>(all) + at;
        widen(all, at, count * from.width, from.dtype, memory);
        return memory;
    }

    // Keys behind the last are the last once more; nobody sees them.
    static void multiply_keys(const float* keys, int width, const float* queries, int count, float* scores) {
        constexpr int kAtOnce = 4;  // of four keys
        const float* rows[kAtOnce * kPairs];
        for (int key = 0; key < count; key += kAtOnce * kPairs) {
            for (int i = 0; i < kAtOnce * kPairs; ++i) rows[i] = keys + static_cast<size_t>(std::min(key + i, count - 1)) * width;
            Floats sums[kAtOnce];
#pragma GCC unroll 4
            for (int i = 0; i < kAtOnce; ++i) sums[i] = spread(0.0f);
            for (int c = 0; c < width; c += 4) {
                const Floats q0 = same_quads(queries + c * kPairs), q1 = same_quads(queries + (c + 1) * kPairs);
                const Floats q2 = same_quads(queries + (c + 2) * kPairs), q3 = same_quads(queries + (c + 3) * kPairs);
#pragma GCC unroll 4
                for (int i = 0; i < kAtOnce; ++i) {
                    const Floats four = quads(rows[4 * i] + c, rows[4 * i + 1] + c, rows[4 * i + 2] + c, rows[4 * i + 3] + c);
                    sums[i] = fused(spread_in_quads<0>(four), q0, sums[i]);
                    sums[i] = fused(spread_in_quads<1>(four), q1, sums[i]);
                    sums[i] = fused(spread_in_quads<2>(four), q2, sums[i]);
                    sums[i] = fused(spread_in_quads<3>(four), q3, sums[i]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < kAtOnce; ++i) store(scores + (key + kPairs * i) * kPairs, sums[i]);
        }
    }

    // As `Softmax::add`, for four keys at a time: its four sums are the four quads.
    static void weigh(float* scores, const float* limits, int first, int count, float* largest, float* sums, float* shrink) {
        const Floats limit = same_quads(limits), nothing = spread(kNothing);
        const float counted[kLanes] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
        const Floats start = load(counted) + spread(static_cast<float>(first));
        Floats top = same_quads(largest);
        for (int key = 0; key < count; key += kPairs) {
            const Floats seen = where_less(start + spread(static_cast<float>(key)), limit, load(scores + key * kPairs), nothing);
            store(scores + key * kPairs, seen);
            top = larger(seen, top);
        }
        float quad[kLanes], tops[kPairs];
        store(quad, top);
        for (int lane = 0; lane < kPairs; ++lane) {
            tops[lane] = std::max(std::max(quad[lane], quad[lane + 4]), std::max(quad[lane + 8], quad[lane + 12]));
        }
        top = same_quads(tops);
        store(quad, power_of_two(same_quads(largest) - top));
        std::copy(quad, quad + kPairs, shrink);
        Floats all = spread(0.0f);
        for (int key = 0; key < count; key += kPairs) {
            Floats weight = power_of_two(load(scores + key * kPairs) - top);
            weight = where_less(start + spread(static_cast<float>(key)), limit, weight, spread(0.0f));
            store(scores + key * kPairs, weight);
            all = all + weight;
        }
        store(quad, all);
        for (int lane = 0; lane < kPairs; ++lane) {
            largest[lane] = tops[lane];
            sums[lane] = std::fma(sums[lane], shrink[lane], (quad[lane] + quad[lane + 4]) + (quad[lane + 8] + quad[lane + 12]));
        }
    }

    template <int kCount>
    static void add_values(const float* values, int width, const float* weights, int count, const float* shrink, float* to) {
        Floats sums[kCount];
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) sums[i] = load(to + i * width) * spread(shrink[i]);
        for (int key = 0; key < count; ++key) {
            const Floats own = load(values + static_cast<size_t>(key) * width);
#pragma GCC unroll 4
            for (int i = 0; i < kCount; ++i) sums[i] = fused(own, spread(weights[key * kPairs + i]), sums[i]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) store(to + i * width, sums[i]);
    }
};

#if defined(GLM_TILES)

// A bfloat16 cache, by products of bfloat16 that are added up in float32; queries and weights are rounded to it.
//
//     scores (keys, 16) = keys (keys, width) queries         queries as pairs of channels: [width/2][16 lanes][2]
//     values (16, width) += weights (16, keys) values        values as pairs of keys:      [keys/2][width][2]
class TileAttention {
  public:
    static constexpr int kChunk = 64;
    static bool takes(int dtype, int width) { return dtype == kAsBFloat16 && width % kTileK == 0; }
    static size_t floats(int width) { return kLanes * kChunk + kLanes * kChunk / 2 + 2 * static_cast<size_t>(kChunk / 2) * width; }

    static void put_query(float* queries, int c, int lane, float first, float second) {
        const uint32_t pair = to_bfloat16(first) | static_cast<uint32_t>(to_bfloat16(second)) << 16;
        std::memcpy(queries + c / 2 * kLanes + lane, &pair, sizeof pair);
    }

    static void run(const Keys& from, const float* queries, const float* limits, int first, int last, float* memory, Partial to) {
        const int width = from.width;
        float* scores = memory;
        uint32_t* weights = reinterpret_cast<uint32_t*>(scores + kLanes * kChunk);
        uint32_t* pairs = weights + kLanes * kChunk / 2;
        uint16_t* padded = reinterpret_cast<uint16_t*>(pairs + kChunk / 2 * width);
        const uint32_t* pairs_of_channels = reinterpret_cast<const uint32_t*>(queries);
        const size_t stride = width;
        const TileRegisters registers;
        Softmax softmax(limits);
        std::fill(to.values, to.values + kLanes * width, 0.0f);
        for (int key = first; key < last; key += kChunk) {
            const int count = std::min(kChunk, last - key), rows = (count + kTileRows - 1) / kTileRows * kTileRows;
            const uint16_t* keys = whole_tiles(from.keys, width, key, count, rows, padded);
            fetch(from.values, width, key, count);
            multiply_bfloat16({keys, stride, kTileRows * stride}, {pairs_of_channels, kLanes, 0}, width / kTileK,
                           {scores, kLanes, kTileRows * kLanes}, rows / kTileRows, false);
            fetch(from.keys, width, key + kChunk, std::min(kChunk, last - key - kChunk));
            const Floats shrink = softmax.add(scores, key, count);
            std::fill(scores + count * kLanes, scores + kChunk * kLanes, 0.0f);
            const int steps = (count + kTileK - 1) / kTileK;
            for (int step = 0; step < steps; ++step) lane_pairs(scores + step * kTileK * kLanes, weights + step * kLanes, kChunk / 2);
            const uint16_t* values = whole_tiles(from.values, width, key, count, steps * kTileK, padded);
            for (int pair = 0; pair < steps * kTileK / 2; ++pair) {
                row_pairs(values + 2 * pair * width, values + (2 * pair + 1) * width, width, pairs + pair * width);
            }
            scale_rows(to.values, width, shrink);
            multiply_bfloat16({reinterpret_cast<const uint16_t*>(weights), kChunk, 0}, {pairs, stride, kLanes}, steps,
                           {to.values, stride, kLanes}, width / kLanes, true);
        }
        store(to.largest, softmax.largest);
        store(to.sum, softmax.sum);
    }

  private:
    // Asks for rows of the cache that are wanted soon, while there is still something else to compute.
    static void fetch(const void* from, int width, int key, int count) {
        const char* start = static_cast<const char*>(from) + static_cast<size_t>(key) * width * sizeof(uint16_t);
        for (int at = 0; at < count * width * static_cast<int>(sizeof(uint16_t)); at += 64) __builtin_prefetch(start + at, 0, 2);
    }

    // Rows of the cache, or a copy with zeros behind them where fewer than whole tiles are filled.
    static const uint16_t* whole_tiles(const void* from, int width, int key, int count, int rows, uint16_t* memory) {
        const uint16_t* start = static_cast<const uint16_t*>(from) + static_cast<size_t>(key) * width;
        if (count == rows) return start;
        std::copy(start, start + count * width, memory);
        std::fill(memory + count * width, memory + rows * width, uint16_t{0});
        return memory;
    }

    static void scale_rows(float* values, int width, const Floats& shrink) {
        float factors[kLanes];
        store(factors, shrink);
        for (int lane = 0; lane < kLanes; ++lane) {
            if (factors[lane] == 1.0f) continue;
            for (int c = 0; c < width; c += kLanes) store(values + lane * width + c, load(values + lane * width + c) * spread(factors[lane]));
        }
    }
};

#endif

// A lane's result from its ranges, `stride` floats apart: `width` numbers, zeros if it sees nothing.
inline void combine(float* partials, size_t stride, int ranges, int lane, int width, float* to) {
    float top = kNothing, total = 0.0f;
    for (int range = 0; range < ranges; ++range) {
        const float own = Partial::at(partials + range * stride).largest[lane];
        top = own <= top ? top : own;  // NaN gets through
    }
    std::fill(to, to + width, 0.0f);
    for (int range = 0; range < ranges; ++range) {
        const Partial part = Partial::at(partials + range * stride);
        const float weight = std::exp2(part.largest[lane] - top);
        const float* values = part.values + lane * width;
        total += part.sum[lane] * weight;
        for (int c = 0; c < width; ++c) to[c] += values[c] * weight;
    }
    if (total == 0.0f) return;
    const float inverse = 1.0f / total;
    for (int c = 0; c < width; ++c) to[c] *= inverse;
}

}  // namespace glm

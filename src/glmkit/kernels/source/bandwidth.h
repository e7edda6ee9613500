// What this machine can do at best, so that the speed of a kernel can be told as a share of it.
//
//   glm_read_bandwidth     every thread sums a stretch of its own of a buffer that no cache can hold
//
//       data |------ thread 0 ------|------ thread 1 ------| ...     64 bytes a load, asked for 2 KiB ahead
//
//   glm_int8_peak          products of int8 in registers: no memory, only the units
//
// The caller times them: a call works through everything once and returns when the last thread is done.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "amx.h"
#include "lanes.h"

namespace glm::limits {

using Line = uint64_t __attribute__((vector_size(64), may_alias));  // of a cache; the compiler cuts it into registers

constexpr size_t kAhead = 2048;                      // bytes; nearer loses some per cent, farther changes nothing
constexpr size_t kStep = 4 * sizeof(Line);           // bytes of a round, each line with a sum of its own
constexpr int kChains = kParts == 1 ? 12 : 4;        // sums in flight: enough for the units, and they fit the registers
constexpr int kProductsOfChain = 4 * kLanes;

inline uint64_t sum_lines(const char* data, size_t bytes) {
    Line sums[4] = {};
    for (size_t at = 0; at + kStep <= bytes; at += kStep) {
        for (int part = 0; part < 4; ++part) {
            const char* line = data + at + part * sizeof(Line);
            __builtin_prefetch(line + kAhead, 0, 3);
            sums[part] += *reinterpret_cast<const Line*>(line);
        }
    }
    const Line sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    uint64_t total = 0;
    for (size_t place = 0; place < sizeof(Line) / sizeof(uint64_t); ++place) total += sum[place];
    return total;
}

inline int32_t sum_of_lanes(const Ints& a) {
    int32_t numbers[kLanes], total = 0;
    store(numbers, a);
    for (int32_t number : numbers) total += number;
    return total;
}

// The result only keeps the compiler from leaving it all out. The four numbers of each chain lie in memory that "may have
// changed", or the products would be computed once; reading them costs nothing beside the products.
template <size_t... chain>
inline int32_t dots(int64_t rounds, std::index_sequence<chain...>) {
    Ints sums[] = {spread(static_cast<int32_t>(chain))...};
    int8_t numbers[sizeof...(chain)][4] = {};
    const uint8_t bytes[4 * kLanes] = {};
    const Bytes weights = load_bytes(bytes);
    for (int64_t round = 0; round < rounds; ++round) {
        asm volatile("" : "+m"(numbers));
        (add_dot4(sums[chain], weights, numbers[chain]), ...);
    }
    return (sum_of_lanes(sums[chain]) + ...);
}

constexpr int64_t kRoundProducts = kChains * kProductsOfChain;

#if defined(__AMX_INT8__) && !defined(GLM_EMULATE_TILES)

// Four tiles of results from two tiles of each side: what comes next never waits for what went before.
constexpr int64_t kTileRoundProducts = 4ll * kSide * kSide * kTileColumns;

inline void tile_dots(int64_t rounds) {
    amx::configure(kTileConfiguration);
    amx::zero<0>(), amx::zero<1>(), amx::zero<2>(), amx::zero<3>();
    amx::zero<4>(), amx::zero<5>(), amx::zero<6>(), amx::zero<7>();
    for (int64_t round = 0; round < rounds; ++round) {
        amx::dot<true, 0, 4, 6>(), amx::dot<true, 1, 4, 7>(), amx::dot<true, 2, 5, 6>(), amx::dot<true, 3, 5, 7>();
    }
    amx::release();
}

#else

constexpr int64_t kTileRoundProducts = 0;

inline void tile_dots(int64_t) {}

#endif

}  // namespace glm::limits

extern "C" {

// Reads a buffer once, 256 bytes at a time. Returns the sum of the 64-bit words that were read.
uint64_t glm_read_bandwidth(const void* data, size_t bytes, int threads) {
    const size_t share = bytes / threads / glm::limits::kStep * glm::limits::kStep;
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        total += glm::limits::sum_lines(static_cast<const char*>(data) + thread * share, share);
    }
    return total;
}

// Computes products of int8 in all threads, on tiles where there are some. Returns how many multiplications and additions
// that were.
int64_t glm_int8_peak(int64_t rounds, int threads) {
    using namespace glm::limits;
    const bool tiles = kTileRoundProducts != 0 && glm::takes_tiles(glm::kTileVectors);
    int32_t kept = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : kept) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        if (tiles) {
            tile_dots(rounds);
        } else {
            kept += dots(rounds, std::make_index_sequence<kChains>());
        }
    }
    volatile int32_t sink = kept;
    (void)sink;
    return 2 * (tiles ? kTileRoundProducts : kRoundProducts) * rounds * threads;
}

}  // extern "C"

// The tile instructions that amx.h uses, in plain C++, for tests on CPUs that have none: what Intel's manual says of them,
// with an abort where the CPU would fault.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, TILEZERO, TILELOADD,
// TILESTORED, TILERELEASE, TDPBSSD, TDPBSUD.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace glm {
namespace amx {

constexpr int kRegisters = 8, kMostRows = 16, kMostBytes = 64;

struct Registers {
    bool configured = false;
    int rows[kRegisters] = {}, bytes[kRegisters] = {};  // of a row
    uint8_t data[kRegisters][kMostRows][kMostBytes] = {};
};

// Every thread has registers of its own.
[[gnu::visibility("hidden")]] inline Registers& registers() {
    static thread_local Registers all;
    return all;
}

inline void demand(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "tile fault: %s\n", what);
    std::abort();
}

inline int used(int tile) {
    const Registers& all = registers();
    demand(all.configured, "a tile is used without a configuration");
    demand(all.rows[tile] > 0, "a tile is used that the configuration leaves out");
    return tile;
}

// The 64 bytes: palette, start row, 14 zeros, 16 x uint16 bytes of a row, 16 x uint8 rows.
template <class Layout>
inline void configure(const Layout& layout) {
    static_assert(sizeof layout == 64, "the instruction reads 64 bytes");
    uint8_t bytes[64];
    std::memcpy(bytes, &layout, sizeof bytes);
    demand(bytes[0] == 1 && bytes[1] == 0, "palette 1, from row 0 on, is the one that is modelled");
    for (int i = 2; i < 16; ++i) demand(bytes[i] == 0, "reserved bytes are not zero");
    registers() = Registers();
    registers().configured = true;
    for (int tile = 0; tile < 16; ++tile) {
        const int width = bytes[16 + 2 * tile] | bytes[17 + 2 * tile] << 8, rows = bytes[48 + tile];
        demand((width == 0) == (rows == 0), "a tile has rows without bytes, or bytes without rows");
        demand(tile < kRegisters || rows == 0, "there are eight tiles");
        demand(width <= kMostBytes && rows <= kMostRows, "a tile is too large");
        if (tile < kRegisters) registers().rows[tile] = rows;
        if (tile < kRegisters) registers().bytes[tile] = width;
    }
}

inline void release() { registers() = Registers(); }

template <int kTile>
inline void zero() {
    static_assert(kTile < kRegisters, "there are eight tiles");
    std::memset(registers().data[used(kTile)], 0, sizeof registers().data[kTile]);
}

template <int kTile>
inline void load(const void* from, size_t stride) {
    zero<kTile>();  // rows and bytes beyond the configured ones
    Registers& all = registers();
    for (int row = 0; row < all.rows[kTile]; ++row) {
        std::memcpy(all.data[kTile][row], static_cast<const uint8_t*>(from) + row * stride, all.bytes[kTile]);
    }
}

template <int kTile>
inline void store(void* to, size_t stride) {
    const Registers& all = registers();
    used(kTile);
    for (int row = 0; row < all.rows[kTile]; ++row) {
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, all.data[kTile][row], all.bytes[kTile]);
    }
}

// TDPBSUD and TDPBSSD: C[m][n] += sum over k, i of A[m][4k + i] B[k][4n + i], modulo 2**32.
template <bool kUnsigned, int kC, int kA, int kB>
inline void dot() {
    static_assert(kC != kA && kC != kB && kA != kB, "the three tiles differ");
    Registers& all = registers();
    used(kC), used(kA), used(kB);
    demand(all.rows[kC] == all.rows[kA] && all.bytes[kC] == all.bytes[kB], "C has A's rows and B's columns");
    demand(all.bytes[kA] % 4 == 0 && all.bytes[kB] % 4 == 0 && all.bytes[kA] / 4 == all.rows[kB], "A's columns are B's rows");
    const int columns = all.bytes[kC] / 4;
    for (int m = 0; m < all.rows[kC]; ++m) {
        uint32_t sums[kMostBytes / 4];
        std::memcpy(sums, all.data[kC][m], sizeof sums);
        for (int k = 0; k < all.bytes[kA] / 4; ++k) {
            for (int n = 0; n < columns; ++n) {
                for (int i = 0; i < 4; ++i) {
                    const uint8_t b = all.data[kB][k][4 * n + i];
                    const int weight = kUnsigned ? b : static_cast<int8_t>(b);
                    sums[n] += static_cast<uint32_t>(static_cast<int8_t>(all.data[kA][m][4 * k + i]) * weight);
                }
            }
        }
        std::memset(all.data[kC][m], 0, kMostBytes);
        std::memcpy(all.data[kC][m], sums, all.bytes[kC]);
    }
}

// TDPBF16PS: C[m][n] += sum over k, i of A[m][2k + i] B[k][2n + i], of bfloat16 into float32.
template <int kC, int kA, int kB>
inline void dot_bfloat16() {
    static_assert(kC != kA && kC != kB && kA != kB, "the three tiles differ");
    Registers& all = registers();
    used(kC), used(kA), used(kB);
    demand(all.rows[kC] == all.rows[kA] && all.bytes[kC] == all.bytes[kB], "C has A's rows and B's columns");
    demand(all.bytes[kA] / 4 == all.rows[kB], "A's pairs are B's rows");
    const auto number = [](const uint8_t* at) {
        const uint32_t bits = static_cast<uint32_t>(at[0] | at[1] << 8) << 16;
        float out;
        std::memcpy(&out, &bits, sizeof out);
        return out;
    };
    for (int m = 0; m < all.rows[kC]; ++m) {
        for (int n = 0; n < all.bytes[kC] / 4; ++n) {
            float sum;
            std::memcpy(&sum, all.data[kC][m] + 4 * n, sizeof sum);
            for (int k = 0; k < all.rows[kB]; ++k) {
                for (int i = 0; i < 2; ++i) sum += number(all.data[kA][m] + 4 * k + 2 * i) * number(all.data[kB][k] + 4 * n + 2 * i);
            }
            std::memcpy(all.data[kC][m] + 4 * n, &sum, sizeof sum);
        }
    }
}

// As if the system had refused, for the test of what happens then.
inline bool permitted() { return std::getenv("GLM_TEST_TILES_REFUSED") == nullptr; }

}  // namespace amx
}  // namespace glm

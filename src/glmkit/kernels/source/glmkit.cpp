// What Python calls, as plain C functions. Nothing here allocates what it does not free, throws, or keeps state.

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "amx.h"
#include "bandwidth.h"
#include "decoder.h"
#include "linear.h"
#include "numbers.h"

using namespace glm;

extern "C" {

int glm_abi() { return 2; }

// 0: built without tiles, 1: many vectors are multiplied on them, 2: the system refuses them, so vectors do all.
int glm_tiles() { return !kHasTiles ? 0 : takes_tiles(kTileVectors) ? 1 : 2; }

// Official rows, int8 (n, k) or int4 (n, k/2), to blocks of the same size; n is a multiple of 16, k of 32.
void glm_pack(int kind, int n, int k, const void* rows, void* blocks, int threads) {
    const size_t bytes = static_cast<size_t>(k / kGroup) * block_bytes(kind);
#pragma omp parallel for num_threads(threads)
    for (int n16 = 0; n16 < n / kBlockRows; ++n16) {
        relay_block_row<true>(kind, k, static_cast<const uint8_t*>(rows) + n16 * bytes, static_cast<uint8_t*>(blocks) + n16 * bytes);
    }
}

void glm_unpack(int kind, int n, int k, const void* blocks, void* rows, int threads) {
    const size_t bytes = static_cast<size_t>(k / kGroup) * block_bytes(kind);
#pragma omp parallel for num_threads(threads)
    for (int n16 = 0; n16 < n / kBlockRows; ++n16) {
        relay_block_row<false>(kind, k, static_cast<const uint8_t*>(blocks) + n16 * bytes, static_cast<uint8_t*>(rows) + n16 * bytes);
    }
}

// y (m, n) = x (m, k) times the weight's rows, plus its bias; x and y in `dtype`. Returns 0, or 1 without memory.
int glm_linear(const Weight* weight, const void* x, void* y, int m, int dtype, int threads) {
    const Weight w = *weight;
    const bool quantised = is_quantised(w);
    const size_t rounded = quantised ? activation_bytes(m, w.k) : 0;
    const bool copies = !quantised && dtype != kAsFloat32;
    Memory memory = allocate(rounded + (copies ? static_cast<size_t>(m) * w.k * 4 : 0) + 64);
    if (!memory) return 1;
    float* plain = copies ? reinterpret_cast<float*>(memory.get()) : nullptr;
    Activations a = make_activations(copies ? plain : static_cast<const float*>(x), m, w.k, memory.get());
    const int blocks = row_blocks(w), share_blocks = blocks_at_once(a, blocks, threads), shares = (blocks + share_blocks - 1) / share_blocks;
    const int columns = share_blocks * kBlockRows;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Memory own = allocate((dtype == kAsFloat32 ? 0 : static_cast<size_t>(m) * columns * 4) + static_cast<size_t>(w.k) * 4 + 64);
        failed = !own;
        float* row = reinterpret_cast<float*>(own.get());
        float* stripe = row + (w.k + 15) / 16 * 16;
        if (quantised || copies) {
#pragma omp for schedule(static)
            for (int i = 0; i < m; ++i) {
                if (failed) continue;
                widen(x, static_cast<size_t>(i) * w.k, w.k, dtype, copies ? plain + static_cast<size_t>(i) * w.k : row);
                if (quantised) round_row(a, i, row);
            }
        }
#pragma omp for schedule(dynamic)
        for (int share = 0; share < shares; ++share) {
            if (failed) continue;
            const int first = share * share_blocks, last = std::min(first + share_blocks, blocks);
            if (dtype == kAsFloat32) {
                product(w, a, static_cast<float*>(y), w.n, first, last);
                continue;
            }
            const int start = first * kBlockRows, width = std::min(last * kBlockRows, w.n) - start;
            product(w, a, stripe - start, columns, first, last);
            for (int i = 0; i < m; ++i) narrow(stripe + static_cast<size_t>(i) * columns, width, dtype, y, static_cast<size_t>(i) * w.n + start);
        }
    }
    return failed;
}

}  // extern "C"

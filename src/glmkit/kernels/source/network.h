// What decoder.h works on: the network, the cache and a step as Python describes them (kernels/decoder.py mirrors these
// structures), and the memory of a call.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "linear.h"

namespace glm {

// The network, as Python describes it; see engine/native.py for what is allowed.
struct Block {
    const float *input_norm, *post_norm;  // (hidden)
    Weight query_key_value, dense, up, down;
};

struct Decoder {
    int32_t layers, hidden, inner, heads, groups, width, rotated, vocabulary;
    int32_t table_dtype;
    float eps;
    int64_t bytes;  // of all weights
    const void* table;
    const float* final_norm;
    const Block* blocks;
    Weight output;
};

// One layer's part of the cache: (rows, groups, capacity, width); row and group lie so many numbers apart.
struct CacheLayer {
    void *keys, *values;
    int64_t row, group;
};

// A row with a cache of its own, of any length: its part of the batch (rows = 1) in each layer.
struct OwnRow {
    const CacheLayer* cache;  // one for each layer
    int64_t filled;           // tokens in it before
};

// What a call is to do.
struct Step {
    int32_t rows, tokens;  // B and T
    int32_t filled;        // tokens in the cache before
    int32_t cache_dtype;
    int32_t keep;          // last positions that get logits
    int32_t angles;        // positions in the tables
    const int64_t* ids;         // (B, T)
    const int64_t* positions;   // (B, T); null: counted from `filled`
    const int64_t* mask;        // (B, filled + T), 0 for padding on the left; null: none
    const float *cosines, *sines;  // (angles, rotated / 2)
    const CacheLayer* cache;    // one for each layer
    const OwnRow* own_rows;     // (B), instead of `cache`, `filled` and a mask; null: all rows are in `cache`
    float* hidden;              // (B*T, hidden); null: kept inside
    void* queries;              // (B, T, heads, width) in the cache's dtype; the halves of a block only
    const void* context;        // the same, of what attention gave
    float* logits;              // (B, keep, vocabulary)
};

enum Problem { kFine = 0, kNoMemory = 1, kMaskOfOtherShape = 2, kNoSuchToken = 3, kNoSuchPosition = 4 };

// Memory of a call: first measured, then handed out.
class Layout {
  public:
    explicit Layout(char* start) : start(start) {}
    template <class Number>
    Number* take(size_t count) {
        char* here = start + used;
        used += (count * sizeof(Number) + 63) / 64 * 64;
        return start ? reinterpret_cast<Number*>(here) : nullptr;
    }
    size_t used = 0;

  private:
    char* start;
};

// The vectors that a product reads: as they are for float weights, rounded for quantised ones.
struct Vectors {
    float* plain = nullptr;
    char* rounded = nullptr;

    Vectors() = default;
    Vectors(Layout& layout, int m, int k, bool floats)
        : plain(layout.take<float>(floats ? static_cast<size_t>(m) * k : 0)),
          rounded(layout.take<char>(std::max(activation_bytes(m, k), activation_bytes(std::min(m, kTileVectors - 1), k)))) {}

    Activations of(const Weight& w, int m) const { return make_activations(plain, m, w.k, rounded); }

    // Columns `first` up to `first + count` of vector `row`; for quantised weights whole groups of `rounding_columns`.
    void put(const Weight& w, int m, int row, int first, int count, const float* values) const {
        if (!is_quantised(w)) {
            std::copy(values, values + count, plain + static_cast<size_t>(row) * w.k + first);
            return;
        }
        round_columns(of(w, m), row, first, count, values);
    }
};

}  // namespace glm

// The ChatGLM2, ChatGLM3 and GLM-4 network for some new tokens behind a cache, in one call.
//
//     ids -> embedding -> x (m, hidden) float32, the residual stream; m = rows * tokens
//     each block, its stages shared out between the threads, a barrier after each:
//         norm       RMSNorm of x, rounded to int8 if the next product is quantised
//         qkv        product, rotary of neighbouring pairs; keys and values go to the cache, queries to their lanes
//         attention  ranges of keys (attention.h);  then the ranges added up
//         dense      product, added to x
//         norm
//         up         product of gate and up side by side, silu(gate) * up
//         down       product, added to x
//     last positions -> norm -> output product -> logits (rows, keep, vocabulary) float32
//
// For long prompts torch's attention over whole matrices is faster, so a block can also be called in two halves, around
// it. What a token gets depends on its row's tokens up to itself alone: not on padding, other rows, tokens behind it.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "amx.h"
#include "attention.h"
#include "linear.h"
#include "network.h"
#include "numbers.h"
#include "team.h"

namespace glm {

constexpr int64_t kBytesForTwo = 4 << 20;  // of weights: with less a second thread costs more than it brings
constexpr int kPanelFloats = 1 << 16;      // of a product's result that a thread finishes at once; stays in its cache
constexpr int kNormColumns = 256;          // of a vector: an item of the norm's stage, whole groups of rounding_columns

class Run {
  public:
    Run(const Decoder& d, const Step& s, int threads)
        : d(d), s(s), m(s.rows * s.tokens), each(d.heads / d.groups), blocks((s.tokens * each + kLanes - 1) / kLanes),
          threads(d.bytes * m < kBytesForTwo ? 1 : threads), lanes_are_tiles(use_tiles(s.cache_dtype, d.width)) {}

    // Why the call cannot be done, or kFine.
    Problem problem() const {
        for (int i = 0; s.ids && i < m; ++i) {
            if (s.ids[i] < 0 || s.ids[i] >= d.vocabulary) return kNoSuchToken;
        }
        for (int i = 0; i < m; ++i) {
            if (position(i) < 0 || position(i) >= s.angles) return kNoSuchPosition;
        }
        if (s.mask && s.own_rows) return kMaskOfOtherShape;
        const int columns = s.filled + s.tokens;
        for (int row = 0; s.mask && row < s.rows; ++row) {
            const int64_t* mask = s.mask + static_cast<size_t>(row) * columns;
            for (int column = 1; column < columns; ++column) {
                if (mask[column - 1] && !mask[column]) return kMaskOfOtherShape;
            }
        }
        return kFine;
    }

    // Calls work(run, team) in all threads; false without memory.
    template <class Work>
    bool with_threads(Work work) {
        Layout measured(nullptr);
        lay_out(measured);
        memory = allocate(measured.used + 64);
        if (!memory) return false;
        Layout layout(memory.get());
        lay_out(layout);
        for (int i = 0; i < stages(); ++i) new (counters + i) Counter;
        describe_rows();
        with_team(threads, counters, [&](Team team) { work(*this, team); });
        return true;
    }

    void embed(Team& team) {
        team.share(m, std::max(1, m / team.threads), [&](int first, int last) {
            for (int i = first; i < last; ++i) {
                widen(d.table, static_cast<size_t>(s.ids[i]) * d.hidden, d.hidden, d.table_dtype, x + static_cast<size_t>(i) * d.hidden);
            }
        });
    }

    void before_attention(Team& team, int layer) {
        const Block& block = d.blocks[layer];
        norm(team, block.input_norm, block.query_key_value, m, [](int i) { return i; });
        products(team, block.query_key_value, narrow_vectors, 1, [&](const float* panel, int stride, int first, int last) {
            for (int i = 0; i < m; ++i) finish_qkv(layer, i, const_cast<float*>(panel) + static_cast<size_t>(i) * stride, first, last);
        });
    }

    void attention(Team& team, int layer) {
        team.share(first_tasks[s.rows], 1, [&](int task, int) { attend(team, layer, task); });
        const Weight& next = d.blocks[layer].dense;
        const int unit = unit_of(next), heads = std::min(d.heads, unit / std::gcd(unit, d.width));  // that make whole groups
        const int parts = (d.heads + heads - 1) / heads;
        team.share(m * parts, 1, [&](int item, int) {
            const int i = item / parts, head = item % parts * heads, count = std::min(heads, d.heads - head);
            float* values = panel_of(team);
            for (int h = 0; h < count; ++h) gather(i, head + h, values + h * d.width);
            narrow_vectors.put(next, m, i, head * d.width, count * d.width, values);
        });
    }

    // What torch's attention gave takes the place of ours.
    void take_context(Team& team, int layer) {
        const Weight& next = d.blocks[layer].dense;
        team.share(m, 1, [&](int i, int) {
            float* values = panel_of(team);
            widen(s.context, static_cast<size_t>(i) * next.k, next.k, s.cache_dtype, values);
            narrow_vectors.put(next, m, i, 0, next.k, values);
        });
    }

    void after_attention(Team& team, int layer) {
        const Block& block = d.blocks[layer];
        add_product(team, block.dense, narrow_vectors);
        norm(team, block.post_norm, block.up, m, [](int i) { return i; });
        gated_product(team, block.up, block.down);
        add_product(team, block.down, wide_vectors);
    }

    void logits(Team& team) {
        const int kept = s.rows * s.keep;
        norm(team, d.final_norm, d.output, kept, [&](int i) { return i / s.keep * s.tokens + s.tokens - s.keep + i % s.keep; });
        const Activations a = narrow_vectors.of(d.output, kept);
        const int count = row_blocks(d.output), grain = std::max(1, std::min(64, count / (8 * team.threads)));
        team.share(count, grain, [&](int first, int last) { product(d.output, a, s.logits, d.output.n, first, last); });
    }

  private:
    int unit_of(const Weight& next) const { return is_quantised(next) ? rounding_columns(m) : 1; }
    int filled(int row) const { return s.own_rows ? static_cast<int>(s.own_rows[row].filled) : s.filled; }
    int64_t position(int i) const { return s.positions ? s.positions[i] : filled(i / s.tokens) + i % s.tokens; }
    const CacheLayer& cache_of(int row, int layer) const { return s.own_rows ? s.own_rows[row].cache[layer] : s.cache[layer]; }
    size_t place_of(const CacheLayer& cache, int row, int group) const { return (s.own_rows ? 0 : row * cache.row) + group * cache.group; }
    int ranges(int row) const { return (filled(row) + s.tokens + kRangeKeys - 1) / kRangeKeys; }
    int stages() const { return 9 * d.layers + 4; }
    int panel_floats() const { return std::max({kPanelFloats, 2 * rounding_columns(m) * m, d.heads * d.width, d.inner}); }

    static bool use_tiles([[maybe_unused]] int dtype, [[maybe_unused]] int width) {
#if defined(GLM_TILES)
        return TileAttention::takes(dtype, width);
#else
        return false;
#endif
    }

    size_t attention_floats() const {
#if defined(GLM_TILES)
        return std::max(PlainAttention::floats(d.width), TileAttention::floats(d.width));
#else
        return PlainAttention::floats(d.width);
#endif
    }

    void lay_out(Layout& layout) {
        counters = layout.take<Counter>(stages());
        pads = layout.take<int>(s.rows);
        first_tasks = layout.take<int>(s.rows + 1);
        x = s.hidden ? s.hidden : layout.take<float>(static_cast<size_t>(m) * d.hidden);
        narrow_vectors = Vectors(layout, m, std::max(d.hidden, d.heads * d.width), has_floats());
        wide_vectors = Vectors(layout, m, d.inner, has_floats());
        own_floats = (panel_floats() + 15) / 16 * 16 + (attention_floats() + 15) / 16 * 16;
        own = layout.take<float>(own_floats * threads);
        if (s.queries || s.context) return;
        size_t all_ranges = 0;
        for (int row = 0; row < s.rows; ++row) all_ranges += ranges(row);
        const size_t of_row = static_cast<size_t>(d.groups) * blocks;
        queries = layout.take<float>(s.rows * of_row * kLanes * d.width);
        partials = layout.take<float>(all_ranges * of_row * Partial::floats(d.width));
    }

    bool has_floats() const {
        bool found = !is_quantised(d.output);
        for (int layer = 0; layer < d.layers; ++layer) {
            const Block& block = d.blocks[layer];
            for (const Weight* w : {&block.query_key_value, &block.dense, &block.up, &block.down}) found |= !is_quantised(*w);
        }
        return found;
    }

    void describe_rows() {
        first_tasks[0] = 0;
        for (int row = 0; row < s.rows; ++row) {
            first_tasks[row + 1] = first_tasks[row] + d.groups * blocks * ranges(row);
            const int columns = s.filled + s.tokens;
            const int64_t* mask = s.mask ? s.mask + static_cast<size_t>(row) * columns : nullptr;
            pads[row] = mask ? static_cast<int>(std::find_if(mask, mask + columns, [](int64_t one) { return one != 0; }) - mask) : 0;
        }
    }

    float* panel_of(const Team& team) const { return own + own_floats * team.thread; }

    // RMSNorm of `count` vectors, number `which(i)` of x, ready for the product with `next`.
    template <class Which>
    void norm(Team& team, const float* weight, const Weight& next, int count, Which which) {
        const int parts = (d.hidden + kNormColumns - 1) / kNormColumns, items = count * parts;
        team.share(items, std::max(1, items / (2 * team.threads)), [&](int first, int last) {
            float inverse = 0.0f;
            for (int item = first; item < last; ++item) {
                const int i = item / parts, part = item % parts;
                const float* vector = x + static_cast<size_t>(which(i)) * d.hidden;
                if (item == first || part == 0) inverse = 1.0f / std::sqrt(square_sum(vector, d.hidden) / d.hidden + d.eps);
                const int start = part * kNormColumns, size = std::min(kNormColumns, d.hidden - start);
                float values[kNormColumns];
                for (int c = 0; c < size; ++c) values[c] = weight[start + c] * (vector[start + c] * inverse);
                narrow_vectors.put(next, count, i, start, size, values);
            }
        });
    }

    static float square_sum(const float* x, int count) {
        Floats sums[4] = {spread(0.0f), spread(0.0f), spread(0.0f), spread(0.0f)};
        int c = 0;
        for (; c + kLanes <= count; c += kLanes) {
            const Floats numbers = load(x + c);
            sums[c / kLanes % 4] = fused(numbers, numbers, sums[c / kLanes % 4]);
        }
        float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; c < count; ++c) total += x[c] * x[c];
        return total;
    }

    // Block rows that a thread multiplies at once, a multiple of `unit`: many for few vectors, so that memory is read in
    // long lines, few for many, so that the result is finished while it is in the cache.
    int grain(const Team& team, int count, int unit, int columns_of_block) const {
        if (takes_tiles(m)) return std::max(unit, std::min(16, (count + team.threads - 1) / team.threads));
        const int shared = count / (8 * team.threads), fits = panel_floats() / (m * columns_of_block);
        return std::max(unit, std::min({shared, fits, 64}) / unit * unit);
    }

    // finish(panel, stride, first, last) gets rows first to last of the product, as panel[vector * stride + row - first].
    template <class Finish>
    void products(Team& team, const Weight& w, const Vectors& vectors, int unit, Finish finish) {
        const Activations a = vectors.of(w, m);
        const int count = row_blocks(w), size = grain(team, count, unit, kBlockRows), stride = size * kBlockRows;
        team.share(count, size, [&](int first, int last) {
            float* panel = panel_of(team);
            product(w, a, panel - first * kBlockRows, stride, first, last);
            finish(panel, stride, first * kBlockRows, std::min(last * kBlockRows, w.n));
        });
    }

    void add_product(Team& team, const Weight& w, const Vectors& vectors) {
        products(team, w, vectors, 1, [&](const float* panel, int stride, int first, int last) {
            for (int i = 0; i < m; ++i) {
                float* to = x + static_cast<size_t>(i) * d.hidden + first;
                const float* from = panel + static_cast<size_t>(i) * stride;
                for (int c = 0; c < last - first; ++c) to[c] += from[c];
            }
        });
    }

    // Gate and up are the halves of one weight: the same block rows of both, then silu(gate) * up.
    void gated_product(Team& team, const Weight& w, const Weight& next) {
        const Activations a = narrow_vectors.of(w, m);
        const int count = d.inner / kBlockRows, unit = std::max(1, unit_of(next) / kBlockRows);
        const int size = grain(team, count, unit, 2 * kBlockRows), stride = 2 * size * kBlockRows;
        team.share(count, size, [&](int first, int last) {
            float *gates = panel_of(team), *ups = gates + size * kBlockRows;
            const int start = first * kBlockRows, columns = (last - first) * kBlockRows;
            product(w, a, gates - start, stride, first, last);
            product(w, a, ups - start - d.inner, stride, count + first, count + last);
            for (int i = 0; i < m; ++i, gates += stride, ups += stride) {
                for (int c = 0; c < columns; c += kLanes) {
                    const Floats gate = load(gates + c);
                    store(gates + c, load(ups + c) * gate / (spread(1.0f) + exponential(spread(0.0f) - gate)));
                }
                wide_vectors.put(next, m, i, start, columns, gates);
            }
        });
    }

    // e^x, with an end: what silu makes of a gate below -80 is 0 for every purpose.
    static Floats exponential(const Floats& x) { return power_of_two(smaller(spread(80.0f), x) * spread(1.44269504f)); }

    // Rows first to last of vector i's queries, keys and values: rotated, then each to its place.
    void finish_qkv(int layer, int i, float* numbers, int first, int last) {
        const int all_queries = d.heads * d.width, all_keys = d.groups * d.width;
        for (int start = first; start < last;) {
            const int head = start / d.width, channel = start % d.width, count = std::min(d.width - channel, last - start);
            float* values = numbers + (start - first);
            if (start < all_queries + all_keys) rotate(values, channel, count, position(i));
            if (start < all_queries) {
                put_queries(i, head, channel, count, values);
            } else {
                const bool is_key = start < all_queries + all_keys;
                const int group = head - d.heads - (is_key ? 0 : d.groups);
                put_in_cache(layer, i, group, channel, count, values, is_key);
            }
            start += count;
        }
    }

    void rotate(float* values, int channel, int count, int64_t position) const {
        const float* cosines = s.cosines + position * (d.rotated / 2);
        const float* sines = s.sines + position * (d.rotated / 2);
        const int last = std::min(count, d.rotated - channel);
        for (int c = 0; c < last; c += 2) {
            const float even = values[c], odd = values[c + 1], cosine = cosines[(channel + c) / 2], sine = sines[(channel + c) / 2];
            values[c] = even * cosine - odd * sine;
            values[c + 1] = odd * cosine + even * sine;
        }
    }

    void put_queries(int i, int head, int channel, int count, const float* values) {
        if (s.queries) {
            narrow(values, count, s.cache_dtype, s.queries, (static_cast<size_t>(i) * d.heads + head) * d.width + channel);
            return;
        }
        const int row = i / s.tokens, pair = i % s.tokens * each + head % each, lane = pair % kLanes;
        float* to = lanes_of((row * d.groups + head / each) * blocks + pair / kLanes);
        const float scale = 1.44269504f / std::sqrt(static_cast<float>(d.width));
        for (int c = 0; c < count; c += 2) {
            const float even = values[c] * scale, odd = values[c + 1] * scale;
#if defined(GLM_TILES)
            if (lanes_are_tiles) {
                TileAttention::put_query(to, channel + c, lane, even, odd);
                continue;
            }
#endif
            PlainAttention::put_query(to, channel + c, lane, even, odd);
        }
    }

    void put_in_cache(int layer, int i, int group, int channel, int count, const float* values, bool is_key) const {
        const int row = i / s.tokens;
        const CacheLayer& cache = cache_of(row, layer);
        const size_t at = place_of(cache, row, group) + static_cast<size_t>(filled(row) + i % s.tokens) * d.width;
        narrow(values, count, s.cache_dtype, is_key ? cache.keys : cache.values, at + channel);
    }

    float* lanes_of(int task) { return queries + static_cast<size_t>(task) * kLanes * d.width; }

    // Task: row, group, lanes, range, the last fastest. Rows have as many ranges as they are long.
    void attend(const Team& team, int layer, int task) {
        const int row = static_cast<int>(std::upper_bound(first_tasks, first_tasks + s.rows, task) - first_tasks) - 1;
        const int in_row = task - first_tasks[row], range = in_row % ranges(row), block = in_row / ranges(row) % blocks;
        const int group = in_row / ranges(row) / blocks, visible = filled(row) + s.tokens - pads[row];
        float* const lanes_queries = lanes_of((row * d.groups + group) * blocks + block);
        float limits[kLanes];
        float most = 0.0f;
        for (int lane = 0; lane < kLanes; ++lane) {
            const int token = (block * kLanes + lane) / each;
            limits[lane] = token < s.tokens ? static_cast<float>(visible - s.tokens + 1 + token) : 0.0f;
            most = std::max(most, limits[lane]);
        }
        const int first = range * kRangeKeys, last = std::min(first + kRangeKeys, static_cast<int>(most));
        const Partial to = Partial::at(partials + static_cast<size_t>(task) * Partial::floats(d.width));
        if (first >= last) {
            store(to.largest, spread(kNothing));
            std::fill(to.sum, to.values + kLanes * d.width, 0.0f);
            return;
        }
        const CacheLayer& cache = cache_of(row, layer);
        const size_t bytes = s.cache_dtype == kAsFloat32 ? 4 : 2;
        const size_t at = (place_of(cache, row, group) + static_cast<size_t>(pads[row]) * d.width) * bytes;
        const Keys keys{static_cast<const char*>(cache.keys) + at, static_cast<const char*>(cache.values) + at, s.cache_dtype, d.width};
        float* scratch = panel_of(team) + own_floats - (attention_floats() + 15) / 16 * 16;
#if defined(GLM_TILES)
        if (lanes_are_tiles) return TileAttention::run(keys, lanes_queries, limits, first, last, scratch, to);
#endif
        const int pairs = s.tokens * each;
        if (NarrowAttention::takes(pairs, d.width)) return NarrowAttention::run(keys, lanes_queries, limits, pairs, first, last, scratch, to);
        PlainAttention::run(keys, lanes_queries, limits, first, last, scratch, to);
    }

    // Vector i's result of one head.
    void gather(int i, int head, float* to) {
        const int row = i / s.tokens, pair = i % s.tokens * each + head % each;
        const int first = first_tasks[row] + (head / each * blocks + pair / kLanes) * ranges(row);
        const size_t stride = Partial::floats(d.width);
        combine(partials + first * stride, stride, ranges(row), pair % kLanes, d.width, to);
    }

    const Decoder& d;
    const Step& s;
    const int m, each, blocks;  // vectors; heads of a group; sixteens of (token, head) pairs of a group
    const int threads;
    const bool lanes_are_tiles;
    Memory memory;
    Counter* counters = nullptr;
    int* pads = nullptr;  // columns of padding of each row
    float* x = nullptr;
    Vectors narrow_vectors, wide_vectors;  // of the width of hidden or all heads; of inner
    float* own = nullptr;  // each thread's panel, then what attention needs
    size_t own_floats = 0;
    float *queries = nullptr, *partials = nullptr;
    int* first_tasks = nullptr;  // of attention, of each row; behind the last row's, their number
};

}  // namespace glm

extern "C" {

// All of it: ids to logits, keys and values into the cache. Returns a glm::Problem; then nothing was changed.
int glm_decode(const glm::Decoder* decoder, const glm::Step* step, int threads) {
    glm::Run run(*decoder, *step, threads);
    if (const glm::Problem problem = run.problem()) return problem;
    const bool done = run.with_threads([&](glm::Run& all, glm::Team team) {
        all.embed(team);
        for (int layer = 0; layer < decoder->layers; ++layer) {
            all.before_attention(team, layer);
            all.attention(team, layer);
            all.after_attention(team, layer);
        }
        all.logits(team);
    });
    return done ? glm::kFine : glm::kNoMemory;
}

// The parts of a long prompt: ids to hidden; hidden to queries, keys and values; attention's result to hidden; logits.
int glm_embed(const glm::Decoder* decoder, const glm::Step* step, int threads) {
    glm::Run run(*decoder, *step, threads);
    if (const glm::Problem problem = run.problem()) return problem;
    return run.with_threads([&](glm::Run& all, glm::Team team) { all.embed(team); }) ? glm::kFine : glm::kNoMemory;
}

int glm_before_attention(const glm::Decoder* decoder, const glm::Step* step, int layer, int threads) {
    glm::Run run(*decoder, *step, threads);
    return run.with_threads([&](glm::Run& all, glm::Team team) { all.before_attention(team, layer); }) ? glm::kFine : glm::kNoMemory;
}

int glm_after_attention(const glm::Decoder* decoder, const glm::Step* step, int layer, int threads) {
    glm::Run run(*decoder, *step, threads);
    const bool done = run.with_threads([&](glm::Run& all, glm::Team team) {
        all.take_context(team, layer);
        all.after_attention(team, layer);
    });
    return done ? glm::kFine : glm::kNoMemory;
}

int glm_logits(const glm::Decoder* decoder, const glm::Step* step, int threads) {
    glm::Run run(*decoder, *step, threads);
    return run.with_threads([&](glm::Run& all, glm::Team team) { all.logits(team); }) ? glm::kFine : glm::kNoMemory;
}

}  // extern "C"

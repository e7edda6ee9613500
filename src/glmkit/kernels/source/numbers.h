// Numbers in the dtypes that torch hands over, and memory that frees itself.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "lanes.h"

namespace glm {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

inline Memory allocate(size_t bytes) { return Memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))); }

enum Dtype { kAsFloat32 = 0, kAsBFloat16 = 1, kAsFloat16 = 2 };

// Numbers from number `at` of `x` on, as float32; and back.
inline void widen(const void* x, size_t at, int count, int dtype, float* to) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        if (dtype == kAsFloat32) store(to + i, load(static_cast<const float*>(x) + at + i));
        if (dtype == kAsBFloat16) store(to + i, load_bfloat16(static_cast<const uint16_t*>(x) + at + i));
        if (dtype == kAsFloat16) store(to + i, load_float16(static_cast<const uint16_t*>(x) + at + i));
    }
    for (; i < count; ++i) {
        if (dtype == kAsFloat32) to[i] = static_cast<const float*>(x)[at + i];
        if (dtype == kAsBFloat16) to[i] = from_bfloat16(static_cast<const uint16_t*>(x)[at + i]);
        if (dtype == kAsFloat16) to[i] = from_float16(static_cast<const uint16_t*>(x)[at + i]);
    }
}

inline void narrow(const float* x, int count, int dtype, void* to, size_t at) {
    if (dtype == kAsFloat32) {
        std::memcpy(static_cast<float*>(to) + at, x, count * sizeof(float));
        return;
    }
    uint16_t* numbers = static_cast<uint16_t*>(to) + at;
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        if (dtype == kAsBFloat16) store_bfloat16(numbers + i, load(x + i));
        if (dtype == kAsFloat16) store_float16(numbers + i, load(x + i));
    }
    for (; i < count; ++i) numbers[i] = dtype == kAsBFloat16 ? to_bfloat16(x[i]) : to_float16(x[i]);
}

}  // namespace glm

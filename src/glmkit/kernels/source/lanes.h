// Sixteen numbers at once, on every CPU: the only header that knows instruction sets.
//
//     Floats   16 x float32        Ints   16 x int32        Bytes   64 x 8 bit, four neighbours for each of the 16 lanes
//
// Each is kParts native vectors: one of 64 bytes with AVX-512, two of 32 with AVX2, four of 16 elsewhere. Arithmetic is
// the compiler's own on such vectors; what it has no operator for (dot products of bytes, 16-bit floats) stands here.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace glm {

#if defined(__AVX512VNNI__)
constexpr int kNativeBytes = 64;
#elif defined(__AVX2__)
constexpr int kNativeBytes = 32;
#else
constexpr int kNativeBytes = 16;
#endif
constexpr int kLanes = 16;
constexpr int kParts = 64 / kNativeBytes;

typedef float NativeFloats __attribute__((vector_size(kNativeBytes), aligned(4), may_alias));
typedef int32_t NativeInts __attribute__((vector_size(kNativeBytes), aligned(4), may_alias));
typedef uint32_t NativeUnsigned __attribute__((vector_size(kNativeBytes), aligned(4), may_alias));

struct Floats {
    NativeFloats part[kParts];
};
struct Ints {
    NativeInts part[kParts];
};
struct Bytes {
    NativeUnsigned part[kParts];
};

// Applies a formula to each native vector of the result; `p` is its number.
#define GLM_EACH(type, formula)                \
    type out;                                  \
    for (int p = 0; p < kParts; ++p) {         \
        out.part[p] = formula;                 \
    }                                          \
    return out

inline Floats operator+(const Floats& a, const Floats& b) { GLM_EACH(Floats, a.part[p] + b.part[p]); }
inline Floats operator-(const Floats& a, const Floats& b) { GLM_EACH(Floats, a.part[p] - b.part[p]); }
inline Floats operator*(const Floats& a, const Floats& b) { GLM_EACH(Floats, a.part[p] * b.part[p]); }
inline Floats operator/(const Floats& a, const Floats& b) { GLM_EACH(Floats, a.part[p] / b.part[p]); }
inline Ints operator+(const Ints& a, const Ints& b) { GLM_EACH(Ints, a.part[p] + b.part[p]); }
inline Ints operator<<(const Ints& a, int bits) { GLM_EACH(Ints, a.part[p] << bits); }

inline Floats spread(float x) { GLM_EACH(Floats, x - NativeFloats{}); }
inline Ints spread(int32_t x) { GLM_EACH(Ints, x - NativeInts{}); }

inline Floats load(const float* x) { GLM_EACH(Floats, reinterpret_cast<const NativeFloats*>(x)[p]); }
inline Ints load_ints(const int32_t* x) { GLM_EACH(Ints, reinterpret_cast<const NativeInts*>(x)[p]); }
inline Bytes load_bytes(const void* x) { GLM_EACH(Bytes, static_cast<const NativeUnsigned*>(x)[p]); }
inline void store(float* to, const Floats& x) { std::memcpy(to, &x, sizeof x); }
inline void store(int32_t* to, const Ints& x) { std::memcpy(to, &x, sizeof x); }

inline Floats larger(const Floats& a, const Floats& b) { GLM_EACH(Floats, a.part[p] > b.part[p] ? a.part[p] : b.part[p]); }
inline Floats smaller(const Floats& a, const Floats& b) { GLM_EACH(Floats, a.part[p] < b.part[p] ? a.part[p] : b.part[p]); }
// `yes` in the lanes where a < b, `no` in the others.
inline Floats where_less(const Floats& a, const Floats& b, const Floats& yes, const Floats& no) {
    GLM_EACH(Floats, a.part[p] < b.part[p] ? yes.part[p] : no.part[p]);
}
inline Floats absolute(const Floats& a) { return larger(a, spread(0.0f) - a); }
inline Floats to_floats(const Ints& a) { GLM_EACH(Floats, __builtin_convertvector(a.part[p], NativeFloats)); }
inline Ints bits_of(const Floats& a) { GLM_EACH(Ints, reinterpret_cast<const NativeInts&>(a.part[p])); }
inline Floats as_floats(const Ints& a) { GLM_EACH(Floats, reinterpret_cast<const NativeFloats&>(a.part[p])); }

inline Bytes low_nibbles(const Bytes& a) { GLM_EACH(Bytes, a.part[p] & 0x0f0f0f0fu); }
inline Bytes high_nibbles(const Bytes& a) { GLM_EACH(Bytes, (a.part[p] >> 4) & 0x0f0f0f0fu); }

// a * b + c, rounded once where the CPU can: the same on every path of a level, so that equal rows stay equal.
inline Floats fused(const Floats& a, const Floats& b, const Floats& c) {
#if defined(__AVX512VNNI__)
    return {{(NativeFloats)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0])}};
#elif defined(__AVX2__)
    GLM_EACH(Floats, (NativeFloats)_mm256_fmadd_ps((__m256)a.part[p], (__m256)b.part[p], (__m256)c.part[p]));
#else
    return a * b + c;
#endif
}

// The nearest whole number, halves to the even one.
inline Ints nearest(const Floats& a) {
#if defined(__AVX512VNNI__)
    return {{(NativeInts)_mm512_cvtps_epi32((__m512)a.part[0])}};
#elif defined(__AVX2__)
    GLM_EACH(Ints, (NativeInts)_mm256_cvtps_epi32((__m256)a.part[p]));
#else
    Ints out;
    for (int p = 0; p < kParts; ++p)
        for (int i = 0; i < kLanes / kParts; ++i) out.part[p][i] = static_cast<int32_t>(std::nearbyintf(a.part[p][i]));
    return out;
#endif
}

// All 16 lanes as one number: the upper half joins the lower half until one is left.
template <class Function>
inline float fold(const Floats& a, Function join) {
    NativeFloats whole = a.part[0];
    if constexpr (kParts == 2) whole = join(a.part[0], a.part[1]);
    if constexpr (kParts == 4) whole = join(join(a.part[0], a.part[2]), join(a.part[1], a.part[3]));
#if defined(__AVX2__)
    __m256 half;
#if defined(__AVX512VNNI__)
    half = join(_mm512_castps512_ps256((__m512)whole), _mm512_extractf32x8_ps((__m512)whole, 1));
#else
    half = (__m256)whole;
#endif
    const __m128 four = join(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = join(four, _mm_movehl_ps(four, four));
    return join(two, _mm_movehdup_ps(two))[0];
#else
    return join(join(whole[0], whole[2]), join(whole[1], whole[3]));
#endif
}

inline float sum(const Floats& a) {
    return fold(a, [](auto x, auto y) { return x + y; });
}

// Lanes as four quads, where the CPU can move them: four numbers from each of four places; the same four in every quad;
// one of each quad's own four in all its lanes.
#if defined(__AVX512VNNI__)
constexpr bool kHasQuads = true;
inline Floats quads(const float* a, const float* b, const float* c, const float* d) {
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(c)), _mm_loadu_ps(d), 1);
    return {{(NativeFloats)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)}};
}
inline Floats same_quads(const float* x) { return {{(NativeFloats)_mm512_broadcast_f32x4(_mm_loadu_ps(x))}}; }
template <int kPlace>
inline Floats spread_in_quads(const Floats& a) {
    return {{(NativeFloats)_mm512_permute_ps((__m512)a.part[0], kPlace * 0x55)}};
}
#else
constexpr bool kHasQuads = false;
inline Floats quads(const float*, const float*, const float*, const float*) { return spread(0.0f); }
inline Floats same_quads(const float*) { return spread(0.0f); }
template <int kPlace>
inline Floats spread_in_quads(const Floats& a) { return a; }
#endif

// Sums of 16 times 16 lanes, each as `sum` adds it up, to the last bit: lane 4 * i + c is that of number 4 * c + i.
inline Floats sums_of(const Floats (&all)[kLanes]) {
#if defined(__AVX512VNNI__)
    const auto both = [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); };
    __m512 halves[8], quarters[4], pairs[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 x = (__m512)all[2 * i].part[0], y = (__m512)all[2 * i + 1].part[0];
        halves[i] = both(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 x = halves[2 * i], y = halves[2 * i + 1];
        quarters[i] = both(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m512 x = quarters[2 * i], y = quarters[2 * i + 1];
        pairs[i] = both(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    }
    const __m512 x = pairs[0], y = pairs[1];
    return {{(NativeFloats)both(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd))}};
#else
    float out[kLanes];
    for (int i = 0; i < kLanes; ++i) out[i % 4 * 4 + i / 4] = sum(all[i]);
    return load(out);
#endif
}

inline float largest(const Floats& a) {
    return fold(a, [](auto x, auto y) { return x > y ? x : y; });
}

inline float number_of(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline uint32_t bits_of(float x) {
    uint32_t out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

inline float from_bfloat16(uint16_t x) { return number_of(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_float16(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, rest = x & 0x7fffu;
    if (rest >= 0x7c00u) return number_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    const float size = rest >= 0x400u ? number_of((rest << 13) + 0x38000000u) : static_cast<float>(rest) * 0x1p-24f;
    return number_of(sign | bits_of(size));
}

inline uint16_t to_float16(float x) {
    const uint16_t sign = static_cast<uint16_t>((bits_of(x) >> 16) & 0x8000u);
    const uint32_t rest = bits_of(x) & 0x7fffffffu;
    if (rest > 0x7f800000u) return sign | 0x7e00u;
    if (rest >= 0x477ff000u) return sign | 0x7c00u;
    if (rest < 0x38800000u) return sign | static_cast<uint16_t>(std::nearbyintf(number_of(rest) * 0x1p24f));
    return sign | static_cast<uint16_t>((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13);
}

// 16 numbers of 16 bits each.
inline Floats load_bfloat16(const uint16_t* x) {
#if defined(__AVX512VNNI__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return {{(NativeFloats)_mm512_slli_epi32(wide, 16)}};
#elif defined(__AVX2__)
    const __m128i* from = reinterpret_cast<const __m128i*>(x);
    GLM_EACH(Floats, (NativeFloats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from + p)), 16));
#else
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = from_bfloat16(x[i]);
    return load(values);
#endif
}

inline Floats load_float16(const uint16_t* x) {
#if defined(__AVX512VNNI__)
    return {{(NativeFloats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))}};
#elif defined(__AVX2__)
    const __m128i* from = reinterpret_cast<const __m128i*>(x);
    GLM_EACH(Floats, (NativeFloats)_mm256_cvtph_ps(_mm_loadu_si128(from + p)));
#else
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = from_float16(x[i]);
    return load(values);
#endif
}

inline void store_bfloat16(uint16_t* to, const Floats& x) {
    typedef uint16_t Narrow __attribute__((vector_size(kNativeBytes / 2)));
    for (int p = 0; p < kParts; ++p) {
        const NativeUnsigned bits = reinterpret_cast<const NativeUnsigned&>(x.part[p]);
        const NativeUnsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
        const Narrow out = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Narrow);
        std::memcpy(to + p * kLanes / kParts, &out, sizeof out);
    }
}

inline void store_float16(uint16_t* to, const Floats& x) {
#if defined(__AVX512VNNI__)
    const __m256i out = _mm512_cvtps_ph((__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), out);
#elif defined(__AVX2__)
    for (int p = 0; p < kParts; ++p) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + p, _mm256_cvtps_ph((__m256)x.part[p], _MM_FROUND_TO_NEAREST_INT));
    }
#else
    float values[kLanes];
    store(values, x);
    for (int i = 0; i < kLanes; ++i) to[i] = to_float16(values[i]);
#endif
}

// sums[lane] += the dot product of the lane's four bytes with the four at `x`, which every lane shares. Weights of 8 bit
// are stored plus 128, because AVX-512 wants unsigned ones; other instruction sets take that off again, and then the
// products are of the numbers themselves: kOffset8 says what the sums are too large by, for each unit of `x`.
constexpr int kOffset4 = 8;

#if defined(__AVX512VNNI__)

constexpr int kOffset8 = 128;

inline void add_dot4(Ints& sums, const Bytes& weights, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    sums.part[0] = (NativeInts)_mm512_dpbusd_epi32((__m512i)sums.part[0], (__m512i)weights.part[0], _mm512_set1_epi32(four));
}

inline void add_dot8(Ints& sums, const Bytes& weights, const int8_t* x) { add_dot4(sums, weights, x); }

#elif defined(__AVX2__)

constexpr int kOffset8 = 0;

inline void add_pairs(NativeInts& sums, __m256i positive, __m256i other) {
    const __m256i pairs = _mm256_maddubs_epi16(positive, other);
    sums += (NativeInts)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

inline void add_dot4(Ints& sums, const Bytes& weights, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    for (int p = 0; p < kParts; ++p) add_pairs(sums.part[p], (__m256i)weights.part[p], _mm256_set1_epi32(four));
}

// The instruction adds two products in 16 bits; with |weight| <= 128 and |x| <= 127 they fit, unsigned weights would not.
inline void add_dot8(Ints& sums, const Bytes& weights, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    for (int p = 0; p < kParts; ++p) {
        const __m256i weight = _mm256_xor_si256((__m256i)weights.part[p], _mm256_set1_epi8(-128));
        add_pairs(sums.part[p], _mm256_abs_epi8(weight), _mm256_sign_epi8(_mm256_set1_epi32(four), weight));
    }
}

#else

constexpr int kOffset8 = 0;

template <int kBias>
inline void add_dots(Ints& sums, const Bytes& weights, const int8_t* x) {
    uint8_t bytes[4 * kLanes];
    std::memcpy(bytes, &weights, sizeof bytes);
    int32_t dots[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        dots[i] = 0;
        for (int j = 0; j < 4; ++j) dots[i] += (bytes[4 * i + j] - kBias) * x[j];
    }
    Ints more;
    std::memcpy(&more, dots, sizeof more);
    sums = sums + more;
}

inline void add_dot4(Ints& sums, const Bytes& weights, const int8_t* x) { add_dots<0>(sums, weights, x); }
inline void add_dot8(Ints& sums, const Bytes& weights, const int8_t* x) { add_dots<128>(sums, weights, x); }

#endif

}  // namespace glm

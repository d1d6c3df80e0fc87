// One register of floats of the instruction set that this translation unit is compiled for, and what the kernels do
// with it. Everything is static: code for one instruction set must not serve another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef FDC_INLINE
#define FDC_INLINE static inline __attribute__((always_inline))
#endif

#if defined(__AVX512F__)
constexpr int VEC = 16;
#elif defined(__AVX2__)
constexpr int VEC = 8;
#else
constexpr int VEC = 4;
#endif
typedef float Vec __attribute__((vector_size(VEC * 4)));
typedef int32_t Int __attribute__((vector_size(VEC * 4)));
typedef uint32_t Word __attribute__((vector_size(VEC * 4)));
typedef uint16_t Half __attribute__((vector_size(VEC * 2)));

FDC_INLINE Vec splat(float x) { return x - Vec{}; }
FDC_INLINE Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof(v)); return v; }
FDC_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
FDC_INLINE Int lane_numbers() {
    Int n = {};
    for (int i = 0; i < VEC; ++i) n[i] = i;
    return n;
}

#if defined(__AVX512F__)
FDC_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
FDC_INLINE Vec larger(Vec a, Vec b) { return Vec(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b))); }
#elif defined(__AVX2__)
FDC_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }
FDC_INLINE Vec larger(Vec a, Vec b) { return Vec(_mm256_max_ps(__m256(a), __m256(b))); }
#else
FDC_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
FDC_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif

// x 2^n, n a whole number in [-160, 126], x in [1/2, 2]. What is below 2^-126 may become 0.
FDC_INLINE Vec scale(Vec x, Vec n) {
#if defined(__AVX512F__)
    return Vec(_mm512_maskz_scalef_ps(0xffff, __m512(x), __m512(n)));
#else
    const Int bits = Int(x) + (__builtin_convertvector(n, Int) << 23);
    return Vec(Int(n >= -126.0f) & bits);
#endif
}
FDC_INLINE Vec nearest(Vec x) {
#if defined(__AVX512F__)
    return Vec(_mm512_maskz_roundscale_ps(0xffff, __m512(x), 8));
#else
    const Vec magic = splat(0x1.8p23f);
    return (x + magic) - magic;
#endif
}
// 2^f, f in [-1/2, 1/2] or a little beyond; coefficients minimise the largest relative error, 2^0 = 1 held.
FDC_INLINE Vec fine_power(Vec f) {  // 3e-9
    Vec p = splat(0.0001532646274426952f);
    p = fma(p, f, splat(0.0013390806270763278f));
    p = fma(p, f, splat(0.009618505835533142f));
    p = fma(p, f, splat(0.05550359934568405f));
    p = fma(p, f, splat(0.24022647738456726f));
    p = fma(p, f, splat(0.6931471824645996f));
    return fma(p, f, splat(1.0f));
}
FDC_INLINE Vec coarse_power(Vec f) {  // 3e-6: for what is rounded to bfloat16
    Vec p = splat(0.009582576341927052f);
    p = fma(p, f, splat(0.05590682849287987f));
    p = fma(p, f, splat(0.24024106562137604f));
    p = fma(p, f, splat(0.6931241154670715f));
    return fma(p, f, splat(1.0f));
}
// e^x for |x| up to 87, and for any x <= 0 once it went through `not_below`. NaN stays NaN.
FDC_INLINE Vec exponential(Vec x) {
    // log2 e in two parts, so that the rest of x log2 e keeps its bits.
    const Vec log2e = splat(1.44269502162933349609375f), n = nearest(x * log2e);
    return scale(fine_power(fma(x, splat(1.92596298909109e-8f), fma(x, log2e, -n))), n);
}
// 2^x likewise, for what is rounded to bfloat16.
FDC_INLINE Vec coarse_exponential2(Vec x) {
    const Vec n = nearest(x);
    return scale(coarse_power(x - n), n);
}
// The larger of x and a limit, minus infinity included; NaN stays NaN, since `larger` returns its second argument then.
FDC_INLINE Vec not_below(float limit, Vec x) { return larger(splat(limit), x); }
// Largest magnitude so far; NaN counts as nothing.
FDC_INLINE Vec larger_magnitude(Vec x, Vec so_far) { return larger(Vec(Int(x) & 0x7fffffff), so_far); }
FDC_INLINE bool any_above(Vec x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
    const Int above = x > splat(limit);
    int32_t any = 0;
    for (int i = 0; i < VEC; ++i) any |= above[i];
    return any != 0;
#endif
}

// Lanes of a and b: lane i of the result is lane Index::of(i), counted on from a into b.
template <class Index, int... I>
FDC_INLINE Vec pick(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Index::of(I)...);
#else
    return __builtin_shuffle(a, b, Int{Index::of(I)...});
#endif
}
template <class Index>
FDC_INLINE Vec pick(Vec a, Vec b) { return pick<Index>(a, b, std::make_integer_sequence<int, VEC>()); }

// Lower or upper halves of the blocks of `size` lanes of a, then those of b.
template <int size, bool upper>
struct Halves {
    static constexpr int of(int i) { return i / (size / 2) * size + i % (size / 2) + (upper ? size / 2 : 0); }
};
// Lanes of the lower or upper half of a and b by turns.
template <bool upper>
struct Turns {
    static constexpr int of(int i) { return i / 2 + i % 2 * VEC + (upper ? VEC / 2 : 0); }
};

struct Add { FDC_INLINE Vec of(Vec a, Vec b) { return a + b; } };
struct Max { FDC_INLINE Vec of(Vec a, Vec b) { return larger(a, b); } };

// LEFT registers whose blocks of `block` lanes belong to one sum each: blocks are halved and two registers become one,
// until every block is one lane.
template <class Op, int block, int LEFT>
FDC_INLINE Vec fold_blocks(Vec* w) {
    if constexpr (block == 1) {
        return w[0];
    } else {
        constexpr int NEXT = LEFT > 1 ? LEFT / 2 : 1;
#pragma GCC unroll 4
        for (int i = 0; i < NEXT; ++i) {
            const Vec a = w[LEFT > 1 ? 2 * i : 0], b = w[LEFT > 1 ? 2 * i + 1 : 0];
            w[i] = Op::of(pick<Halves<block, false>>(a, b), pick<Halves<block, true>>(a, b));
        }
        return fold_blocks<Op, block / 2, NEXT>(w);
    }
}
// out[i] = sum (or maximum) over the lanes of v[i].
template <class Op, int N>
FDC_INLINE void fold(const Vec (&v)[N], float* out) {
    constexpr int PARTS = N <= 1 ? 1 : N <= 2 ? 2 : N <= 4 ? 4 : 8;
    static_assert(N <= PARTS && PARTS <= VEC);
    Vec w[PARTS];
#pragma GCC unroll 8
    for (int i = 0; i < PARTS; ++i) w[i] = v[i < N ? i : 0];
    alignas(64) float x[VEC];
    store(x, fold_blocks<Op, VEC, PARTS>(w));
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) out[i] = x[i];
}

// Rows become columns: afterwards lane j of v[i] is what lane i of v[j] was.
FDC_INLINE void transpose(Vec* v) {
#pragma GCC unroll 4
    for (int stage = 1; stage < VEC; stage *= 2) {
        Vec w[VEC];
#pragma GCC unroll 8
        for (int i = 0; i < VEC / 2; ++i) {
            w[2 * i] = pick<Turns<false>>(v[i], v[i + VEC / 2]);
            w[2 * i + 1] = pick<Turns<true>>(v[i], v[i + VEC / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VEC; ++i) v[i] = w[i];
    }
}

struct Fp32 {
    using Stored = float;
    FDC_INLINE Vec load(const float* p) { return ::load(p); }
    FDC_INLINE void store(float* p, Vec v) { ::store(p, v); }
};
struct Bf16 {
    using Stored = uint16_t;
    FDC_INLINE Vec load(const uint16_t* p) {
        Half h;
        std::memcpy(&h, p, sizeof(h));
        return Vec(__builtin_convertvector(h, Word) << 16);
    }
    FDC_INLINE void store(uint16_t* p, Vec v) {
        const Word bits = Word(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const Word is_nan = Word((bits & 0x7fffffff) > 0x7f800000);
        const Half h = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Half);
        std::memcpy(p, &h, sizeof(h));
    }
};

#if defined(__AVX512BF16__)
// Words of two bfloat16 each, which the processor multiplies pair by pair.
typedef uint32_t Pair __attribute__((vector_size(64)));
FDC_INLINE Pair load_pairs(const uint32_t* p) { Pair v; std::memcpy(&v, p, sizeof(v)); return v; }
FDC_INLINE void store_pairs(uint32_t* p, Pair v) { std::memcpy(p, &v, sizeof(v)); }
FDC_INLINE Vec dot(Vec sum, Pair a, Pair b) { return Vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b))); }
FDC_INLINE Vec dot(Vec sum, uint32_t a, Pair b) { return dot(sum, Pair(_mm512_set1_epi32(int32_t(a))), b); }
#endif

// Calls f with `rows`, 1 to R, as a template argument.
template <int R, class F>
FDC_INLINE void call_with(int64_t rows, F&& f) {
    if constexpr (R > 0) {
        if (rows == R) f(std::integral_constant<int, R>());
        else call_with<R - 1>(rows, f);
    }
}

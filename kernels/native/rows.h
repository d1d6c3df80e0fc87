// Tensors of float32 or bfloat16, a register at a time, for the ops that pass over them once.
#pragma once

#include "abi.h"
#include "simd.h"

// LANES is VEC, or less where a row ends: the lanes beyond it read as zero and are not written.
struct Fp32Rows {
    using Stored = float;
    template <int LANES>
    FDC_INLINE Vec load(const float* p) {
        Vec v = {};
        std::memcpy(&v, p, LANES * sizeof(*p));
        return v;
    }
    template <int LANES>
    FDC_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, LANES * sizeof(*p)); }
};

struct Bf16Rows {
    using Stored = uint16_t;
    template <int LANES>
    FDC_INLINE Vec load(const uint16_t* p) {
        Half h = {};
        std::memcpy(&h, p, LANES * sizeof(*p));
#if defined(__AVX512F__)
        return Vec(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, __m256i(h)), 16));
#else
        return Vec(__builtin_convertvector(h, Word) << 16);
#endif
    }
    template <int LANES>
    FDC_INLINE void store(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
        const __m256bh h = _mm512_cvtneps_pbh(__m512(v));  // subnormal numbers become 0
        std::memcpy(p, &h, LANES * sizeof(*p));
#else
        uint16_t h[VEC];
        Bf16::store(h, v);
        std::memcpy(p, h, LANES * sizeof(*p));
#endif
    }
};

// The smaller of a and b; b where one of them is no number.
FDC_INLINE Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
    return Vec(_mm512_maskz_min_ps(0xffff, __m512(a), __m512(b)));
#elif defined(__AVX2__)
    return Vec(_mm256_min_ps(__m256(a), __m256(b)));
#else
    return a < b ? a : b;
#endif
}

// v, and zero in the lanes from LANES on.
template <int LANES>
FDC_INLINE Vec first_lanes(Vec v) {
    if constexpr (LANES == VEC) return v;
    else return Vec(Int(v) & (lane_numbers() < LANES));
}

// f(j, std::integral_constant<int, LANES>) for the registers of a row: all whole, then half a one where VEC is 16.
template <class F>
FDC_INLINE void for_registers(int64_t width, F&& f) {
    int64_t j = 0;
    for (; j + VEC <= width; j += VEC) f(j, std::integral_constant<int, VEC>());
    if constexpr (VEC > 8)
        if (j < width) f(j, std::integral_constant<int, 8>());
}

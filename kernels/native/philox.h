// Philox 4x32-10 (Salmon et al., SC 2011) and the normals drawn from it, as plain per-lane code that the compiler
// turns into vectors of any width. Counter and key: see kernels/philox.py.
//
// Everything here is static: the file is compiled once per instruction set, and code for one must not serve another.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "numbers.h"

constexpr uint32_t PURPOSE_MASK = 1, PURPOSE_NOISE = 2;
constexpr int LANES = 16;

// 64-bit lanes of one register. A Philox word lives in the low half of its lane; the high half is left as it falls,
// since the 32 x 32 -> 64 bit product of the processor does not look at it.
#if defined(__AVX512F__)
typedef uint64_t Wide __attribute__((vector_size(64)));
FDC_INLINE Wide product(Wide a, Wide b) { return Wide(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b))); }
#elif defined(__AVX2__)
typedef uint64_t Wide __attribute__((vector_size(32)));
FDC_INLINE Wide product(Wide a, Wide b) { return Wide(_mm256_mul_epu32(__m256i(a), __m256i(b))); }
#elif defined(__SSE2__)
typedef uint64_t Wide __attribute__((vector_size(16)));
FDC_INLINE Wide product(Wide a, Wide b) { return Wide(_mm_mul_epu32(__m128i(a), __m128i(b))); }
#else
typedef uint64_t Wide __attribute__((vector_size(16)));
FDC_INLINE Wide product(Wide a, Wide b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
constexpr int WIDTH = sizeof(Wide) / 8;
typedef uint32_t Narrow __attribute__((vector_size(sizeof(Wide) / 2)));

FDC_INLINE Wide widen(const uint32_t* from) {
    Narrow words;
    std::memcpy(&words, from, sizeof(words));
    return __builtin_convertvector(words, Wide);
}
FDC_INLINE void narrow(Wide words, uint32_t* to) {
    const Narrow low = __builtin_convertvector(words, Narrow);
    std::memcpy(to, &low, sizeof(low));
}

// The four words of LANES counters (quad[i], token[i], position, purpose): out[word][i].
FDC_INLINE void philox(const uint32_t* quad, const uint32_t* token, uint32_t position, uint32_t purpose, uint32_t k0,
                       uint32_t k1, uint32_t (*out)[LANES]) {
    const Wide zero = {}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += WIDTH) {
        Wide c0 = widen(quad + i), c1 = widen(token + i), c2 = zero + position, c3 = zero + purpose;
#pragma GCC unroll 10
        for (uint32_t round = 0; round < 10; ++round) {
            const Wide p0 = product(c0, m0), p1 = product(c2, m1);
            c0 = (p1 >> 32) ^ c1 ^ (zero + (k0 + round * 0x9E3779B9u));
            c1 = p1;
            c2 = (p0 >> 32) ^ c3 ^ (zero + (k1 + round * 0xBB67AE85u));
            c3 = p0;
        }
        narrow(c0, out[0] + i);
        narrow(c1, out[1] + i);
        narrow(c2, out[2] + i);
        narrow(c3, out[3] + i);
    }
}

// sqrt(-2 ln u) for u = ((word >> 8) + 1) / 2^24 in (0, 1].
FDC_INLINE float radius_of(uint32_t word) {
    // u is exact; u = 2^e * (1 + z) with 1 + z in [sqrt(1/2), sqrt(2)), so that u near 1 loses nothing.
    const float u = float(int32_t(word >> 8) + 1) * 0x1p-24f;
    const uint32_t shifted = bits_of_float(u) - 0x3f3504f3u;
    const float e = float(int32_t(shifted) >> 23);
    const float z = float_of_bits((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    // ln(1 + z) = z - z^2/2 + z^3 p(z); p minimises the largest relative error of the sum (6e-9).
    float p = -0.07634492963552475f;
    p = p * z + 0.12761574983596802f;
    p = p * z - 0.13160182535648346f;
    p = p * z + 0.14201758801937103f;
    p = p * z - 0.16623356938362122f;
    p = p * z + 0.20001226663589478f;
    p = p * z - 0.2500081956386566f;
    p = p * z + 0.3333333134651184f;
    const float zz = z * z;
    // ln 2 in two parts, the first of so few bits that its product with e is exact.
    const float ln = e * 0.693359375f + (z + (e * -2.12194440e-4f + (zz * z * p - 0.5f * zz)));
    return __builtin_sqrtf(-2.0f * ln);
}

// cos and sin of 2 pi k / 2^24 for k = int32(word) >> 8.
FDC_INLINE void turn(uint32_t word, float& cosine, float& sine) {
    // Nearest quarter turn; the rest, in [-1/8, 1/8) turns, is exact.
    const int32_t k = int32_t(word) >> 8, quarter = (k + (1 << 21)) >> 22;
    const float y = float(k - quarter * (1 << 22)) * 0x1p-24f, yy = y * y;
    float s = -75.3938217163086f;
    s = s * yy + 81.59236145019531f;
    s = s * yy - 41.3416633605957f;
    s = y * 6.2831854820251465f + y * yy * s;
    float c = 59.24617004394531f;
    c = c * yy - 85.4437484741211f;
    c = c * yy + 64.93932342529297f;
    c = c * yy - 19.739208221435547f;
    c = c * yy + 1.0f;
    const bool swap = quarter & 1;
    const uint32_t cos_sign = uint32_t((quarter + 1) & 2) << 30, sin_sign = uint32_t(quarter & 2) << 30;
    cosine = float_of_bits(bits_of_float(swap ? s : c) ^ cos_sign);
    sine = float_of_bits(bits_of_float(swap ? c : s) ^ sin_sign);
}

// Normals of LANES counters (quad[i], token[i], position, PURPOSE_NOISE): out[4 i + j] is channel 4 quad[i] + j.
FDC_INLINE void normals(const uint32_t* quad, const uint32_t* token, uint32_t position, uint32_t k0, uint32_t k1,
                        float* out) {
    alignas(64) uint32_t w[4][LANES];
    alignas(64) float n[4][LANES];
    philox(quad, token, position, PURPOSE_NOISE, k0, k1, w);
#pragma omp simd
    for (int i = 0; i < LANES; ++i) {
        const float r0 = radius_of(w[0][i]), r1 = radius_of(w[2][i]);
        float c0, s0, c1, s1;
        turn(w[1][i], c0, s0);
        turn(w[3][i], c1, s1);
        n[0][i] = r0 * c0;
        n[1][i] = r0 * s0;
        n[2][i] = r1 * c1;
        n[3][i] = r1 * s1;
    }
#pragma omp simd
    for (int i = 0; i < LANES; ++i) {
        out[4 * i] = n[0][i];
        out[4 * i + 1] = n[1][i];
        out[4 * i + 2] = n[2][i];
        out[4 * i + 3] = n[3][i];
    }
}

// Mask words of LANES consecutive tokens.
FDC_INLINE void mask_words(uint32_t token, uint32_t position, uint32_t k0, uint32_t k1, uint32_t* out) {
    alignas(64) uint32_t quads[LANES] = {}, tokens[LANES], w[4][LANES];
    for (int i = 0; i < LANES; ++i) tokens[i] = token + uint32_t(i);
    philox(quads, tokens, position, PURPOSE_MASK, k0, k1, w);
    std::memcpy(out, w[0], sizeof(w[0]));
}

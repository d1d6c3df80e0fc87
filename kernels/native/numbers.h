// Numbers as scenes and tensors store them, one at a time, as plain code that the compiler turns into vectors of any
// width. Everything is static: code for one instruction set must not serve another.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef FDC_INLINE
#define FDC_INLINE static inline __attribute__((always_inline))
#endif

FDC_INLINE float float_of_bits(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
FDC_INLINE uint32_t bits_of_float(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }
FDC_INLINE int64_t clamp(int64_t v, int64_t high) { return v < 0 ? 0 : v > high ? high : v; }

struct Uint16 {
    using Stored = uint16_t;
    FDC_INLINE float load(uint16_t v) { return float(v); }
};
struct Int16 {
    using Stored = int16_t;
    FDC_INLINE float load(int16_t v) { return float(v); }
};
struct Float16 {
    using Stored = uint16_t;
    FDC_INLINE float load(uint16_t v) {
        // Moving exponent and fraction into place and scaling by 2^112 is exact, subnormals included.
        const float scaled = float_of_bits(uint32_t(v & 0x7fff) << 13) * 0x1p112f;
        const uint32_t special = scaled >= 65536.0f ? 0x7f800000u : 0u;  // infinity and NaN
        return float_of_bits(bits_of_float(scaled) | special | uint32_t(v & 0x8000) << 16);
    }
    FDC_INLINE uint16_t store(float v) {
        const uint32_t sign = bits_of_float(v) >> 16 & 0x8000u, bits = bits_of_float(v) & 0x7fffffffu;
        const uint32_t normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
        // One unit in the last place of 0.5f is the smallest half subnormal: the addition rounds.
        const uint32_t subnormal = bits_of_float(float_of_bits(bits) + 0.5f) - 0x3f000000u;
        const uint32_t finite = bits < 0x38800000u ? subnormal : normal;
        const uint32_t large = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
        return uint16_t(sign | (bits >= 0x477ff000u ? large : finite));
    }
};
struct BFloat16 {
    using Stored = uint16_t;
    FDC_INLINE float load(uint16_t v) { return float_of_bits(uint32_t(v) << 16); }
    FDC_INLINE uint16_t store(float v) {
        const uint32_t bits = bits_of_float(v);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
};
struct Float32 {
    using Stored = float;
    FDC_INLINE float load(float v) { return v; }
    FDC_INLINE float store(float v) { return v; }
};

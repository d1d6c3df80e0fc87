// How matrix products are cut into nearly equal parts.
#pragma once

#include "abi.h"
#include "simd.h"

FDC_INLINE int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }
FDC_INLINE int64_t round_up(int64_t n, int64_t step) { return parts_of(n, step) * step; }
// Where part i of `parts` begins, and how much it holds.
FDC_INLINE int64_t begin_of(int64_t n, int64_t parts, int64_t i) {
    return n / parts * i + (i < n % parts ? i : n % parts);
}
FDC_INLINE int64_t size_of(int64_t n, int64_t parts, int64_t i) { return n / parts + (i < n % parts); }

// C = A B (+ bias) in float32 for the widths of this model: sums of 128 to 384 terms, or of all rows of a batch for the
// gradient of a weight. B is packed into panels as wide as the registers of a tile; A is read where it lies.
#include <cstdlib>

#include "products.h"

namespace {

using Args = fdc_matmul_args;
constexpr bool WIDE = VEC == 16;    // 32 registers instead of 16
constexpr int ROWS = WIDE ? 14 : 6;  // rows of a tile
constexpr int SPAN = 2;              // registers of its columns
constexpr int COLUMNS = SPAN * VEC;
constexpr int64_t DEPTH = 192;       // terms of a panel, which then stays in the first cache (24 KiB)
constexpr int64_t CHUNK = 4 * ROWS;  // rows that a thread takes at once

// Terms first .. first + depth of the columns of a panel, one row of COLUMNS behind the other; zero where B ends.
void pack(const Args& a, int64_t first, int64_t depth, int64_t column, float* to) {
    const float* const from = a.b + first * a.b_term + column * a.b_column;
    const int64_t width = a.columns - column < COLUMNS ? a.columns - column : COLUMNS;
    if (width < COLUMNS) std::memset(to, 0, size_t(depth) * COLUMNS * sizeof(float));
    if (a.b_column == 1) {
        for (int64_t k = 0; k < depth; ++k)
            std::memcpy(to + k * COLUMNS, from + k * a.b_term, size_t(width) * sizeof(float));
        return;
    }
    for (int64_t j = 0; j < width; j += VEC)
        for (int64_t k = 0; k < depth; k += VEC)
            if (j + VEC <= width && k + VEC <= depth && a.b_term == 1) {
                Vec square[VEC];
#pragma GCC unroll 16
                for (int i = 0; i < VEC; ++i) square[i] = load(from + (j + i) * a.b_column + k);
                transpose(square);
#pragma GCC unroll 16
                for (int i = 0; i < VEC; ++i) store(to + (k + i) * COLUMNS + j, square[i]);
            } else {
                for (int64_t i = j; i < width && i < j + VEC; ++i)
                    for (int64_t l = k; l < depth && l < k + VEC; ++l)
                        to[l * COLUMNS + i] = from[l * a.b_term + i * a.b_column];
            }
}

// R rows of C: `start` plus the rows of A times one panel. The product is summed by itself, so that the error grows with
// the number of ranges of terms and not with that of the terms.
template <int R>
void tile(const float* a, int64_t a_row, int64_t a_term, int64_t depth, const float* panel, const float* start,
          int64_t start_row, float* c, int64_t c_row) {
    Vec sum[R][SPAN] = {};
    // One pointer for three rows: the processor adds one or two times the stride by itself.
    const float* row[(R + 2) / 3];
#pragma GCC unroll 5
    for (int i = 0; i < (R + 2) / 3; ++i) row[i] = a + 3 * i * a_row;
    for (int64_t k = 0; k < depth; ++k, panel += COLUMNS) {
        Vec b[SPAN];
#pragma GCC unroll 2
        for (int s = 0; s < SPAN; ++s) b[s] = load(panel + s * VEC);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            const Vec x = splat(row[r / 3][r % 3 * a_row]);
#pragma GCC unroll 2
            for (int s = 0; s < SPAN; ++s) sum[r][s] = fma(x, b[s], sum[r][s]);
        }
#pragma GCC unroll 5
        for (int i = 0; i < (R + 2) / 3; ++i) {
            row[i] += a_term;
            __asm__("" : "+r"(row[i]));  // or the compiler keeps a pointer for every row, in memory
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int s = 0; s < SPAN; ++s) {
            const Vec before = load(start + r * start_row + s * VEC);
            store(c + r * c_row + s * VEC, before + sum[r][s]);
        }
}

// Rows first .. last of C times the panels of one range of terms.
void multiply(const Args& a, int64_t first, int64_t last, int64_t term, int64_t depth, const float* panels) {
    alignas(64) static const float zeros[COLUMNS] = {};
    const int64_t tiles = parts_of(last - first, ROWS);
    for (int64_t column = 0; column < a.columns; column += COLUMNS, panels += depth * COLUMNS) {
        const int64_t width = a.columns - column < COLUMNS ? a.columns - column : COLUMNS;
        alignas(64) float start[COLUMNS] = {}, edge[ROWS * COLUMNS];
        if (a.bias && term == 0) std::memcpy(start, a.bias + column, size_t(width) * sizeof(float));
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t row = first + begin_of(last - first, tiles, t);
            const int64_t rows = first + begin_of(last - first, tiles, t + 1) - row;
            float* const c = a.c + row * a.c_row + column;
            const float* const x = a.a + row * a.a_row + term * a.a_term;
            const bool whole = width == COLUMNS;
            if (!whole && term)
                for (int64_t r = 0; r < rows; ++r)
                    std::memcpy(edge + r * COLUMNS, c + r * a.c_row, size_t(width) * sizeof(float));
            const float* const from = !term ? (a.bias ? start : zeros) : whole ? c : edge;
            const int64_t from_row = !term ? 0 : whole ? a.c_row : COLUMNS;
            for (int64_t r = 0; r < ROWS; ++r)  // a tile of C is as many pairs of lines, each far from the other
                for (int64_t s = 0; s < SPAN; ++s) __builtin_prefetch(c + (rows + r) * a.c_row + s * VEC, 1);
            call_with<ROWS>(rows, [&](auto count) {
                tile<decltype(count)::value>(x, a.a_row, a.a_term, depth, panels, from, from_row, whole ? c : edge,
                                             whole ? a.c_row : COLUMNS);
            });
            if (!whole)
                for (int64_t r = 0; r < rows; ++r)
                    std::memcpy(c + r * a.c_row, edge + r * COLUMNS, size_t(width) * sizeof(float));
        }
    }
}

}  // namespace

int64_t FDC_ISA::matmul(const Args& a) {
    const int64_t ranges = parts_of(a.terms, DEPTH), panels = parts_of(a.columns, COLUMNS);
    const int64_t chunks = parts_of(a.rows, CHUNK);
    float* const packed =
        static_cast<float*>(std::aligned_alloc(64, size_t(panels) * DEPTH * COLUMNS * sizeof(float)));
    if (!packed) return FDC_NO_MEMORY;
    // Terms are added in one order, whatever the number of threads.
#pragma omp parallel num_threads(a.threads)
    for (int64_t range = 0; range < ranges; ++range) {
        const int64_t term = begin_of(a.terms, ranges, range), depth = begin_of(a.terms, ranges, range + 1) - term;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p) pack(a, term, depth, p * COLUMNS, packed + p * depth * COLUMNS);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < chunks; ++i)
            multiply(a, begin_of(a.rows, chunks, i), begin_of(a.rows, chunks, i + 1), term, depth, packed);
    }
    std::free(packed);
    return FDC_OK;
}

// C = A B (+ bias) of bfloat16 with sums in float32, for processors that multiply pairs of bfloat16 and add them
// (AVX512-BF16). B is packed into panels as wide as the registers of a tile, two terms a word. A is read where it lies
// if its terms lie side by side (layers and gradients of their inputs), and packed likewise if its rows do (gradients of
// weights, where the terms are all rows of a batch). The products of a tile run at the processor's rate; what is left
// is bringing operands into the caches, hence the prefetches.
#include <cstdlib>

#include "products.h"

#if defined(__AVX512BF16__)
namespace {

using Args = fdc_matmul_bf16_args;
constexpr int ROWS = 14;             // of a tile: 28 sums, two registers of B, one of A
constexpr int COLUMNS = 2 * VEC;
constexpr int64_t DEPTH = 384;       // terms of a panel, which then stays in the first cache (24 KiB)
constexpr int64_t CHUNK = 4 * ROWS;  // rows that a thread takes at once where A is read where it lies
constexpr int64_t AHEAD = 8;         // terms by which packing asks for memory in advance
constexpr int64_t LINE = 64;         // bytes of a line of the caches

FDC_INLINE __mmask16 first_of(int64_t lanes) { return __mmask16(lanes >= VEC ? 0xffff : (1 << lanes) - 1); }
// Words of up to 16 lanes that lie side by side: term k in the low half, the next term, unless it is null, in the high.
FDC_INLINE Pair zip(const uint16_t* low, const uint16_t* high, __mmask16 lanes) {
    const __m512i a = _mm512_maskz_cvtepu16_epi32(lanes, _mm256_maskz_loadu_epi16(lanes, low));
    if (!high) return Pair(a);
    const __m512i b = _mm512_maskz_cvtepu16_epi32(lanes, _mm256_maskz_loadu_epi16(lanes, high));
    return Pair(a) | Pair(b) << 16;
}

// One range of terms. `words`: pairs of them.
struct Range {
    int64_t term, depth, words;
    bool first, last;
};

// What is packed of B in one range: word (k, j) of panel p at p * words * COLUMNS + k * COLUMNS + j, zero where B ends.
// Words first .. last of all panels.
void pack_columns(const Args& a, const Range& range, int64_t first, int64_t last, uint32_t* to) {
    const uint16_t* const from = a.b + range.term * a.b_term;
    const int64_t padded = round_up(a.columns, COLUMNS);
    auto place = [&](int64_t k, int64_t j) { return to + (j / COLUMNS * range.words + k) * COLUMNS + j % COLUMNS; };
    if (a.b_column == 1) {
        for (int64_t k = first; k < last; ++k) {
            const uint16_t *const low = from + 2 * k * a.b_term, *const high = low + a.b_term;
            for (int64_t j = 0; j < a.columns; j += LINE / 2) {
                __builtin_prefetch(low + AHEAD * a.b_term + j);
                __builtin_prefetch(high + AHEAD * a.b_term + j);
            }
            for (int64_t j = 0; j < padded; j += VEC) {
                const __mmask16 lanes = first_of(a.columns > j ? a.columns - j : 0);
                const Pair pair = zip(low + j, 2 * k + 1 < range.depth ? high + j : nullptr, lanes);
                std::memcpy(place(k, j), &pair, sizeof(pair));
            }
        }
        return;
    }
    for (int64_t j = 0; j < padded; j += VEC)
        for (int64_t k = first; k < last; k += VEC) {
            const int64_t count = last - k < VEC ? last - k : VEC;
            Vec square[VEC];
#pragma GCC unroll 16
            for (int i = 0; i < VEC; ++i) {
                const __mmask16 there = j + i < a.columns ? first_of(count) : __mmask16(0);
                square[i] = Vec(_mm512_castsi512_ps(
                    _mm512_maskz_loadu_epi32(there, from + (there ? (j + i) * a.b_column + 2 * k : 0))));
            }
            transpose(square);
            for (int64_t i = 0; i < count; ++i) std::memcpy(place(k + i, j), &square[i], sizeof(Vec));
        }
}

// Rows first .. last of A in one range, tile by tile, word (k, r) of a tile of R rows at k * R + r; and the sums of
// their terms.
void pack_rows(const Args& a, const Range& range, int64_t first, int64_t last, uint32_t* to, float* sums) {
    const Pair ones = Pair{} + 0x3f803f80u;
    const int64_t tiles = parts_of(last - first, ROWS);
    const uint16_t* const from = a.a + first + range.term * a.a_term;
    if (range.first) std::memset(sums, 0, size_t(tiles) * sizeof(Vec));
    for (int64_t k = 0; k < range.words; ++k) {
        const uint16_t *const low = from + 2 * k * a.a_term, *const high = low + a.a_term;
        for (int64_t i = 0; i < last - first; i += LINE / 2) {
            __builtin_prefetch(low + AHEAD * a.a_term + i);
            __builtin_prefetch(high + AHEAD * a.a_term + i);
        }
        for (int64_t t = 0, row = 0, rows; t < tiles; ++t, row += rows) {
            rows = size_of(last - first, tiles, t);
            const __mmask16 lanes = first_of(rows);
            const Pair pair = zip(low + row, 2 * k + 1 < range.depth ? high + row : nullptr, lanes);
            _mm512_mask_storeu_epi32(to + row * range.words + k * rows, lanes, __m512i(pair));
            store(sums + t * VEC, dot(load(sums + t * VEC), pair, ones));
        }
    }
    if (!a.row_sums || !range.last) return;
    for (int64_t t = 0, row = first, rows; t < tiles; ++t, row += rows) {
        rows = size_of(last - first, tiles, t);
        std::memcpy(a.row_sums + row, sums + t * VEC, size_t(rows) * sizeof(float));
    }
}

// R rows of C: `start` plus the words of A times one panel. Rows of A are `a_row` apart, or packed.
template <int R, bool packed>
void tile(const void* a, int64_t a_row, int64_t words, const uint32_t* panel, const float* start, int64_t start_row,
          void* c, int64_t c_row, bool half) {
    Vec sum[R][2] = {};
    // One pointer for three rows: the processor adds one or two times the stride by itself.
    const char* row[(R + 2) / 3];
    const int64_t stride = packed ? 4 : 2 * a_row, step = packed ? 4 * R : 4;
#pragma GCC unroll 5
    for (int i = 0; i < (R + 2) / 3; ++i) row[i] = static_cast<const char*>(a) + 3 * i * stride;
    for (int64_t k = 0; k < words; ++k, panel += COLUMNS) {
        const Pair low = load_pairs(panel), high = load_pairs(panel + VEC);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            uint32_t word;
            std::memcpy(&word, row[r / 3] + r % 3 * stride, sizeof(word));
            sum[r][0] = dot(sum[r][0], word, low);
            sum[r][1] = dot(sum[r][1], word, high);
        }
#pragma GCC unroll 5
        for (int i = 0; i < (R + 2) / 3; ++i) {
            row[i] += step;
            __asm__("" : "+r"(row[i]));  // or the compiler keeps a pointer for every row, in memory
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
        const Vec low = sum[r][0] + load(start + r * start_row), high = sum[r][1] + load(start + r * start_row + VEC);
        if (half) {
            const __m512bh both = _mm512_cvtne2ps_pbh(__m512(high), __m512(low));
            std::memcpy(static_cast<uint16_t*>(c) + r * c_row, &both, sizeof(both));
        } else {
            store(static_cast<float*>(c) + r * c_row, low);
            store(static_cast<float*>(c) + r * c_row + VEC, high);
        }
    }
}

// `rows` rows of `width` values of 2 or 4 bytes.
void copy_edge(void* to, int64_t to_row, const void* from, int64_t from_row, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r)
        std::memcpy(static_cast<char*>(to) + r * to_row, static_cast<const char*>(from) + r * from_row, size_t(width));
}

// Rows first .. last of C times the panels of one range. `rows_packed`: what `pack_rows` made of them, or null; `total`:
// float32 sums of the ranges before, like C.
void multiply(const Args& a, const Range& range, int64_t first, int64_t last, const uint32_t* rows_packed,
              const uint32_t* panels, float* total) {
    alignas(64) static const float zeros[COLUMNS] = {};
    const bool half = range.last && a.c_dtype == FDC_BFLOAT16;
    const int64_t tiles = parts_of(last - first, ROWS), size = half ? 2 : 4;
    for (int64_t column = 0; column < a.columns; column += COLUMNS, panels += range.words * COLUMNS) {
        const int64_t width = a.columns - column < COLUMNS ? a.columns - column : COLUMNS;
        const bool whole = width == COLUMNS;
        alignas(64) float bias[COLUMNS] = {}, before[ROWS * COLUMNS], after[ROWS * COLUMNS];
        if (a.bias) std::memcpy(bias, a.bias + column, size_t(width) * sizeof(float));
        for (int64_t t = 0, row = first, rows; t < tiles; ++t, row += rows) {
            rows = size_of(last - first, tiles, t);
            const int64_t at = row * a.columns + column, line = a.columns * size;
            const float* start = !range.first ? total + at : a.bias ? bias : zeros;
            int64_t start_row = range.first ? 0 : a.columns;
            if (!range.first && !whole) {
                copy_edge(before, sizeof(bias), start, a.columns * 4, rows, width * 4);
                start = before;
                start_row = COLUMNS;
            }
            char* const c = half ? reinterpret_cast<char*>(static_cast<uint16_t*>(a.c) + at)
                                 : reinterpret_cast<char*>(total + at);
            if (!rows_packed)  // a tile of C is as many lines, each far from the other
                for (int64_t r = 0; r < ROWS; ++r) __builtin_prefetch(c + (rows + r) * line, 1);
            call_with<ROWS>(rows, [&](auto count) {
                constexpr int R = decltype(count)::value;
                void* const to = whole ? static_cast<void*>(c) : after;
                const int64_t to_row = whole ? a.columns : COLUMNS;
                if (rows_packed)
                    tile<R, true>(rows_packed + (row - first) * range.words, 0, range.words, panels, start, start_row,
                                  to, to_row, half);
                else
                    tile<R, false>(a.a + row * a.a_row + range.term, a.a_row, range.words, panels, start, start_row, to,
                                   to_row, half);
            });
            if (!whole) copy_edge(c, line, after, COLUMNS * size, rows, width * size);
        }
    }
}

void* allocate(int64_t bytes) { return std::aligned_alloc(LINE, size_t(round_up(bytes, LINE))); }

}  // namespace

int64_t FDC_ISA::matmul_bf16(const Args& a) {
    // Terms side by side make words; the others are packed into them. (Of one column both strides are 1.)
    const bool direct = a.a_term == 1 && a.terms % 2 == 0;
    const int64_t ranges = parts_of(a.terms, DEPTH), all_words = parts_of(a.terms, 2);
    const int64_t chunks = parts_of(a.rows, direct ? CHUNK : parts_of(a.rows, a.threads));
    const int64_t most = parts_of(all_words, ranges), chunk = parts_of(a.rows, chunks);
    const int64_t panels = most * round_up(a.columns, COLUMNS) * 4;
    const int64_t sums = direct ? 0 : (parts_of(chunk, ROWS) + 1) * int64_t(sizeof(Vec));
    const int64_t own = direct ? 0 : round_up(sums + most * chunk * 4, LINE);
    const bool apart = ranges > 1 && a.c_dtype == FDC_BFLOAT16;
    char* const memory = static_cast<char*>(allocate(round_up(panels, LINE) + chunks * own));
    float* const scratch = apart ? static_cast<float*>(allocate(a.rows * a.columns * 4)) : nullptr;
    if (!memory || (apart && !scratch)) {
        std::free(memory);
        std::free(scratch);
        return FDC_NO_MEMORY;
    }
    uint32_t* const packed = reinterpret_cast<uint32_t*>(memory);
    float* const total = apart ? scratch : static_cast<float*>(a.c);
    // Terms are added in one order, whatever the number of threads.
#pragma omp parallel num_threads(a.threads)
    for (int64_t i = 0; i < ranges; ++i) {
        const int64_t term = 2 * begin_of(all_words, ranges, i), words = size_of(all_words, ranges, i);
        const int64_t depth = i + 1 < ranges ? 2 * words : a.terms - term;
        const Range range = {term, depth, words, i == 0, i + 1 == ranges};
        const int64_t blocks = parts_of(words, VEC);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b)
            pack_columns(a, range, b * VEC, b + 1 < blocks ? (b + 1) * VEC : words, packed);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < chunks; ++n) {
            const int64_t first = begin_of(a.rows, chunks, n), last = begin_of(a.rows, chunks, n + 1);
            char* const place = memory + round_up(panels, LINE) + n * own;
            uint32_t* const rows_packed = direct ? nullptr : reinterpret_cast<uint32_t*>(place + sums);
            if (!direct) pack_rows(a, range, first, last, rows_packed, reinterpret_cast<float*>(place));
            multiply(a, range, first, last, rows_packed, packed, total);
        }
    }
    std::free(memory);
    std::free(scratch);
    return FDC_OK;
}
#else
int64_t FDC_ISA::matmul_bf16(const fdc_matmul_bf16_args&) { return FDC_NO_ISA; }
#endif

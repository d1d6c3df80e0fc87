// short_attention in bfloat16 for processors that multiply pairs of bfloat16 and add them in float32 (AVX512-BF16).
// Softmax and sums are float32; weights are rounded to bfloat16 before the second product, as eager torch does.
// A word is two neighbours along the summed axis: channels for scores, keys or queries for sums of rows.
#pragma once

#include "short_attention.h"

namespace {

constexpr float LOG2E = 1.44269504088896341f;

typedef uint32_t Pair __attribute__((vector_size(64)));

FDC_INLINE Pair load_pairs(const uint32_t* p) { Pair v; std::memcpy(&v, p, sizeof(v)); return v; }
FDC_INLINE void store_pairs(uint32_t* p, Pair v) { std::memcpy(p, &v, sizeof(v)); }
FDC_INLINE Vec dot(Vec sum, uint32_t a, Pair b) {
    return Vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(int32_t(a))), __m512bh(b)));
}
FDC_INLINE void write(uint16_t* to, int64_t width, int64_t d, Vec v) {
    const __m256bh half = _mm512_cvtneps_pbh(__m512(v));
    if (d + VEC <= width) std::memcpy(to + d, &half, 32);
    else std::memcpy(to + d, &half, 16);
}
// Lane i: low half from a[i], high half from b[i], rounded; the rows, where asked for, get the two apart.
FDC_INLINE Pair zip(Vec a, Vec b, uint16_t* row_a = nullptr, uint16_t* row_b = nullptr) {
    typedef uint16_t Rows __attribute__((vector_size(64)));
    const Rows rows = Rows(_mm512_cvtne2ps_pbh(__m512(b), __m512(a)));
    if (row_a) std::memcpy(row_a, &rows, 32);
    if (row_b) std::memcpy(row_b, reinterpret_cast<const char*>(&rows) + 32, 32);
    Rows order = {};
    for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 16);
    return Pair(_mm512_permutexvar_epi16(__m512i(order), __m512i(rows)));
}

// One (sample, head): sizes and the work space of its thread. `even`: queries rounded up; the added one is zero.
struct PairJob {
    int64_t queries, even, keys, columns, words, padded;
    uint32_t *q, *k, *v, *g;                      // rows of words
    uint32_t *kt, *vt;                            // keys and values turned: (words, columns)
    uint32_t *q_pairs, *k_pairs, *v_pairs, *g_pairs;  // (rows / 2, padded): two rows a word
    uint32_t *p, *ds;                             // (even / 2, columns): weights, score gradients; two queries a word
    uint16_t* rows;                               // (ROWS, columns) of a block, bfloat16
    float *scores, *change;                       // (ROWS, columns) of a block
    float* stats;                                 // (even, 2)
    Int last;
    void* memory;
};

bool allocate(const Args& a, PairJob& job, bool backward) {
    job.queries = a.queries;
    job.even = round_up(a.queries, 2);
    job.words = a.head_dim / 2;
    job.padded = round_up(a.head_dim, VEC);
    const int64_t columns = round_up(a.keys, VEC), slack = 16;
    const int64_t rows_q = job.even * job.words + slack, rows_k = columns * job.words + slack;
    const int64_t pairs_q = job.even / 2 * job.padded, pairs_k = columns / 2 * job.padded;
    const int64_t turned = job.words * columns, block = ROWS * columns, weights = job.even / 2 * columns;
    struct { void* piece; int64_t size; } pieces[] = {
        {&job.q, rows_q}, {&job.k, rows_k}, {&job.kt, turned}, {&job.v_pairs, pairs_k}, {&job.rows, block / 2},
        {&job.scores, block}, {&job.stats, 2 * job.even}, {&job.v, rows_k}, {&job.g, rows_q}, {&job.vt, turned},
        {&job.q_pairs, pairs_q}, {&job.k_pairs, pairs_k}, {&job.g_pairs, pairs_q}, {&job.p, weights},
        {&job.ds, weights}, {&job.change, block}};
    const int count = backward ? 16 : 7;
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += round_up(pieces[i].size, 16);
    job.memory = std::aligned_alloc(64, size_t(total) * 4);
    char* next = static_cast<char*>(job.memory);
    for (int i = 0; job.memory && i < count; ++i) {
        std::memcpy(pieces[i].piece, &next, sizeof(next));
        next += round_up(pieces[i].size, 16) * 4;
    }
    return job.memory;
}

// Channels d .. d + 15 of a row, zero behind its end; and back.
FDC_INLINE Half read(const uint16_t* row, int64_t d, int64_t width) {
    Half h = {};
    if (d + VEC <= width) std::memcpy(&h, row + d, 32);
    else std::memcpy(&h, row + d, 16);
    return h;
}
FDC_INLINE void put(uint32_t* row, int64_t d, int64_t width, Half h) {
    if (d + VEC <= width) std::memcpy(row + d / 2, &h, 32);
    else std::memcpy(row + d / 2, &h, 16);
}

// n rows of a head as rows of words and as pairs of rows, a last odd row with a row of zeros; either may be null.
void pack(const fdc_strided& x, int64_t sample, int64_t head, int64_t n, const PairJob& job, uint32_t* rows,
          uint32_t* pairs) {
    const int64_t width = 2 * job.words;
    for (int64_t i = 0; i < n; i += 2)
        for (int64_t d = 0; d < width; d += VEC) {
            const uint16_t* const row = at<Bf16>(x, sample, head) + i * x.token;
            const Half a = read(row, d, width), b = i + 1 < n ? read(row + x.token, d, width) : Half{};
            if (rows) put(rows + i * job.words, d, width, a);
            if (rows) put(rows + (i + 1) * job.words, d, width, b);
            if (pairs)
                store_pairs(pairs + i / 2 * job.padded + d,
                            __builtin_convertvector(a, Pair) | __builtin_convertvector(b, Pair) << 16);
        }
}

// (n, words) to (words, columns); columns from n on become zero.
void turn(const uint32_t* from, int64_t n, const PairJob& job, uint32_t* to) {
    const float* const rows = reinterpret_cast<const float*>(from);
    float* const out = reinterpret_cast<float*>(to);
    for (int64_t j = 0; j < job.columns; j += VEC)
        for (int64_t w = 0; w < job.words; w += VEC / 2) {
            Vec tile[VEC];
#pragma GCC unroll 16
            for (int i = 0; i < VEC; ++i) tile[i] = j + i < n ? load(rows + (j + i) * job.words + w) : Vec{};
            transpose(tile);  // of what the compiler keeps: half of it is never read
#pragma GCC unroll 8
            for (int i = 0; i < VEC / 2; ++i)
                if (w + i < job.words) store(out + (w + i) * job.columns + j, tile[i]);
        }
}

// acc[r][c] = sum over channels of rows[r] and keys (or values) key ...
template <int R, int C>
FDC_INLINE void products(const PairJob& job, const uint32_t* rows, const uint32_t* columns, Vec (&acc)[R][C]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) acc[r][c] = Vec{};
    for (int64_t w = 0; w < job.words; ++w) {
        Pair column[C];
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) column[c] = load_pairs(columns + w * job.columns + c * VEC);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], rows[r * job.words + w], column[c]);
    }
}

// acc[r] = sum over i of the pair weights[r * across + i * along] times the pair of rows i.
template <int R>
FDC_INLINE void combine(const PairJob& job, const uint32_t* weights, int64_t across, int64_t along, int64_t n,
                        const uint32_t* pairs, Vec (&acc)[R]) {
    Vec odd[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = odd[r] = Vec{};
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
        const Pair a = load_pairs(pairs + i * job.padded), b = load_pairs(pairs + (i + 1) * job.padded);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            acc[r] = dot(acc[r], weights[r * across + i * along], a);
            odd[r] = dot(odd[r], weights[r * across + (i + 1) * along], b);
        }
    }
    if (i < n) {
        const Pair a = load_pairs(pairs + i * job.padded);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r] = dot(acc[r], weights[r * across + i * along], a);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] += odd[r];
}

FDC_INLINE const uint32_t* row_pairs(const PairJob& job) { return reinterpret_cast<const uint32_t*>(job.rows); }

// Sizes of a sample; what both directions pack.
void begin(const Args& a, int64_t sample, int64_t head, PairJob& job, bool backward) {
    const int64_t length = a.lengths ? a.lengths[sample] : a.keys;
    job.keys = length < 0 ? 0 : length < a.keys ? length : a.keys;
    job.columns = round_up(job.keys, VEC);
    job.last = lane_numbers() < int32_t(job.keys - (job.columns - VEC));
    pack(a.q, sample, head, job.queries, job, job.q, backward ? job.q_pairs : nullptr);
    pack(a.k, sample, head, job.keys, job, job.k, backward ? job.k_pairs : nullptr);
    pack(a.v, sample, head, job.keys, job, backward ? job.v : nullptr, backward ? nullptr : job.v_pairs);
    turn(job.k, job.keys, job, job.kt);
}

template <int R>
FDC_INLINE void forward_block(const Args& a, const PairJob& job, int64_t first, uint16_t* out, float* stats) {
    Vec top[R], total[R];
    const Vec lowest = splat(-std::numeric_limits<float>::infinity()), factor = splat(a.scale * LOG2E);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) top[r] = lowest;
    for_chunks(job.columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        Vec acc[R][C];
        products<R, C>(job, job.q + first * job.words, job.kt + key, acc);
        const bool end = key + C * VEC == job.columns;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                Vec x = acc[r][c] * factor;
                if (end && c == C - 1) x = job.last ? x : lowest;
                store(job.scores + r * job.columns + key + c * VEC, x);
                top[r] = larger(top[r], x);
            }
    });
    float most[R], sum[R];
    fold<Max>(top, most);
    for (int r = 0; r < R; ++r) {
        const Vec shift = splat(most[r]);
        total[r] = Vec{};
        for (int64_t j = 0; j < job.columns; j += VEC) {
            const Vec p = exp2_negative(load(job.scores + r * job.columns + j) - shift);
            const __m256bh half = _mm512_cvtneps_pbh(__m512(p));
            std::memcpy(job.rows + r * job.columns + j, &half, 32);
            total[r] += p;
        }
    }
    fold<Add>(total, sum);
    for (int r = 0; r < R; ++r) {
        stats[2 * (first + r)] = most[r];
        stats[2 * (first + r) + 1] = sum[r] = 1.0f / sum[r];
    }
    for (int64_t d = 0; d < job.padded; d += VEC) {
        Vec acc[R];
        combine<R>(job, row_pairs(job), job.columns / 2, 1, (job.keys + 1) / 2, job.v_pairs + d, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            write(out + (first + r) * a.heads * a.head_dim, a.head_dim, d, acc[r] * sum[r]);
    }
}

void forward(const Args& a, int64_t sample, int64_t head, PairJob& job) {
    begin(a, sample, head, job, false);
    uint16_t* const out = place<Bf16>(a, a.out, a.queries, sample, head);
    float* const stats = a.stats + (sample * a.heads + head) * a.queries * 2;
    if (job.keys == 0) return write_nothing<Bf16>(a, out, stats);
    for_blocks(job.queries, [&](auto r, int64_t first) {
        forward_block<decltype(r)::value>(a, job, first, out, stats);
    });
}

// Weights, gradients of scores and gradient of q of HALF pairs of queries from pair `first` on.
template <int HALF>
FDC_INLINE void backward_block(const Args& a, const PairJob& job, int64_t first, uint16_t* grad_q) {
    constexpr int R = 2 * HALF;
    const int64_t columns = job.columns;
    const Vec factor = splat(a.scale * LOG2E);
    const float* const stats = job.stats + 4 * first;
    Vec delta[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) delta[r] = Vec{};
    for_chunks(columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        Vec acc[R][C];
        products<R, C>(job, job.q + 2 * first * job.words, job.kt + key, acc);
        const bool end = key + C * VEC == columns;
#pragma GCC unroll 4
        for (int h = 0; h < HALF; ++h)
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                Vec p[2];
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    const int r = 2 * h + i;
                    p[i] = exp2_negative(acc[r][c] * factor - splat(stats[2 * r])) * stats[2 * r + 1];
                    if (end && c == C - 1) p[i] = job.last ? p[i] : Vec{};
                    store(job.scores + r * columns + key + c * VEC, p[i]);
                }
                store_pairs(job.p + (first + h) * columns + key + c * VEC, zip(p[0], p[1]));
            }
        products<R, C>(job, job.g + 2 * first * job.words, job.vt + key, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                store(job.change + r * columns + key + c * VEC, acc[r][c]);
                delta[r] = fma(load(job.scores + r * columns + key + c * VEC), acc[r][c], delta[r]);
            }
    });
    float sum[R];
    fold<Add>(delta, sum);
#pragma GCC unroll 4
    for (int h = 0; h < HALF; ++h) {
        const Vec shift[2] = {splat(sum[2 * h]), splat(sum[2 * h + 1])};
        uint16_t* const rows = job.rows + 2 * h * columns;
        for (int64_t j = 0; j < columns; j += VEC) {
            Vec ds[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const int64_t place = (2 * h + i) * columns + j;
                ds[i] = load(job.scores + place) * (load(job.change + place) - shift[i]);
            }
            store_pairs(job.ds + (first + h) * columns + j, zip(ds[0], ds[1], rows + j, rows + columns + j));
        }
    }
    for (int64_t d = 0; d < job.padded; d += VEC) {
        Vec acc[R];
        combine<R>(job, row_pairs(job), columns / 2, 1, (job.keys + 1) / 2, job.k_pairs + d, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (2 * first + r == job.queries) break;
            write(grad_q + (2 * first + r) * a.heads * a.head_dim, a.head_dim, d, acc[r] * a.scale);
        }
    }
}

// to[j] = factor * sum over the queries i of weights[i][j] * rows[i]; zero for keys that do not count.
void sum_queries(const Args& a, const PairJob& job, const uint32_t* weights, const uint32_t* pairs, float factor,
                 uint16_t* to) {
    const int64_t stride = a.heads * a.head_dim;
    for_blocks(job.keys, [&](auto r, int64_t first) {
        constexpr int R = decltype(r)::value;
        for (int64_t d = 0; d < job.padded; d += VEC) {
            Vec acc[R];
            combine<R>(job, weights + first, 1, job.columns, job.even / 2, pairs + d, acc);
#pragma GCC unroll 8
            for (int j = 0; j < R; ++j)
                write(to + (first + j) * stride, a.head_dim, d, acc[j] * factor);
        }
    });
    for (int64_t j = job.keys; j < a.keys; ++j) std::memset(to + j * stride, 0, size_t(a.head_dim) * 2);
}

void backward(const Args& a, int64_t sample, int64_t head, PairJob& job) {
    begin(a, sample, head, job, true);
    pack(a.grad_out, sample, head, job.queries, job, job.g, job.g_pairs);
    turn(job.v, job.keys, job, job.vt);
    // The query that makes the number even has weights exp(0) * 0.
    job.stats[2 * job.even - 2] = job.stats[2 * job.even - 1] = 0;
    std::memcpy(job.stats, a.stats + (sample * a.heads + head) * a.queries * 2, size_t(a.queries) * 2 * sizeof(float));
    for_blocks<ROWS / 2>(job.even / 2, [&](auto half, int64_t first) {
        backward_block<decltype(half)::value>(a, job, first, place<Bf16>(a, a.grad_q, a.queries, sample, head));
    });
    sum_queries(a, job, job.p, job.g_pairs, 1, place<Bf16>(a, a.grad_v, a.keys, sample, head));
    sum_queries(a, job, job.ds, job.q_pairs, a.scale, place<Bf16>(a, a.grad_k, a.keys, sample, head));
}

int64_t run_forward_pairs(const Args& a) {
    return for_heads<PairJob>(a, false, [&](int64_t s, int64_t head, PairJob& job) { forward(a, s, head, job); });
}
int64_t run_backward_pairs(const Args& a) {
    return for_heads<PairJob>(a, true, [&](int64_t s, int64_t head, PairJob& job) { backward(a, s, head, job); });
}

}  // namespace

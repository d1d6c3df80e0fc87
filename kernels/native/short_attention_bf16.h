// short_attention in bfloat16 for processors that multiply pairs of bfloat16 and add them in float32 (AVX512-BF16).
// Softmax and sums are float32; weights are rounded to bfloat16 before the second product, as eager torch does.
// A word is two neighbours along the summed axis: channels for scores, keys or queries for sums of rows.
#pragma once

#include "short_attention.h"

namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr int64_t PITCH_WORDS = PITCH / 2;  // the same of rows of bfloat16

// Channels of a row from d on, as far as there are any, that is 8 or 16; zero behind them. And back.
FDC_INLINE Half read(const uint16_t* row, int64_t d, int64_t width) {
    Half h = {};
    if (d + VEC <= width) std::memcpy(&h, row + d, 32);
    else std::memcpy(&h, row + d, 16);
    return h;
}
FDC_INLINE Vec widen(Half h) { return Vec(__builtin_convertvector(h, Word) << 16); }
FDC_INLINE void write(uint16_t* row, int64_t d, int64_t width, Vec v) {
    const __m256bh half = _mm512_cvtneps_pbh(__m512(v));
    if (d + VEC <= width) std::memcpy(row + d, &half, 32);
    else std::memcpy(row + d, &half, 16);
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
    int64_t even, keys, columns, words, padded;
    uint32_t *q, *g;                                  // rows of words
    uint32_t *kt, *vt;                                // keys and values turned: (words, columns)
    uint32_t *q_pairs, *k_pairs, *v_pairs, *g_pairs;  // (rows / 2, padded): two rows a word
    uint32_t *p, *ds;                                 // (even / 2, PITCH): weights, score gradients; two queries a word
    uint16_t* rows;                                   // (ROWS, PITCH) of a block, bfloat16
    float *scores, *change;                           // (ROWS, PITCH) of a block: scores or weights, their gradients
    float* lanes;                                     // (ROWS, VEC) of a block: sums of weights, lane by lane
    float* stats;                                     // (even, 2)
    Int last;
    void* memory;
};

void* allocate(const Args& a, PairJob& job, bool backward) {
    job.even = round_up(a.queries, 2);
    job.words = a.head_dim / 2;
    job.padded = round_up(a.head_dim, VEC);
    const int64_t columns = round_up(a.keys, VEC), weights = job.even / 2 * PITCH;
    const int64_t rows_q = job.even * job.words, turned = job.words * columns;
    const int64_t pairs_q = job.even / 2 * job.padded, pairs_k = columns / 2 * job.padded;
    const Piece pieces[] = {
        {&job.q, rows_q}, {&job.kt, turned}, {&job.rows, ROWS * PITCH_WORDS}, {&job.scores, ROWS * PITCH},
        {&job.lanes, ROWS * VEC}, {backward ? &job.k_pairs : &job.v_pairs, pairs_k}, {&job.stats, 2 * job.even},
        {&job.g, rows_q}, {&job.vt, turned}, {&job.q_pairs, pairs_q}, {&job.g_pairs, pairs_q}, {&job.p, weights},
        {&job.ds, weights}, {&job.change, ROWS * PITCH}};
    return allocate_pieces(pieces, backward ? 14 : 6);
}

// The queries' rows as they are, an added one as zeros.
void pack_rows(const Args& a, const fdc_strided& x, int64_t sample, int64_t head, const PairJob& job, uint32_t* to) {
    const uint16_t* const from = at<Bf16>(x, sample, head);
    const int64_t words = job.words, stride = x.token;
    for (int64_t d = 0; d < a.head_dim; d += VEC)
        if (d + VEC <= a.head_dim)
            for (int64_t i = 0; i < a.queries; ++i) std::memcpy(to + i * words + d / 2, from + i * stride + d, 32);
        else
            for (int64_t i = 0; i < a.queries; ++i) std::memcpy(to + i * words + d / 2, from + i * stride + d, 16);
    if (a.queries < job.even) std::memset(to + a.queries * job.words, 0, size_t(job.words) * 4);
}

// n rows of a head as pairs of rows, a last odd row with a row of zeros.
void pack_pairs(const fdc_strided& x, int64_t sample, int64_t head, int64_t n, const PairJob& job, uint32_t* to) {
    const int64_t width = 2 * job.words;
    for (int64_t d = 0; d < width; d += VEC)
        for (int64_t i = 0; i < n; i += 2) {
            const uint16_t* const row = at<Bf16>(x, sample, head) + i * x.token;
            const Half first = read(row, d, width), second = i + 1 < n ? read(row + x.token, d, width) : Half{};
            store_pairs(to + i / 2 * job.padded + d,
                        __builtin_convertvector(first, Pair) | __builtin_convertvector(second, Pair) << 16);
        }
}

// n rows of a head to (words, columns); columns from n on become zero.
void turn(const fdc_strided& x, int64_t sample, int64_t head, int64_t n, const PairJob& job, uint32_t* to) {
    float* const out = reinterpret_cast<float*>(to);
    for (int64_t j = 0; j < job.columns; j += VEC)
        for (int64_t w = 0; w < job.words; w += VEC / 2) {
            const uint16_t* const row = at<Bf16>(x, sample, head) + j * x.token;
            Vec tile[VEC];
#pragma GCC unroll 16
            for (int i = 0; i < VEC; ++i) {
                const Half half = j + i < n ? read(row + i * x.token, 2 * w, 2 * job.words) : Half{};
                tile[i] = Vec(_mm512_castsi256_si512(__m256i(half)));
            }
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

// acc[r] = sum over i of the pair weights[r * ACROSS + i * ALONG] times the pair of rows i.
template <int R, int64_t ACROSS, int64_t ALONG>
FDC_INLINE void combine(const PairJob& job, const uint32_t* weights, int64_t n, const uint32_t* pairs, Vec (&acc)[R]) {
    Vec odd[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = odd[r] = Vec{};
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
        const Pair a = load_pairs(pairs + i * job.padded), b = load_pairs(pairs + (i + 1) * job.padded);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            acc[r] = dot(acc[r], weights[r * ACROSS + i * ALONG], a);
            odd[r] = dot(odd[r], weights[r * ACROSS + (i + 1) * ALONG], b);
        }
    }
    if (i < n) {
        const Pair a = load_pairs(pairs + i * job.padded);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r] = dot(acc[r], weights[r * ACROSS + i * ALONG], a);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] += odd[r];
}

// The sums of `combine` times a factor each, the first `count` of them written from row `to` on.
template <int64_t ACROSS, int64_t ALONG, int R>
FDC_INLINE void write_sums(const PairJob& job, const uint32_t* weights, int64_t n, const uint32_t* pairs,
                           const float (&factors)[R], uint16_t* to, int64_t stride, int64_t count = R) {
    for (int64_t d = 0; d < job.padded; d += VEC) {
        Vec acc[R];
        combine<R, ACROSS, ALONG>(job, weights, n, pairs + d, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            if (r < count) write(to + r * stride, d, 2 * job.words, acc[r] * factors[r]);
    }
}

// Weights 2^(factor * score - the row's largest of it) of R queries in bfloat16, their sums lane by lane. The largest
// is always taken off: its weight, often most of the sum, is then 1 and has no rounding error.
template <int R>
FDC_INLINE void weights(const PairJob& job, const uint32_t* queries, float factor, float (&most)[R]) {
    Vec top[R];
    const Vec lowest = splat(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) top[r] = lowest;
    for_chunks(job.columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        Vec acc[R][C];
        products<R, C>(job, queries, job.kt + key, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                const Vec x = acc[r][c] * factor;
                acc[r][c] = key + (c + 1) * VEC == job.columns ? (job.last ? x : lowest) : x;
                top[r] = larger(top[r], acc[r][c]);
            }
        store_rows(acc, job.scores + key);
    });
    fold<Max>(top, most);
    // In variables of their own: the compiler takes every store for a possible change of `job`.
    const float* scores = job.scores;
    float* lanes = job.lanes;
    uint16_t* row = job.rows;
    const int64_t columns = job.columns;
    for (int r = 0; r < R; ++r, scores += PITCH, row += PITCH, lanes += VEC) {
        const Vec shift = splat(most[r]);
        Vec total = {};
        for (int64_t j = 0; j < columns; j += VEC) {
            const Vec weight = coarse_exponential2(not_below(-160, load(scores + j) - shift));
            const __m256bh half = _mm512_cvtneps_pbh(__m512(weight));
            std::memcpy(row + j, &half, 32);
            total += weight;
        }
        store(lanes, total);
    }
}

void forward(const Args& a, int64_t sample, int64_t head, PairJob& job) {
    set_keys(a, sample, job);
    uint16_t* const out = at<Bf16>(a.out, sample, head);
    float* const stats = a.stats + (sample * a.heads + head) * a.queries * 2;
    if (job.keys == 0) return write_nothing<Bf16>(a, out, stats);
    pack_rows(a, a.q, sample, head, job, job.q);
    pack_pairs(a.v, sample, head, job.keys, job, job.v_pairs);
    turn(a.k, sample, head, job.keys, job, job.kt);
    for_blocks(a.queries, [&](auto rows, int64_t first) {
        constexpr int R = decltype(rows)::value;
        prefetch_next(a, false, sample, head, first, R);
        float most[R], inverse[R];
        weights<R>(job, job.q + first * job.words, a.scale * LOG2E, most);
        fold_rows(job.lanes, inverse);
        for (int r = 0; r < R; ++r) {
            stats[2 * (first + r)] = most[r];
            stats[2 * (first + r) + 1] = inverse[r] = 1.0f / inverse[r];
        }
        write_sums<PITCH_WORDS, 1>(job, reinterpret_cast<const uint32_t*>(job.rows), (job.keys + 1) / 2, job.v_pairs,
                                   inverse, out + first * a.out.token, a.out.token);
    });
}

// delta of HALF pairs of queries from pair `first` on, which the softmax takes off the gradients of weights: output
// times its gradient, summed; of `count` queries, as the last pair may be half a one.
template <int HALF>
FDC_INLINE void deltas(const PairJob& job, int64_t first, const uint16_t* out, int64_t stride, int64_t count,
                               float (&delta)[2 * HALF]) {
    const int64_t width = 2 * job.words;
    const uint16_t* g = reinterpret_cast<const uint16_t*>(job.g) + 2 * first * width;
    Vec terms[2 * HALF] = {};
#pragma GCC unroll 8
    for (int r = 0; r < 2 * HALF; ++r, g += width)
        for (int64_t d = 0; d < width && r < count; d += VEC)
            terms[r] = fma(widen(read(g, d, width)), widen(read(out + r * stride, d, width)), terms[r]);
    fold<Add>(terms, delta);
}

// Weights and gradients of scores of HALF pairs of queries from pair `first` on.
template <int HALF>
FDC_INLINE void score_gradients(const PairJob& job, int64_t first, float factor, const float (&delta)[2 * HALF]) {
    constexpr int R = 2 * HALF;
    const float* const stats = job.stats + 4 * first;
    for_chunks(job.columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        float *scores = job.scores + key, *change = job.change + key;
        uint32_t *p = job.p + first * PITCH + key, *ds_pairs = job.ds + first * PITCH + key;
        uint16_t* rows = job.rows + key;
        const Int last = key + C * VEC == job.columns ? job.last : Int{} - 1;
        Vec acc[R][C];
        products<R, C>(job, job.q + 2 * first * job.words, job.kt + key, acc);
        store_rows(acc, scores);
        products<R, C>(job, job.g + 2 * first * job.words, job.vt + key, acc);
        store_rows(acc, change);
        const Vec times = splat(factor);
        for (int h = 0; h < HALF; ++h) {
            const Vec shift[2] = {splat(-stats[4 * h]), splat(-stats[4 * h + 2])};
            const Vec inverse[2] = {splat(stats[4 * h + 1]), splat(stats[4 * h + 3])};
            const Vec off[2] = {splat(delta[2 * h]), splat(delta[2 * h + 1])};
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                Vec weight[2], ds[2];
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    const Vec score = fma(load(scores + i * PITCH + c * VEC), times, shift[i]);
                    const Vec x = coarse_exponential2(not_below(-160, score)) * inverse[i];
                    weight[i] = c == C - 1 ? (last ? x : Vec{}) : x;
                    ds[i] = weight[i] * (load(change + i * PITCH + c * VEC) - off[i]);
                }
                store_pairs(p + c * VEC, zip(weight[0], weight[1]));
                store_pairs(ds_pairs + c * VEC, zip(ds[0], ds[1], rows + c * VEC, rows + PITCH + c * VEC));
            }
            scores += 2 * PITCH, change += 2 * PITCH, rows += 2 * PITCH, p += PITCH, ds_pairs += PITCH;
        }
    });
}

// to[j] = factor * sum over the queries i of weights[i][j] * rows[i]; zero for keys that do not count.
void sum_queries(const Args& a, const PairJob& job, const uint32_t* weights, const uint32_t* pairs, float factor,
                 uint16_t* to, int64_t stride) {
    for_blocks(job.keys, [&](auto keys, int64_t first) {
        float factors[decltype(keys)::value];
        for (float& x : factors) x = factor;
        write_sums<1, PITCH>(job, weights + first, job.even / 2, pairs, factors, to + first * stride, stride);
    });
    for (int64_t j = job.keys; j < a.keys; ++j) std::memset(to + j * stride, 0, size_t(a.head_dim) * 2);
}

void backward(const Args& a, int64_t sample, int64_t head, PairJob& job) {
    set_keys(a, sample, job);
    pack_rows(a, a.q, sample, head, job, job.q);
    pack_rows(a, a.grad_out, sample, head, job, job.g);
    pack_pairs(a.q, sample, head, a.queries, job, job.q_pairs);
    pack_pairs(a.grad_out, sample, head, a.queries, job, job.g_pairs);
    pack_pairs(a.k, sample, head, job.keys, job, job.k_pairs);
    turn(a.k, sample, head, job.keys, job, job.kt);
    turn(a.v, sample, head, job.keys, job, job.vt);
    // The query that makes the number even has weights 2^0 * 0.
    job.stats[2 * job.even - 2] = job.stats[2 * job.even - 1] = 0;
    std::memcpy(job.stats, a.stats + (sample * a.heads + head) * a.queries * 2, size_t(a.queries) * 2 * sizeof(float));
    const uint16_t* const out = at<Bf16>(a.out, sample, head);
    uint16_t* const grad_q = at<Bf16>(a.grad_q, sample, head);
    for_blocks<ROWS / 2>(job.even / 2, [&](auto half, int64_t first) {
        constexpr int R = 2 * decltype(half)::value;
        float delta[R], scales[R];
        for (float& x : scales) x = a.scale;
        const int64_t count = a.queries - 2 * first;
        prefetch_next(a, true, sample, head, 2 * first, count < R ? count : R);
        deltas<R / 2>(job, first, out + 2 * first * a.out.token, a.out.token, count, delta);
        score_gradients<R / 2>(job, first, a.scale * LOG2E, delta);
        write_sums<PITCH_WORDS, 1>(job, reinterpret_cast<const uint32_t*>(job.rows), (job.keys + 1) / 2, job.k_pairs,
                                   scales, grad_q + 2 * first * a.grad_q.token, a.grad_q.token, count);
    });
    sum_queries(a, job, job.p, job.g_pairs, 1, at<Bf16>(a.grad_v, sample, head), a.grad_v.token);
    sum_queries(a, job, job.ds, job.q_pairs, a.scale, at<Bf16>(a.grad_k, sample, head), a.grad_k.token);
}

int64_t run_forward_pairs(const Args& a) {
    return for_heads<PairJob>(a, false, [&](int64_t s, int64_t head, PairJob& job) { forward(a, s, head, job); });
}
int64_t run_backward_pairs(const Args& a) {
    return for_heads<PairJob>(a, true, [&](int64_t s, int64_t head, PairJob& job) { backward(a, s, head, job); });
}

}  // namespace

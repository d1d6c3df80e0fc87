// short_attention for one instruction set (FDC_ISA), forward and backward: one (sample, head) at a time, all of it in
// the first caches. The lanes of a register are keys while scores are computed, and channels of the head where rows of
// keys, values or queries are summed. The semantics are those of kernels/reference.py.
#include "short_attention.h"
#if defined(__AVX512BF16__)
#include "short_attention_bf16.h"
#endif

namespace {

const float ONE = 1.0f;
// Scores of a magnitude up to this go into exp as they are; larger ones, after the largest of their row was subtracted.
constexpr float PLAIN_SCORE = 16.0f;

// The first `left` channels of a row, as many as a register holds; zero behind them. And back.
template <class T>
FDC_INLINE Vec read(const Stored<T>* row, int64_t left) {
    if (left >= VEC) return T::load(row);
    Stored<T> rest[VEC] = {};
    if (left > 0) std::memcpy(rest, row, size_t(left) * sizeof(*row));
    return T::load(rest);
}
template <class T>
FDC_INLINE void write(Stored<T>* row, int64_t left, Vec v) {
    if (left >= VEC) return T::store(row, v);
    Stored<T> whole[VEC];
    T::store(whole, v);
    if (left > 0) std::memcpy(row, whole, size_t(left) * sizeof(*row));
}

// (n, width) with row stride `stride` to (n, padded) floats, row i times factors[i * step]; zero behind `width`.
template <class T>
void pack(const Stored<T>* from, int64_t stride, int64_t n, int64_t width, int64_t padded, const float* factors,
          int64_t step, float* to) {
    for (int64_t d = 0; d < padded; d += VEC, from += VEC, to += VEC)
        if (d + VEC <= width)
            for (int64_t i = 0; i < n; ++i) store(to + i * padded, T::load(from + i * stride) * factors[i * step]);
        else
            for (int64_t i = 0; i < n; ++i)
                store(to + i * padded, read<T>(from + i * stride, width - d) * factors[i * step]);
}

// (n, width) with row stride `stride` to (width, columns) floats; columns from n on become zero.
template <class T>
void turn(const Stored<T>* from, int64_t stride, int64_t n, int64_t width, int64_t columns, float* to) {
    for (int64_t d = 0; d < width; d += VEC)
        for (int64_t j = 0; j < columns; j += VEC) {
            const Stored<T>* const row = from + j * stride + d;
            Vec tile[VEC];
            if (j + VEC <= n && d + VEC <= width) {
#pragma GCC unroll 16
                for (int i = 0; i < VEC; ++i) tile[i] = T::load(row + i * stride);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < VEC; ++i) tile[i] = j + i < n ? read<T>(row + i * stride, width - d) : Vec{};
            }
            transpose(tile);
#pragma GCC unroll 16
            for (int i = 0; i < VEC; ++i)
                if (d + i < width) store(to + (d + i) * columns + j, tile[i]);
        }
}

// One (sample, head): sizes and the work space of its thread.
struct Job {
    int64_t keys, columns, width, padded;  // columns: keys rounded up to registers, padded: width likewise
    float *q, *k, *v, *g;                  // packed rows
    float *kt, *vt;                        // keys and values turned
    float *p, *ds;                         // weights (of a block in the forward), gradients of the scores
    float* lanes;                          // (ROWS, VEC) of a block: sums of weights, lane by lane
    Int last;                              // lanes of the last register that hold keys
    void* memory;
};

void* allocate(const Args& a, Job& job, bool backward) {
    job.width = a.head_dim;
    job.padded = round_up(a.head_dim, VEC * SPAN);
    const int64_t turned = round_up(a.keys, VEC) * job.width;
    const int64_t rows_q = a.queries * job.padded, rows_k = a.keys * job.padded;
    const Piece pieces[] = {{&job.q, rows_q}, {&job.kt, turned}, {&job.lanes, ROWS * VEC},
                            {&job.p, (backward ? a.queries : ROWS) * PITCH}, {backward ? &job.k : &job.v, rows_k},
                            {&job.g, rows_q}, {&job.vt, turned}, {&job.ds, a.queries * PITCH}};
    return allocate_pieces(pieces, backward ? 8 : 5);
}

// acc[r][c] = sum over d of rows[r][d] * columns[d][key .. ].
template <int R, int C>
FDC_INLINE void products(const Job& job, const float* rows, const float* columns, Vec (&acc)[R][C]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) acc[r][c] = Vec{};
    for (int64_t d = 0; d < job.width; ++d) {
        Vec column[C];
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) column[c] = load(columns + d * job.columns + c * VEC);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec x = splat(rows[r * job.padded + d]);
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) acc[r][c] = fma(x, column[c], acc[r][c]);
        }
    }
}

// acc[r] = sum over i of weights[r * ACROSS + i * ALONG] * rows[i][d ..]; two partial sums hide the latency of fma
// and lose fewer bits than one.
template <int R, int64_t ACROSS, int64_t ALONG>
FDC_INLINE void combine(const Job& job, const float* weights, int64_t n, const float* rows, Vec (&acc)[R][SPAN]) {
    constexpr int PARTS = WIDE ? 2 : 1;
    Vec part[PARTS][R][SPAN] = {};
    auto add = [&](int64_t i, int p) __attribute__((always_inline)) {
        Vec row[SPAN];
#pragma GCC unroll 2
        for (int s = 0; s < SPAN; ++s) row[s] = load(rows + i * job.padded + s * VEC);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec w = splat(weights[r * ACROSS + i * ALONG]);
#pragma GCC unroll 2
            for (int s = 0; s < SPAN; ++s) part[p][r][s] = fma(w, row[s], part[p][r][s]);
        }
    };
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; ++p) add(i + p, p);
    if (i < n) add(i, 0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int s = 0; s < SPAN; ++s)
            acc[r][s] = WIDE ? part[0][r][s] + part[PARTS - 1][r][s] : part[0][r][s];
}

// The sums of `combine` for R rows, each times its factor, written from row `first` of a head on.
template <class T, int64_t ACROSS, int64_t ALONG, int R>
FDC_INLINE void write_sums(const Job& job, const float* weights, int64_t n, const float* rows,
                           const float (&factors)[R], Stored<T>* to, int64_t stride) {
    for (int64_t d = 0; d < job.padded; d += VEC * SPAN) {
        Vec acc[R][SPAN];
        combine<R, ACROSS, ALONG>(job, weights, n, rows + d, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int s = 0; s < SPAN; ++s) {
                const int64_t channel = d + s * VEC;
                write<T>(to + r * stride + channel, job.width - channel, acc[r][s] * factors[r]);
            }
    }
}

// Weights exp(score) of R queries, their sums lane by lane; false where a score is too large for that.
template <int R>
FDC_INLINE bool plain_weights(const Job& job, const float* queries) {
    Vec largest = {};
    for_chunks(job.columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        Vec acc[R][C];
        products<R, C>(job, queries, job.kt + key, acc);
        store_rows(acc, job.p + key);
        const Int last = key + C * VEC == job.columns ? job.last : Int{} - 1;
        // In variables of their own: the compiler takes every store for a possible change of `job`.
        float *row = job.p + key, *lanes = job.lanes;
        for (int r = 0; r < R; ++r, row += PITCH, lanes += VEC) {
            Vec total = key ? load(lanes) : Vec{};
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                const Vec score = load(row + c * VEC);
                largest = larger_magnitude(score, largest);
                const Vec x = exponential(score), weight = c == C - 1 ? (last ? x : Vec{}) : x;
                store(row + c * VEC, weight);
                total += weight;
            }
            store(lanes, total);
        }
    });
    return !any_above(largest, PLAIN_SCORE);
}

// Weights exp(score - largest score of the row) of R queries, their sums lane by lane.
template <int R>
__attribute__((noinline)) void shifted_weights(const Job& job, const float* queries, float (&most)[R]) {
    Vec top[R];
    const Vec lowest = splat(-std::numeric_limits<float>::infinity());
    for (int r = 0; r < R; ++r) top[r] = lowest;
    for_chunks(job.columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        Vec acc[R][C];
        products<R, C>(job, queries, job.kt + key, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (key + C * VEC == job.columns) acc[r][C - 1] = job.last ? acc[r][C - 1] : lowest;
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) top[r] = larger(top[r], acc[r][c]);
        }
        store_rows(acc, job.p + key);
    });
    fold<Max>(top, most);
    for (int r = 0; r < R; ++r) {
        Vec total = {};
        for (float* x = job.p + r * PITCH; x < job.p + r * PITCH + job.columns; x += VEC) {
            const Vec weight = exponential(not_below(-110, load(x) - splat(most[r])));
            store(x, weight);
            total += weight;
        }
        store(job.lanes + r * VEC, total);
    }
}

// Sets the sizes of a sample and packs what both directions read.
template <class T>
void begin(const Args& a, int64_t sample, int64_t head, Job& job) {
    set_keys(a, sample, job);
    pack<T>(at<T>(a.q, sample, head), a.q.token, a.queries, job.width, job.padded, &a.scale, 0, job.q);
    turn<T>(at<T>(a.k, sample, head), a.k.token, job.keys, job.width, job.columns, job.kt);
}

template <class T>
void forward(const Args& a, int64_t sample, int64_t head, Job& job) {
    begin<T>(a, sample, head, job);
    pack<T>(at<T>(a.v, sample, head), a.v.token, job.keys, job.width, job.padded, &ONE, 0, job.v);
    Stored<T>* const out = at<T>(a.out, sample, head);
    float* const stats = a.stats + (sample * a.heads + head) * a.queries * 2;
    if (job.keys == 0) return write_nothing<T>(a, out, stats);
    for_blocks(a.queries, [&](auto rows, int64_t first) {
        constexpr int R = decltype(rows)::value;
        prefetch_next(a, false, sample, head, first, R);
        const float* const queries = job.q + first * job.padded;
        float most[R] = {}, inverse[R];
        if (!plain_weights<R>(job, queries)) shifted_weights<R>(job, queries, most);
        fold_rows(job.lanes, inverse);
        for (int r = 0; r < R; ++r) {
            stats[2 * (first + r)] = most[r];
            stats[2 * (first + r) + 1] = inverse[r] = 1.0f / inverse[r];
        }
        write_sums<T, PITCH, 1>(job, job.p, job.keys, job.v, inverse, out + first * a.out.token, a.out.token);
    });
}

// delta of R queries, which the softmax takes off the gradients of weights: output times its gradient, summed.
template <class T, int R>
FDC_INLINE void deltas(const Job& job, const float* g, const Stored<T>* out, int64_t stride,
                               float (&delta)[R]) {
    Vec terms[R] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int64_t d = 0; d < job.width; d += VEC)
            terms[r] = fma(load(g + r * job.padded + d), read<T>(out + r * stride + d, job.width - d), terms[r]);
    fold<Add>(terms, delta);
}

// Weights of R queries and the gradients of their scores. The gradient of the output was divided by the row sums as it
// was packed: the weights are not normalised.
template <int R>
FDC_INLINE void score_gradients(const Job& job, int64_t first, const float* stats, const float (&delta)[R]) {
    for_chunks(job.columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        float *p = job.p + first * PITCH + key, *ds = job.ds + first * PITCH + key;
        const Int last = key + C * VEC == job.columns ? job.last : Int{} - 1;
        Vec acc[R][C];
        products<R, C>(job, job.q + first * job.padded, job.kt + key, acc);
        store_rows(acc, p);
        products<R, C>(job, job.g + first * job.padded, job.vt + key, acc);
        store_rows(acc, ds);
        for (int r = 0; r < R; ++r, p += PITCH, ds += PITCH)
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                const Vec x = exponential(not_below(-110, load(p + c * VEC) - splat(stats[2 * r])));
                const Vec weight = c == C - 1 ? (last ? x : Vec{}) : x;
                store(p + c * VEC, weight);
                store(ds + c * VEC, weight * (load(ds + c * VEC) - splat(delta[r])));
            }
    });
}

// to[j] = sum over the queries i of weights[i][j] * rows[i]; zero for keys that do not count.
template <class T>
void sum_queries(const Args& a, const Job& job, const float* weights, const float* rows, Stored<T>* to,
                 int64_t stride) {
    for_blocks(job.keys, [&](auto keys, int64_t first) {
        float ones[decltype(keys)::value];
        for (float& x : ones) x = 1;
        write_sums<T, 1, PITCH>(job, weights + first, a.queries, rows, ones, to + first * stride, stride);
    });
    for (int64_t j = job.keys; j < a.keys; ++j) std::memset(to + j * stride, 0, size_t(job.width) * sizeof(*to));
}

template <class T>
void backward(const Args& a, int64_t sample, int64_t head, Job& job) {
    begin<T>(a, sample, head, job);
    const float* const stats = a.stats + (sample * a.heads + head) * a.queries * 2;
    pack<T>(at<T>(a.grad_out, sample, head), a.grad_out.token, a.queries, job.width, job.padded, stats + 1, 2, job.g);
    pack<T>(at<T>(a.k, sample, head), a.k.token, job.keys, job.width, job.padded, &ONE, 0, job.k);
    turn<T>(at<T>(a.v, sample, head), a.v.token, job.keys, job.width, job.columns, job.vt);
    const Stored<T>* const out = at<T>(a.out, sample, head);
    Stored<T>* const grad_q = at<T>(a.grad_q, sample, head);
    for_blocks(a.queries, [&](auto rows, int64_t first) {
        constexpr int R = decltype(rows)::value;
        prefetch_next(a, true, sample, head, first, R);
        float delta[R], scales[R];
        for (float& x : scales) x = a.scale;
        deltas<T>(job, job.g + first * job.padded, out + first * a.out.token, a.out.token, delta);
        score_gradients(job, first, stats + 2 * first, delta);
        write_sums<T, PITCH, 1>(job, job.ds + first * PITCH, job.keys, job.k, scales, grad_q + first * a.grad_q.token,
                                a.grad_q.token);
    });
    sum_queries<T>(a, job, job.p, job.g, at<T>(a.grad_v, sample, head), a.grad_v.token);
    sum_queries<T>(a, job, job.ds, job.q, at<T>(a.grad_k, sample, head), a.grad_k.token);
}

template <class T>
int64_t run_forward(const Args& a) {
    return for_heads<Job>(a, false, [&](int64_t sample, int64_t head, Job& job) { forward<T>(a, sample, head, job); });
}
template <class T>
int64_t run_backward(const Args& a) {
    return for_heads<Job>(a, true, [&](int64_t sample, int64_t head, Job& job) { backward<T>(a, sample, head, job); });
}

}  // namespace

int64_t FDC_ISA::short_attention_forward(const Args& a) {
#if defined(__AVX512BF16__)
    if (a.dtype == FDC_BFLOAT16) return run_forward_pairs(a);
#else
    if (a.dtype == FDC_BFLOAT16) return run_forward<Bf16>(a);
#endif
    return run_forward<Fp32>(a);
}

int64_t FDC_ISA::short_attention_backward(const Args& a) {
#if defined(__AVX512BF16__)
    if (a.dtype == FDC_BFLOAT16) return run_backward_pairs(a);
#else
    if (a.dtype == FDC_BFLOAT16) return run_backward<Bf16>(a);
#endif
    return run_backward<Fp32>(a);
}

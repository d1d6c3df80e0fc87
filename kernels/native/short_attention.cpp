// short_attention for one instruction set (FDC_ISA), forward and backward: one (sample, head) at a time, all of it in
// the first cache. The lanes of a register are keys while scores are computed, and channels of the head where rows of
// keys, values or queries are summed. The semantics are those of kernels/reference.py.
#include "short_attention.h"
#if defined(__AVX512BF16__)
#include "short_attention_bf16.h"
#endif

namespace {

// (n, width) with row stride `stride` to (n, padded) floats times `factor`, zero behind `width`.
template <class T>
void pack(const typename T::Stored* from, int64_t stride, int64_t n, int64_t width, int64_t padded, float factor,
          float* to) {
    for (int64_t i = 0; i < n; ++i, from += stride, to += padded) {
        int64_t d = 0;
        for (; d + VEC <= width; d += VEC) store(to + d, T::load(from + d) * factor);
        if (d < padded) {
            typename T::Stored rest[VEC] = {};
            std::memcpy(rest, from + d, size_t(width > d ? width - d : 0) * sizeof(*from));
            for (; d < padded; d += VEC) {
                store(to + d, T::load(rest) * factor);
                std::memset(rest, 0, sizeof(rest));
            }
        }
    }
}

// (n, padded) to (width, columns); columns from n on become zero.
void turn(const float* from, int64_t n, int64_t padded, int64_t width, int64_t columns, float* to) {
    for (int64_t j = 0; j < columns; j += VEC)
        for (int64_t d = 0; d < width; d += VEC) {
            Vec tile[VEC];
#pragma GCC unroll 16
            for (int i = 0; i < VEC; ++i) tile[i] = j + i < n ? load(from + (j + i) * padded + d) : Vec{};
            transpose(tile);
            for (int i = 0; i < VEC && d + i < width; ++i) store(to + (d + i) * columns + j, tile[i]);
        }
}

// One (sample, head): sizes and the work space of its thread.
struct Job {
    int64_t queries, keys, columns, width, padded;  // columns: keys rounded up to registers, padded: width likewise
    float *q, *k, *v, *g;                           // packed rows
    float *kt, *vt;                                 // keys and values turned
    float *p, *ds;                                  // weights (of a block in the forward), gradients of the scores
    Int last;                                       // lanes of the last register that hold keys
    void* memory;
};

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

// acc[r] = sum over i of weights[r * across + i * along] * rows[i][d ..]; two partial sums hide the latency of fma
// and lose fewer bits than one.
template <int R>
FDC_INLINE void combine(const Job& job, const float* weights, int64_t across, int64_t along, int64_t n,
                        const float* rows, Vec (&acc)[R][SPAN]) {
    constexpr int PARTS = WIDE ? 2 : 1;
    Vec part[PARTS][R][SPAN] = {};
    auto add = [&](int64_t i, int p) __attribute__((always_inline)) {
        Vec row[SPAN];
#pragma GCC unroll 2
        for (int s = 0; s < SPAN; ++s) row[s] = load(rows + i * job.padded + s * VEC);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec w = splat(weights[r * across + i * along]);
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

bool allocate(const Args& a, Job& job, bool backward) {
    job.width = a.head_dim;
    job.padded = round_up(a.head_dim, VEC * SPAN);
    const int64_t columns = round_up(a.keys, VEC), head = round_up(a.head_dim, VEC);
    const int64_t rows_q = a.queries * job.padded, rows_k = columns * job.padded;
    const int64_t turned = columns * head, weights = (backward ? a.queries : ROWS) * columns;
    const int64_t sizes[] = {rows_q, rows_k, rows_k, turned, weights, rows_q, turned, weights};
    float** const pieces[] = {&job.q, &job.k, &job.v, &job.kt, &job.p, &job.g, &job.vt, &job.ds};
    const int count = backward ? 8 : 5;
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += round_up(sizes[i], 16);
    job.memory = std::aligned_alloc(64, size_t(total) * sizeof(float));
    if (!job.memory) return false;
    float* next = static_cast<float*>(job.memory);
    for (int i = 0; i < count; ++i) {
        *pieces[i] = next;
        next += round_up(sizes[i], 16);
    }
    return true;
}

template <class T, int R>
FDC_INLINE void forward_block(const Job& job, int64_t first, typename T::Stored* out, int64_t out_stride,
                              float* stats) {
    Vec top[R], total[R];
    const Vec lowest = splat(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) top[r] = lowest;
    for_chunks(job.columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        Vec acc[R][C];
        products<R, C>(job, job.q + first * job.padded, job.kt + key, acc);
        const bool end = key + C * VEC == job.columns;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (end) acc[r][C - 1] = job.last ? acc[r][C - 1] : lowest;
            Vec most = acc[r][0];
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                store(job.p + r * job.columns + key + c * VEC, acc[r][c]);
                most = larger(most, acc[r][c]);
            }
            top[r] = larger(top[r], most);
        }
    });
    float most[R], sum[R], inverse[R];
    fold<Max>(top, most);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const Vec shift = splat(most[r]);
        total[r] = Vec{};
        float* row = job.p + r * job.columns;
        for (int64_t j = 0; j < job.columns; j += VEC) {
            const Vec p = exp_negative(load(row + j) - shift);
            store(row + j, p);
            total[r] += p;
        }
    }
    fold<Add>(total, sum);
    for (int r = 0; r < R; ++r) {
        inverse[r] = 1.0f / sum[r];
        stats[2 * (first + r)] = most[r];
        stats[2 * (first + r) + 1] = inverse[r];
    }
    for (int64_t d = 0; d < job.padded; d += VEC * SPAN) {
        Vec acc[R][SPAN];
        combine<R>(job, job.p, job.columns, 1, job.keys, job.v + d, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int s = 0; s < SPAN; ++s)
                write<T>(out + (first + r) * out_stride, job.width, d + s * VEC, acc[r][s] * inverse[r]);
    }
}

// Sets the sizes of a sample and packs what both directions read.
template <class T>
void begin(const Args& a, int64_t sample, int64_t head, Job& job) {
    const int64_t length = a.lengths ? a.lengths[sample] : a.keys;
    job.queries = a.queries;
    job.keys = length < 0 ? 0 : length < a.keys ? length : a.keys;
    job.columns = round_up(job.keys, VEC);
    job.last = lane_numbers() < int32_t(job.keys - (job.columns - VEC));
    pack<T>(at<T>(a.q, sample, head), a.q.token, job.queries, job.width, job.padded, a.scale, job.q);
    pack<T>(at<T>(a.k, sample, head), a.k.token, job.keys, job.width, job.padded, 1.0f, job.k);
    pack<T>(at<T>(a.v, sample, head), a.v.token, job.keys, job.width, job.padded, 1.0f, job.v);
    turn(job.k, job.keys, job.padded, job.width, job.columns, job.kt);
}

template <class T>
void forward(const Args& a, int64_t sample, int64_t head, Job& job) {
    begin<T>(a, sample, head, job);
    const int64_t stride = a.heads * a.head_dim;
    auto* const out = place<T>(a, a.out, a.queries, sample, head);
    float* stats = a.stats + (sample * a.heads + head) * a.queries * 2;
    if (job.keys == 0) return write_nothing<T>(a, out, stats);
    for_blocks(job.queries, [&](auto r, int64_t first) {
        forward_block<T, decltype(r)::value>(job, first, out, stride, stats);
    });
}

// Weights and gradients of scores of queries first .. first + R - 1; gradient of q.
// The gradient of the output was divided by the row sums as it was packed: the weights here are not normalised.
template <class T, int R>
FDC_INLINE void backward_block(const Job& job, int64_t first, float scale, const float* stats,
                               typename T::Stored* grad_q, int64_t stride) {
    float* const p = job.p + first * job.columns;
    float* const ds = job.ds + first * job.columns;
    Vec delta[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) delta[r] = Vec{};
    for_chunks(job.columns, [&](auto chunk, int64_t key) {
        constexpr int C = decltype(chunk)::value;
        Vec acc[R][C];
        products<R, C>(job, job.q + first * job.padded, job.kt + key, acc);
        const bool end = key + C * VEC == job.columns;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec shift = splat(stats[2 * (first + r)]);
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                Vec x = exp_negative(acc[r][c] - shift);
                if (end && c == C - 1) x = job.last ? x : Vec{};
                store(p + r * job.columns + key + c * VEC, x);
            }
        }
        products<R, C>(job, job.g + first * job.padded, job.vt + key, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) {
                store(ds + r * job.columns + key + c * VEC, acc[r][c]);
                delta[r] = fma(load(p + r * job.columns + key + c * VEC), acc[r][c], delta[r]);
            }
    });
    float sum[R];
    fold<Add>(delta, sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const Vec shift = splat(sum[r] * stats[2 * (first + r) + 1]);
        float* const row = ds + r * job.columns;
        for (int64_t j = 0; j < job.columns; j += VEC)
            store(row + j, load(p + r * job.columns + j) * (load(row + j) - shift));
    }
    for (int64_t d = 0; d < job.padded; d += VEC * SPAN) {
        Vec acc[R][SPAN];
        combine<R>(job, ds, job.columns, 1, job.keys, job.k + d, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int s = 0; s < SPAN; ++s)
                write<T>(grad_q + (first + r) * stride, job.width, d + s * VEC, acc[r][s] * scale);
    }
}

// to[j] = sum over the queries i of weights[i][j] * rows[i]; zero for keys that do not count.
template <class T>
void sum_queries(const Job& job, const float* weights, const float* rows, int64_t total,
                 typename T::Stored* to, int64_t stride) {
    for_blocks(job.keys, [&](auto r, int64_t first) {
        constexpr int R = decltype(r)::value;
        for (int64_t d = 0; d < job.padded; d += VEC * SPAN) {
            Vec acc[R][SPAN];
            combine<R>(job, weights + first, 1, job.columns, job.queries, rows + d, acc);
#pragma GCC unroll 8
            for (int j = 0; j < R; ++j)
                for (int s = 0; s < SPAN; ++s)
                    write<T>(to + (first + j) * stride, job.width, d + s * VEC, acc[j][s]);
        }
    });
    for (int64_t j = job.keys; j < total; ++j)
        std::memset(to + j * stride, 0, size_t(job.width) * sizeof(*to));
}

template <class T>
void backward(const Args& a, int64_t sample, int64_t head, Job& job) {
    begin<T>(a, sample, head, job);
    const int64_t stride = a.heads * a.head_dim;
    const float* stats = a.stats + (sample * a.heads + head) * a.queries * 2;
    const auto* g = at<T>(a.grad_out, sample, head);
    for (int64_t i = 0; i < a.queries; ++i)
        pack<T>(g + i * a.grad_out.token, 0, 1, job.width, job.padded, stats[2 * i + 1], job.g + i * job.padded);
    turn(job.v, job.keys, job.padded, job.width, job.columns, job.vt);
    auto* const grad_q = place<T>(a, a.grad_q, a.queries, sample, head);
    for_blocks(a.queries, [&](auto r, int64_t first) {
        backward_block<T, decltype(r)::value>(job, first, a.scale, stats, grad_q, stride);
    });
    sum_queries<T>(job, job.p, job.g, a.keys, place<T>(a, a.grad_v, a.keys, sample, head), stride);
    sum_queries<T>(job, job.ds, job.q, a.keys, place<T>(a, a.grad_k, a.keys, sample, head), stride);
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

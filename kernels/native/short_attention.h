// What both forms of short_attention share: how work is cut into blocks, and how rows reach memory.
#pragma once

#include <cstdlib>

#include "products.h"

namespace {

using Args = fdc_short_attention_args;
constexpr bool WIDE = VEC == 16;       // 32 registers instead of 16
constexpr int ROWS = WIDE ? 8 : 4;     // queries computed together
constexpr int CHUNK = 3;               // registers of keys computed together
constexpr int SPAN = WIDE ? 1 : 2;     // registers of channels computed together
constexpr int64_t MOST_KEYS = 256, MOST_CHANNELS = 64;
constexpr int64_t LINE = 64;           // bytes that a cache holds or lacks together
// From one query's scores to the next one's: a constant, so that one pointer serves all rows of a block, and an odd
// number of cache lines, so that rows lie in different sets.
constexpr int64_t PITCH = MOST_KEYS + 16;

// Calls f with the block size R = 1..MOST as a template argument, for blocks of nearly equal size that cover n.
template <int MOST = ROWS, class F>
FDC_INLINE void for_blocks(int64_t n, F&& f) {
    const int64_t blocks = (n + MOST - 1) / MOST;
    for (int64_t b = 0, first = 0; b < blocks; ++b) {
        const int64_t rows = (n - first + blocks - b - 1) / (blocks - b);
        call_with<MOST>(rows, [&](auto r) { f(r, first); });
        first += rows;
    }
}

// Calls f(first key, number of registers as a template argument) over the keys.
template <class F>
FDC_INLINE void for_chunks(int64_t columns, F&& f) {
    int64_t key = 0;
    for (; key + CHUNK * VEC <= columns; key += CHUNK * VEC) f(std::integral_constant<int, CHUNK>(), key);
    if (columns - key == 2 * VEC) f(std::integral_constant<int, 2>(), key);
    if (columns - key == VEC) f(std::integral_constant<int, 1>(), key);
}

// rows[r] = the registers of a block, row after row.
template <int R, int C>
FDC_INLINE void store_rows(const Vec (&block)[R][C], float* rows) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) store(rows + r * PITCH + c * VEC, block[r][c]);
}

// Sums over the lanes of `R` registers that lie one behind the other.
template <int R>
FDC_INLINE void fold_rows(const float* lanes, float (&sum)[R]) {
    Vec v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) v[r] = load(lanes + r * VEC);
    fold<Add>(v, sum);
}

template <class T>
using Stored = typename T::Stored;

// Where the rows of a head begin.
template <class T>
Stored<T>* at(const fdc_strided& x, int64_t sample, int64_t head) {
    return static_cast<Stored<T>*>(x.data) + sample * x.batch + head * x.head;
}

// The sizes that differ between samples: keys that count, rounded up to registers, and the lanes of the last one.
template <class Job>
void set_keys(const Args& a, int64_t sample, Job& job) {
    const int64_t length = a.lengths ? a.lengths[sample] : a.keys;
    job.keys = length < 0 ? 0 : length < a.keys ? length : a.keys;
    job.columns = round_up(job.keys, VEC);
    job.last = lane_numbers() < int32_t(job.keys - (job.columns - VEC));
}

// The output of a head without a single key: zero.
template <class T>
void write_nothing(const Args& a, Stored<T>* out, float* stats) {
    std::memset(stats, 0, size_t(a.queries) * 2 * sizeof(float));
    for (int64_t i = 0; i < a.queries; ++i) std::memset(out + i * a.out.token, 0, size_t(a.head_dim) * sizeof(*out));
}

// Work space of a thread, cut into pieces that begin at cache lines.
struct Piece { void* pointer; int64_t words; };
void* allocate_pieces(const Piece* pieces, int count) {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += round_up(pieces[i].words, 16);
    char* const memory = static_cast<char*>(std::aligned_alloc(64, size_t(total) * 4));
    char* next = memory;
    for (int i = 0; memory && i < count; ++i) {
        std::memcpy(pieces[i].pointer, &next, sizeof(next));
        next += round_up(pieces[i].words, 16) * 4;
    }
    return memory;
}

// Asks for rows of a head. They lie as far apart as those of the projection, too far for the processor to foresee them,
// and a store waits for its line as a load does. Always inlined: GCC takes a function that does nothing else for one
// without effect and drops its calls.
FDC_INLINE void prefetch(const Args& a, const fdc_strided& x, int64_t first, int64_t last, int64_t sample,
                         int64_t head) {
    const int64_t size = a.dtype == FDC_FLOAT32 ? 4 : 2, bytes = a.head_dim * size, step = x.token * size;
    const char* row = static_cast<const char*>(x.data) + (sample * x.batch + head * x.head + first * x.token) * size;
    const int64_t place = reinterpret_cast<uintptr_t>(row) % LINE;
    if (place > 0 && place + bytes <= LINE) return;  // lines that came with the head before
    for (const char* const end = row + bytes; row < end; row += LINE)
        for (int64_t i = 0; i < last - first; ++i) __builtin_prefetch(row + i * step, 0, 2);
}
// The same for the share of the next head that belongs to a block of queries: no more lines at once than the processor
// can wait for beside its work.
FDC_INLINE void prefetch_next(const Args& a, bool backward, int64_t sample, int64_t head, int64_t first, int64_t rows) {
    if (++head == a.heads) head = 0, ++sample;
    if (sample == a.batch) return;
    const int64_t last = first + rows;
    int64_t key = first, end = last;
    if (a.keys != a.queries) key = first * a.keys / a.queries, end = last * a.keys / a.queries;
    for (const fdc_strided* x : {&a.q, &a.out}) prefetch(a, *x, first, last, sample, head);
    for (const fdc_strided* x : {&a.k, &a.v}) prefetch(a, *x, key, end, sample, head);
    if (!backward) return;
    for (const fdc_strided* x : {&a.grad_out, &a.grad_q}) prefetch(a, *x, first, last, sample, head);
    for (const fdc_strided* x : {&a.grad_k, &a.grad_v}) prefetch(a, *x, key, end, sample, head);
}

// Calls f(sample, head, job) for every head, each thread with its own job that `allocate` prepared.
template <class Job, class F>
int64_t for_heads(const Args& a, bool backward, F&& f) {
    if (a.keys > MOST_KEYS || a.head_dim > MOST_CHANNELS || a.head_dim % 8) return FDC_BAD_SHAPE;
    bool complete = true;
#pragma omp parallel num_threads(a.threads) reduction(&& : complete)
    {
        Job job = {};
        job.memory = allocate(a, job, backward);
        complete = job.memory;
        // Every thread meets the loop, also one without memory; its share then stays unwritten and the call fails.
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.batch * a.heads; ++i)
            if (complete) f(i / a.heads, i % a.heads, job);
        std::free(job.memory);
    }
    return complete ? FDC_OK : FDC_NO_MEMORY;
}

}  // namespace

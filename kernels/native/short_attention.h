// What both forms of short_attention share: how work is cut into blocks, and how rows reach memory.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "abi.h"
#include "simd.h"

namespace {

using Args = fdc_short_attention_args;
constexpr bool WIDE = VEC == 16;       // 32 registers instead of 16
constexpr int ROWS = WIDE ? 8 : 4;     // queries computed together
constexpr int CHUNK = 3;               // registers of keys computed together
constexpr int SPAN = WIDE ? 1 : 2;     // registers of channels computed together

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Calls f with the block size R = 1..MOST as a template argument, for blocks of nearly equal size that cover n.
template <int R, class F>
FDC_INLINE void call_with(int64_t rows, F&& f) {
    if constexpr (R > 0) {
        if (rows == R) f(std::integral_constant<int, R>());
        else call_with<R - 1>(rows, f);
    }
}
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

// Channels d .. of one row, as far as there are any.
template <class T>
FDC_INLINE void write(typename T::Stored* to, int64_t width, int64_t d, Vec v) {
    if (d + VEC <= width) return T::store(to + d, v);
    typename T::Stored whole[VEC];
    T::store(whole, v);
    if (d < width) std::memcpy(to + d, whole, size_t(width - d) * sizeof(*to));
}

template <class T>
const typename T::Stored* at(const fdc_strided& x, int64_t sample, int64_t head) {
    return static_cast<const typename T::Stored*>(x.data) + sample * x.batch + head * x.head;
}

// Where the rows of a head begin in a contiguous (batch, tokens, heads, head_dim) tensor.
template <class T>
typename T::Stored* place(const Args& a, void* base, int64_t tokens, int64_t sample, int64_t head) {
    return static_cast<typename T::Stored*>(base) + (sample * tokens * a.heads + head) * a.head_dim;
}

// The output of a head without a single key: zero.
template <class T>
void write_nothing(const Args& a, typename T::Stored* out, float* stats) {
    std::memset(stats, 0, size_t(a.queries) * 2 * sizeof(float));
    for (int64_t i = 0; i < a.queries; ++i)
        std::memset(out + i * a.heads * a.head_dim, 0, size_t(a.head_dim) * sizeof(*out));
}

// Calls f(sample, head, job) for every head, each thread with its own job that `allocate` prepared.
template <class Job, class F>
int64_t for_heads(const Args& a, bool backward, F&& f) {
    bool complete = true;
#pragma omp parallel num_threads(a.threads) reduction(&& : complete)
    {
        Job job = {};
        complete = allocate(a, job, backward);
        // Every thread meets the loop, also one without memory; its share then stays unwritten and the call fails.
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.batch * a.heads; ++i)
            if (complete) f(i / a.heads, i % a.heads, job);
        std::free(job.memory);
    }
    return complete ? FDC_OK : FDC_NO_MEMORY;
}

}  // namespace

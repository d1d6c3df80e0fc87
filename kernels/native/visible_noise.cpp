// visible_noise for one instruction set (FDC_ISA): chooses the visible tokens of each window, gathers them from the
// scene, normalises, adds noise. The semantics are those of kernels/reference.py.
#include <cstdlib>

#include "abi.h"
#include "numbers.h"
#include "philox.h"

namespace {

using Args = fdc_visible_noise_args;
constexpr int64_t CHUNK = 1024;  // counters whose normals are kept at a time: 16 KiB, well inside the first cache

int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Work space of one thread.
struct Scratch {
    uint32_t* words;   // mask words of a window
    int64_t* pixel;    // flat pixel index of each visible token
    uint32_t* quad;    // counter words of a chunk
    uint32_t* token;
    float* eps;        // its normals, (counter, 4)
    int64_t tokens_per_chunk;
    void* memory;
};

bool allocate(const Args& a, Scratch& s) {
    const int64_t quads = (a.channels + 3) / 4, tokens = whole_vectors(a.window * a.window);
    s.tokens_per_chunk = quads < CHUNK ? CHUNK / quads : 1;
    const int64_t counters = whole_vectors(s.tokens_per_chunk * quads);
    const size_t bytes = size_t(tokens) * 12 + size_t(counters) * 24;
    s.memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!s.memory) return false;
    // Each piece is a multiple of 64 bytes, so all are aligned.
    s.eps = static_cast<float*>(s.memory);
    s.quad = reinterpret_cast<uint32_t*>(s.eps + 4 * counters);
    s.token = s.quad + counters;
    s.words = s.token + counters;
    s.pixel = reinterpret_cast<int64_t*>(s.words + tokens);
    return true;
}

// The `visible` smallest mask words, ties by id, as ascending ids.
void choose_tokens(const Args& a, uint32_t position, Scratch& s, int32_t* ids) {
    const int64_t tokens = a.window * a.window;
    if (a.visible == tokens) {
        for (int64_t l = 0; l < tokens; ++l) ids[l] = int32_t(l);
        return;
    }
    for (int64_t l = 0; l < tokens; l += LANES)
        mask_words(uint32_t(l + (a.modality << 16)), position, uint32_t(a.rng[0]), uint32_t(a.rng[1]), s.words + l);
    // Bit by bit, the largest bound below which at most `visible` words lie. Most windows are done after some ten bits.
    uint32_t bound = 0;
    int64_t below = 0;
    for (int bit = 31; bit >= 0 && below < a.visible; --bit) {
        const uint32_t trial = bound | 1u << bit;
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t l = 0; l < tokens; ++l) count += s.words[l] < trial;
        if (count <= a.visible) {
            bound = trial;
            below = count;
        }
    }
    // Ids overwrite the words already seen: no branch on random bits, no write behind the row.
    int64_t ties = a.visible - below, n = 0;
    for (int64_t l = 0; l < tokens; ++l) {
        const bool tie = (s.words[l] == bound) & (ties > 0), take = tie | (s.words[l] < bound);
        ties -= tie;
        s.words[n] = uint32_t(l);
        n += take;
    }
    std::memcpy(ids, s.words, size_t(a.visible) * sizeof(*ids));
}

// Flat pixel index of each visible token: clamped to the scene; an invalid neighbour reads as the centre.
void find_pixels(const Args& a, int64_t row, const int32_t* ids, size_t pixel_bytes, int64_t* pixel) {
    const int64_t* centre = a.centres + 3 * row;
    const int64_t* extent = a.extents + 3 * centre[0];
    const int64_t first = extent[0], height = extent[1], width = extent[2], radius = a.window / 2;
    const int64_t own = first + centre[1] * width + centre[2];
    const char* base = static_cast<const char*>(a.pixels);
    for (int64_t v = 0; v < a.visible; ++v) {
        const int64_t y = clamp(centre[1] + ids[v] / a.window - radius, height - 1);
        const int64_t x = clamp(centre[2] + ids[v] % a.window - radius, width - 1);
        int64_t p = first + y * width + x;
        if (a.valid && !(a.valid[p >> 3] >> (p & 7) & 1)) p = own;
        pixel[v] = p;
        // The spectra arrive while the noise is drawn.
        for (size_t byte = 0; byte < pixel_bytes; byte += 64) __builtin_prefetch(base + p * int64_t(pixel_bytes) + byte);
    }
}

// Normals of `count` tokens, (count, 4 * quads), into s.eps.
void draw(const Args& a, uint32_t position, const int32_t* ids, int64_t count, Scratch& s) {
    const int64_t quads = (a.channels + 3) / 4, counters = count * quads;
    for (int64_t v = 0; v < count; ++v) {
        const uint32_t token = uint32_t(ids[v] + (a.modality << 16));
        for (int64_t q = 0; q < quads; ++q) {
            s.quad[v * quads + q] = uint32_t(q);
            s.token[v * quads + q] = token;
        }
    }
    for (int64_t i = counters; i < whole_vectors(counters); ++i) s.quad[i] = s.token[i] = 0;
    for (int64_t i = 0; i < counters; i += LANES)
        normals(s.quad + i, s.token + i, position, uint32_t(a.rng[0]), uint32_t(a.rng[1]), s.eps + 4 * i);
}

template <class In, class Out, bool noisy>
FDC_INLINE void write_token(const typename In::Stored* __restrict pixel, const float* __restrict scale,
                            const float* __restrict offset, const float* __restrict eps, float signal, float noise,
                            int64_t channels, typename Out::Stored* __restrict x) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
        float value = In::load(pixel[c]) * scale[c] + offset[c];
        if (noisy) value = signal * value + noise * eps[c];
        x[c] = Out::store(value);
    }
}

template <class In, class Out>
void write_window(const Args& a, int64_t row, Scratch& s) {
    const int64_t channels = a.channels, quads = (channels + 3) / 4;
    const auto* pixels = static_cast<const typename In::Stored*>(a.pixels);
    auto* x = static_cast<typename Out::Stored*>(a.x) + row * a.visible * channels;
    int32_t* ids = a.ids + row * a.visible;
    if (row >= a.valid_rows) {
        for (int64_t v = 0; v < a.visible; ++v) ids[v] = int32_t(v);
        std::memset(x, 0, size_t(a.visible * channels) * sizeof(*x));
        return;
    }
    const uint32_t position = uint32_t(a.rng[2] + row);
    choose_tokens(a, position, s, ids);
    find_pixels(a, row, ids, size_t(channels) * sizeof(*pixels), s.pixel);
    if (!a.mix) {
        for (int64_t v = 0; v < a.visible; ++v)
            write_token<In, Out, false>(pixels + s.pixel[v] * channels, a.scale, a.offset, nullptr, 0, 0, channels,
                                        x + v * channels);
        return;
    }
    for (int64_t begin = 0; begin < a.visible; begin += s.tokens_per_chunk) {
        const int64_t left = a.visible - begin, count = left < s.tokens_per_chunk ? left : s.tokens_per_chunk;
        draw(a, position, ids + begin, count, s);
        for (int64_t v = 0; v < count; ++v)
            write_token<In, Out, true>(pixels + s.pixel[begin + v] * channels, a.scale, a.offset,
                                       s.eps + v * quads * 4, a.mix[2 * row], a.mix[2 * row + 1], channels,
                                       x + (begin + v) * channels);
    }
}

template <class In, class Out>
int64_t run(const Args& a) {
    bool complete = true;
#pragma omp parallel num_threads(a.threads) reduction(&& : complete)
    {
        Scratch s;
        complete = allocate(a, s);
        // Every thread meets the loop, also one without memory; its rows then stay unwritten and the call fails.
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row)
            if (complete) write_window<In, Out>(a, row, s);
        std::free(s.memory);
    }
    return complete ? FDC_OK : FDC_NO_MEMORY;
}

template <class In>
int64_t run_in(const Args& a) {
    switch (a.out_dtype) {
        case FDC_FLOAT16: return run<In, Float16>(a);
        case FDC_BFLOAT16: return run<In, BFloat16>(a);
        default: return run<In, Float32>(a);
    }
}

}  // namespace

int64_t FDC_ISA::visible_noise(const Args& a) {
    switch (a.pixel_dtype) {
        case FDC_UINT16: return run_in<Uint16>(a);
        case FDC_INT16: return run_in<Int16>(a);
        case FDC_FLOAT16: return run_in<Float16>(a);
        case FDC_BFLOAT16: return run_in<BFloat16>(a);
        default: return run_in<Float32>(a);
    }
}

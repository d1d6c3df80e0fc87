// The loss of restored windows against the scene, and its gradient, in one pass over the predictions, for one
// instruction set (FDC_ISA). The semantics are those of kernels/reference.py.
#include <cstdlib>

#include "numbers.h"
#include "rows.h"

namespace {

using Args = fdc_masked_mse_args;

// Predictions and their gradient, one number and one register at a time.
struct Bf16Predictions {
    using Number = BFloat16;
    using Rows = Bf16Rows;
};
struct Fp32Predictions {
    using Number = Float32;
    using Rows = Fp32Rows;
};

// Work space of one thread.
struct Scratch {
    int64_t* pixel;  // flat pixel index of each token, or -1: it does not count
    uint8_t* seen;   // 1 for visible tokens, 0 for masked ones
};

// Marks the visible tokens; false where an id is no token or stands twice.
bool mark_visible(const Args& a, int64_t row, uint8_t* seen) {
    const int64_t tokens = a.window * a.window;
    const int32_t* ids = a.ids + row * a.visible;
    std::memset(seen, 0, size_t(tokens));
    for (int64_t v = 0; v < a.visible; ++v) {
        if (ids[v] < 0 || ids[v] >= tokens || seen[ids[v]]) return false;
        seen[ids[v]] = 1;
    }
    return true;
}

// Pixels of the tokens, clamped to the scene, and how many masked and visible ones are valid.
void find_pixels(const Args& a, int64_t row, const Scratch& s, int64_t* counts) {
    const int64_t* centre = a.centres + 3 * row;
    const int64_t* extent = a.extents + 3 * centre[0];
    const int64_t first = extent[0], height = extent[1], width = extent[2], radius = a.window / 2;
    counts[0] = counts[1] = 0;
    for (int64_t l = 0, i = 0; i < a.window; ++i) {
        const int64_t line = first + clamp(centre[1] + i - radius, height - 1) * width;
        for (int64_t j = 0; j < a.window; ++j, ++l) {
            const int64_t p = line + clamp(centre[2] + j - radius, width - 1);
            const bool counted = !a.valid || (a.valid[p >> 3] >> (p & 7) & 1);
            s.pixel[l] = counted ? p : -1;
            counts[s.seen[l]] += counted;
        }
    }
}

// Float16::load of the upper halves of the lanes.
FDC_INLINE Vec half_of(Word w) {
    const Vec scaled = Vec(w >> 3 & 0x0fffe000u) * splat(0x1p112f);
    const Word special = Word(scaled >= splat(65536.0f)) & 0x7f800000u;
    return Vec(Word(scaled) | special | (w & 0x80000000u));
}

// LANES stored numbers of a scene; the lanes beyond them are zero.
template <class In, int LANES>
FDC_INLINE Vec load_stored(const typename In::Stored* p) {
    if constexpr (std::is_same<In, Float32>::value) {
        return Fp32Rows::load<LANES>(p);
    } else {
        Word w = Word(Bf16Rows::load<LANES>(reinterpret_cast<const uint16_t*>(p)));  // in the upper half of the lane
        if constexpr (std::is_same<In, BFloat16>::value) return Vec(w);
        else if constexpr (std::is_same<In, Int16>::value) return __builtin_convertvector(Int(w) >> 16, Vec);
        else if constexpr (std::is_same<In, Uint16>::value) return __builtin_convertvector(Int(w >> 16), Vec);
        else return half_of(w);
    }
}

// Sum of squared differences of a token; its gradient is `slope` times the difference.
template <class In, class Type, bool with_grad>
FDC_INLINE float pass_token(const Args& a, const typename In::Stored* pixel, const typename Type::Number::Stored* prediction,
                            float slope, typename Type::Number::Stored* grad) {
    using Rows = typename Type::Rows;
    using Number = typename Type::Number;
    const int64_t channels = a.channels, whole = channels / 8 * 8;
    Vec squares[1] = {};
    for_registers(whole, [&](int64_t c, auto lanes) {
        constexpr int LANES = decltype(lanes)::value;
        const Vec target = load_stored<In, LANES>(pixel + c) * Fp32Rows::load<LANES>(a.scale + c) +
                           Fp32Rows::load<LANES>(a.offset + c);
        const Vec difference = Rows::template load<LANES>(prediction + c) - target;
        squares[0] += difference * difference;
        if constexpr (with_grad) Rows::template store<LANES>(grad + c, splat(slope) * difference);
    });
    float sum = 0;
    if (whole) fold<Add>(squares, &sum);
    for (int64_t c = whole; c < channels; ++c) {
        const float difference = Number::load(prediction[c]) - (In::load(pixel[c]) * a.scale[c] + a.offset[c]);
        sum += difference * difference;
        if (with_grad) grad[c] = Number::store(slope * difference);
    }
    return sum;
}

double at_least_1(int64_t count) { return count < 1 ? 1.0 : double(count); }

// The share of a row in the loss.
template <class In, class Type, bool with_grad>
double pass_window(const Args& a, int64_t row, const Scratch& s) {
    using Stored = typename Type::Number::Stored;
    const int64_t tokens = a.window * a.window, channels = a.channels;
    const auto* pixels = static_cast<const typename In::Stored*>(a.pixels);
    const auto* prediction = static_cast<const Stored*>(a.prediction) + row * tokens * channels;
    auto* grad = static_cast<Stored*>(a.grad) + (with_grad ? row * tokens * channels : 0);
    int64_t counts[2];
    find_pixels(a, row, s, counts);
    const double share = 1.0 / double(tokens * channels) / at_least_1(a.total_rows);
    const double factor[2] = {
        a.masked_weight * double(tokens - a.visible) * share / at_least_1(counts[0]),
        a.visible_weight * double(a.visible) * share / at_least_1(counts[1])};
    const float slope[2] = {float(2 * factor[0]), float(2 * factor[1])};
    double sums[2] = {};
    for (int64_t l = 0; l < tokens; ++l, prediction += channels, grad += with_grad ? channels : 0) {
        if (s.pixel[l] >= 0)
            sums[s.seen[l]] += pass_token<In, Type, with_grad>(a, pixels + s.pixel[l] * channels, prediction,
                                                               slope[s.seen[l]], grad);
        else if (with_grad)
            std::memset(grad, 0, size_t(channels) * sizeof(Stored));
    }
    return factor[0] * sums[0] + factor[1] * sums[1];
}

template <class In, class Type, bool with_grad>
int64_t run(const Args& a) {
    const int64_t tokens = a.window * a.window, real = clamp(a.valid_rows, a.rows);
    double* const losses = static_cast<double*>(std::calloc(size_t(a.rows) + 1, sizeof(double)));
    bool complete = losses;
    int64_t bad = a.rows;
#pragma omp parallel num_threads(a.threads) reduction(&& : complete) reduction(min : bad)
    {
        void* const memory = std::malloc(size_t(tokens) * (sizeof(int64_t) + 1));
        complete = complete && memory;
        const Scratch s{static_cast<int64_t*>(memory), static_cast<uint8_t*>(memory) + size_t(tokens) * sizeof(int64_t)};
        // Every thread meets the loop, also one without memory; its rows then stay unwritten and the call fails.
#pragma omp for schedule(static)
        for (int64_t row = 0; row < real; ++row)
            if (complete) {
                if (mark_visible(a, row, s.seen)) losses[row] = pass_window<In, Type, with_grad>(a, row, s);
                else bad = row < bad ? row : bad;
            }
        std::free(memory);
    }
    double loss = 0;  // row after row, whoever worked on them
    if (complete)
        for (int64_t row = 0; row < a.rows; ++row) loss += losses[row];
    std::free(losses);
    *a.loss = float(loss);
    if (with_grad && real < a.rows) {
        const int64_t row_bytes = tokens * a.channels * int64_t(sizeof(typename Type::Number::Stored));
        std::memset(static_cast<char*>(a.grad) + real * row_bytes, 0, size_t((a.rows - real) * row_bytes));
    }
    return !complete ? FDC_NO_MEMORY : bad < a.rows ? 1 + a.rows + bad : FDC_OK;
}

template <class In>
int64_t run_in(const Args& a) {
    if (a.dtype == FDC_BFLOAT16) return a.grad ? run<In, Bf16Predictions, true>(a) : run<In, Bf16Predictions, false>(a);
    return a.grad ? run<In, Fp32Predictions, true>(a) : run<In, Fp32Predictions, false>(a);
}

}  // namespace

int64_t FDC_ISA::masked_mse(const Args& a) {
    switch (a.pixel_dtype) {
        case FDC_UINT16: return run_in<Uint16>(a);
        case FDC_INT16: return run_in<Int16>(a);
        case FDC_FLOAT16: return run_in<Float16>(a);
        case FDC_BFLOAT16: return run_in<BFloat16>(a);
        default: return run_in<Float32>(a);
    }
}

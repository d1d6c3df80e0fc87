// A residual and the LayerNorm behind it in one pass over memory, forward and backward, for one instruction set
// (FDC_ISA).
#include <cmath>
#include <cstdlib>

#include "rows.h"

namespace {

using Args = fdc_residual_norm_args;
constexpr int64_t BLOCK = 64;             // rows; gradients of weight and bias are summed within blocks, then over them
constexpr int GROUP = VEC == 16 ? 4 : 2;  // rows whose sums over lanes are taken together

// No delta: never read.
struct Absent {
    using Stored = uint8_t;
};

// ROWS rows from `row` on: what is added to them, their means and deviations, the normed rows.
template <class Delta, class Out, int ROWS>
FDC_INLINE void forward_rows(const Args& a, int64_t row) {
    constexpr bool adds = !std::is_same<Delta, Absent>::value;
    const int64_t width = a.width, first = row * width;
    const float* x = a.x + first;
    Vec sum[ROWS] = {}, squares[ROWS] = {};
    float means[ROWS], scales[ROWS];
    // Row by row, so that memory is read in its order; behind it all is in the first cache.
    for (int r = 0; r < ROWS; ++r)
        for_registers(width, [&](int64_t j, auto lanes) {
            constexpr int LANES = decltype(lanes)::value;
            const int64_t at = r * width + j;
            Vec v = Fp32Rows::load<LANES>(x + at);
            if constexpr (adds) {
                v += Delta::template load<LANES>(static_cast<const typename Delta::Stored*>(a.delta) + first + at);
                Fp32Rows::store<LANES>(a.stream + first + at, v);
            }
            sum[r] += v;
        });
    if constexpr (adds) x = a.stream + first;
    fold<Add>(sum, means);
    for (int r = 0; r < ROWS; ++r) means[r] /= float(width);
    for_registers(width, [&](int64_t j, auto lanes) {
        constexpr int LANES = decltype(lanes)::value;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const Vec away = first_lanes<LANES>(Fp32Rows::load<LANES>(x + r * width + j) - splat(means[r]));
            squares[r] = fma(away, away, squares[r]);
        }
    });
    fold<Add>(squares, scales);
    for (int r = 0; r < ROWS; ++r) {
        scales[r] = 1.0f / std::sqrt(scales[r] / float(width) + a.eps);
        a.stats[2 * (row + r)] = means[r];
        a.stats[2 * (row + r) + 1] = scales[r];
    }
    auto* const y = static_cast<typename Out::Stored*>(a.y) + first;
    for (int r = 0; r < ROWS; ++r)
        for_registers(width, [&](int64_t j, auto lanes) {
            constexpr int LANES = decltype(lanes)::value;
            const Vec normed = (Fp32Rows::load<LANES>(x + r * width + j) - splat(means[r])) * splat(scales[r]);
            const Vec scaled = fma(normed, Fp32Rows::load<LANES>(a.weight + j), Fp32Rows::load<LANES>(a.bias + j));
            Out::template store<LANES>(y + r * width + j, scaled);
        });
}

template <class Delta, class Out>
int64_t forward(const Args& a) {
    const int64_t groups = (a.rows + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = group * GROUP, left = a.rows - row;
        if (left >= GROUP) forward_rows<Delta, Out, GROUP>(a, row);
        else for (int64_t r = row; r < a.rows; ++r) forward_rows<Delta, Out, 1>(a, r);
    }
    return FDC_OK;
}

// Adds what ROWS rows give to the gradients of weight and bias, and writes their gradients of x. With g = grad_y weight
// and n the normed row: (g - mean(g) - n mean(g n)) / deviation, plus the gradient of the stream.
template <class Delta, class Out, bool streams, int ROWS>
FDC_INLINE void backward_rows(const Args& a, int64_t row, float* of_weight, float* of_bias) {
    const int64_t width = a.width, first = row * width;
    const float* const x = a.x + first;
    const auto* const grad_y = static_cast<const typename Out::Stored*>(a.grad_y) + first;
    Vec sums[2 * ROWS] = {};
    float means[ROWS], scales[ROWS], folded[2 * ROWS];
    for (int r = 0; r < ROWS; ++r) {
        means[r] = a.stats[2 * (row + r)];
        scales[r] = a.stats[2 * (row + r) + 1];
    }
    for (int r = 0; r < ROWS; ++r)
        for_registers(width, [&](int64_t j, auto lanes) {
            constexpr int LANES = decltype(lanes)::value;
            const Vec grad = Out::template load<LANES>(grad_y + r * width + j);
            const Vec normed = (Fp32Rows::load<LANES>(x + r * width + j) - splat(means[r])) * splat(scales[r]);
            const Vec weighted = grad * Fp32Rows::load<LANES>(a.weight + j);
            sums[2 * r] += weighted;
            sums[2 * r + 1] = fma(weighted, normed, sums[2 * r + 1]);
            Fp32Rows::store<LANES>(of_weight + j, fma(grad, normed, Fp32Rows::load<LANES>(of_weight + j)));
            Fp32Rows::store<LANES>(of_bias + j, Fp32Rows::load<LANES>(of_bias + j) + grad);
        });
    fold<Add>(sums, folded);
    for (int r = 0; r < 2 * ROWS; ++r) folded[r] *= -scales[r / 2] / float(width);
    for (int r = 0; r < ROWS; ++r)
        for_registers(width, [&](int64_t j, auto lanes) {
            constexpr int LANES = decltype(lanes)::value;
            const int64_t at = r * width + j;
            const Vec normed = (Fp32Rows::load<LANES>(x + at) - splat(means[r])) * splat(scales[r]);
            const Vec weighted = Out::template load<LANES>(grad_y + at) * Fp32Rows::load<LANES>(a.weight + j);
            Vec grad = fma(weighted, splat(scales[r]), fma(normed, splat(folded[2 * r + 1]), splat(folded[2 * r])));
            if constexpr (streams) grad += Fp32Rows::load<LANES>(a.grad_stream + first + at);
            Fp32Rows::store<LANES>(a.grad_x + first + at, grad);
            if constexpr (std::is_same<Delta, Bf16Rows>::value)
                Bf16Rows::store<LANES>(static_cast<uint16_t*>(a.grad_delta) + first + at, grad);
        });
}

template <class Delta, class Out, bool streams>
int64_t backward(const Args& a) {
    const int64_t blocks = (a.rows + BLOCK - 1) / BLOCK, pair = 2 * a.width;
    float* const sums = static_cast<float*>(std::calloc(size_t(blocks * pair), sizeof(float)));
    if (!sums) return FDC_NO_MEMORY;
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t last = (block + 1) * BLOCK < a.rows ? (block + 1) * BLOCK : a.rows;
        float* const of_weight = sums + block * pair;
        int64_t row = block * BLOCK;
        for (; row + GROUP <= last; row += GROUP)
            backward_rows<Delta, Out, streams, GROUP>(a, row, of_weight, of_weight + a.width);
        for (; row < last; ++row) backward_rows<Delta, Out, streams, 1>(a, row, of_weight, of_weight + a.width);
    }
    std::memset(a.grad_weight, 0, size_t(pair) * sizeof(float));
    for (int64_t block = 0; block < blocks; ++block)
        for_registers(pair, [&](int64_t j, auto lanes) {
            constexpr int LANES = decltype(lanes)::value;
            float* const to = a.grad_weight + j;
            Fp32Rows::store<LANES>(to, Fp32Rows::load<LANES>(to) + Fp32Rows::load<LANES>(sums + block * pair + j));
        });
    std::free(sums);
    return FDC_OK;
}

template <class Delta, class Out>
int64_t run(const Args& a) {
    if (!a.grad_x) return forward<Delta, Out>(a);
    return a.grad_stream ? backward<Delta, Out, true>(a) : backward<Delta, Out, false>(a);
}

template <class Delta>
int64_t run_delta(const Args& a) {
    return a.y_dtype == FDC_BFLOAT16 ? run<Delta, Bf16Rows>(a) : run<Delta, Fp32Rows>(a);
}

}  // namespace

int64_t FDC_ISA::residual_norm(const Args& a) {
    if (!(a.grad_x ? a.grad_delta : a.delta)) return run_delta<Absent>(a);
    return a.delta_dtype == FDC_BFLOAT16 ? run_delta<Bf16Rows>(a) : run_delta<Fp32Rows>(a);
}

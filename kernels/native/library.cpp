// The exported functions: checks that keep every read inside the scene, and the choice of the instruction set.
#include "abi.h"

namespace {

int32_t best_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? FDC_AVX512_BF16 : FDC_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FDC_AVX2;
#endif
    return FDC_BASELINE;
}

// 1 + the first row whose centre does not lie in a scene that lies in the pixels, or 0.
template <class Args>
int64_t first_bad_row(const Args& a) {
    const int64_t rows = a.rows < a.valid_rows ? a.rows : a.valid_rows;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t* centre = a.centres + 3 * row;
        if (centre[0] < 0 || centre[0] >= a.scenes) return row + 1;
        const int64_t* extent = a.extents + 3 * centre[0];
        const int64_t first = extent[0], height = extent[1], width = extent[2];
        if (centre[1] < 0 || centre[1] >= height || centre[2] < 0 || centre[2] >= width) return row + 1;
        // Written so that no product overflows.
        if (first < 0 || first > a.pixel_count || height > (a.pixel_count - first) / width) return row + 1;
    }
    return 0;
}

}  // namespace

#if defined(__x86_64__)
#define FDC_RUN(op, args) \
    ((args).isa == FDC_AVX512_BF16 ? avx512_bf16::op(args) : (args).isa == FDC_AVX512 ? avx512::op(args) \
     : (args).isa == FDC_AVX2 ? avx2::op(args) : baseline::op(args))
#else
#define FDC_RUN(op, args) baseline::op(args)
#endif

FDC_EXPORT int32_t fdc_abi_version() { return FDC_ABI_VERSION; }

FDC_EXPORT int32_t fdc_best_isa() { return best_isa(); }

// Whether the library's product of a dtype is taken for torch's. On AMD's processors MKL keeps to half of the registers;
// with oneDNN's bfloat16 they wait more for memory (and have no units for whole tiles, which it would use elsewhere).
FDC_EXPORT int32_t fdc_outruns(int32_t dtype) {
#if defined(__x86_64__)
    return best_isa() >= (dtype == FDC_BFLOAT16 ? FDC_AVX512_BF16 : FDC_AVX512) && __builtin_cpu_is("amd");
#else
    return 0;
#endif
}

FDC_EXPORT int64_t fdc_visible_noise(const fdc_visible_noise_args* args) {
    if (args->isa < FDC_BASELINE || args->isa > best_isa()) return FDC_NO_ISA;
    if (const int64_t bad = first_bad_row(*args)) return bad;
    return FDC_RUN(visible_noise, *args);
}

FDC_EXPORT int64_t fdc_masked_mse(const fdc_masked_mse_args* args) {
    if (args->isa < FDC_BASELINE || args->isa > best_isa()) return FDC_NO_ISA;
    if (const int64_t bad = first_bad_row(*args)) return bad;
    return FDC_RUN(masked_mse, *args);
}

FDC_EXPORT int64_t fdc_short_attention_forward(const fdc_short_attention_args* args) {
    if (args->isa < FDC_BASELINE || args->isa > best_isa()) return FDC_NO_ISA;
    return FDC_RUN(short_attention_forward, *args);
}

FDC_EXPORT int64_t fdc_short_attention_backward(const fdc_short_attention_args* args) {
    if (args->isa < FDC_BASELINE || args->isa > best_isa()) return FDC_NO_ISA;
    return FDC_RUN(short_attention_backward, *args);
}

FDC_EXPORT int64_t fdc_matmul(const fdc_matmul_args* args) {
    if (args->isa < FDC_BASELINE || args->isa > best_isa()) return FDC_NO_ISA;
    return FDC_RUN(matmul, *args);
}

FDC_EXPORT int64_t fdc_matmul_bf16(const fdc_matmul_bf16_args* args) {
    if (args->isa < FDC_BASELINE || args->isa > best_isa()) return FDC_NO_ISA;
    return FDC_RUN(matmul_bf16, *args);
}

FDC_EXPORT int64_t fdc_gelu(const fdc_gelu_args* args) {
    if (args->isa < FDC_BASELINE || args->isa > best_isa()) return FDC_NO_ISA;
    return FDC_RUN(gelu, *args);
}

FDC_EXPORT int64_t fdc_residual_norm(const fdc_residual_norm_args* args) {
    if (args->isa < FDC_BASELINE || args->isa > best_isa()) return FDC_NO_ISA;
    return FDC_RUN(residual_norm, *args);
}

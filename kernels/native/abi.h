// The plain C interface of the native library. kernels/native/loader.py and kernels/native/<op>.py mirror it with
// ctypes; FDC_ABI_VERSION changes with every change of a struct, a code or a meaning here.
#pragma once

#include <cstdint>

#define FDC_ABI_VERSION 6
#define FDC_EXPORT extern "C" __attribute__((visibility("default")))

enum fdc_dtype : int32_t { FDC_UINT16 = 0, FDC_INT16 = 1, FDC_FLOAT16 = 2, FDC_BFLOAT16 = 3, FDC_FLOAT32 = 4 };
enum fdc_isa : int32_t { FDC_BASELINE = 0, FDC_AVX2 = 1, FDC_AVX512 = 2, FDC_AVX512_BF16 = 3 };
// > 0: 1 + the row whose centre is wrong, or 1 + rows + the row whose ids are
enum fdc_status : int64_t { FDC_OK = 0, FDC_NO_MEMORY = -1, FDC_NO_ISA = -2, FDC_BAD_SHAPE = -3 };

struct fdc_visible_noise_args {
    const void* pixels;       // (pixel_count, channels) of pixel_dtype
    const float* scale;       // (channels)
    const float* offset;      // (channels)
    const uint8_t* valid;     // bitmap, least significant bit first; null: every pixel is valid
    const int64_t* extents;   // (scenes, 3): first pixel, height, width
    const int64_t* centres;   // (rows, 3): scene, row, column
    const float* mix;         // (rows, 2): sqrt(abar_t), sqrt(1 - abar_t); null: clean, no noise is drawn
    const int64_t* rng;       // (3): seed, step, position of row 0 in the global batch
    void* x;                  // out: (rows, visible, channels) of out_dtype
    int32_t* ids;             // out: (rows, visible)
    int64_t pixel_count, channels, scenes, rows, valid_rows, window, visible, modality;
    int32_t pixel_dtype, out_dtype, threads, isa;
};

struct fdc_masked_mse_args {
    const void* prediction;  // (rows, window^2, channels) of dtype: FDC_BFLOAT16 or FDC_FLOAT32
    const void* pixels;      // these five as above
    const float* scale;
    const float* offset;
    const uint8_t* valid;
    const int64_t* extents;
    const int64_t* centres;  // (rows, 3): scene, row, column
    const int32_t* ids;      // (rows, visible): different tokens
    void* grad;              // out: as prediction; null: not asked for
    float* loss;             // out: one number
    int64_t pixel_count, channels, scenes, rows, valid_rows, total_rows, window, visible;
    double masked_weight, visible_weight;
    int32_t pixel_dtype, dtype, threads, isa;
};

struct fdc_strided {
    void* data;                  // (batch, tokens, heads, head_dim) of dtype, the last axis contiguous
    int64_t batch, token, head;  // strides in elements
};

struct fdc_short_attention_args {
    fdc_strided q, k, v;
    fdc_strided out;                     // written by the forward, read by the backward
    fdc_strided grad_out;                // read by the backward
    fdc_strided grad_q, grad_k, grad_v;  // written by the backward
    const int64_t* lengths;              // (batch): how many keys of each sample count; null: all
    float* stats;                        // (batch, heads, queries, 2): of each row what was subtracted from the scores
                                         // and 1 / sum of weights; the forward writes it, the backward reads it
    int64_t batch, heads, queries, keys, head_dim;  // keys up to 256, head_dim 8, 16, ... 64
    float scale;
    int32_t dtype, threads, isa;
};

struct fdc_matmul_args {
    const float* a;                  // (rows, terms), strides a_row and a_term in elements
    const float* b;                  // (terms, columns), strides b_term and b_column
    const float* bias;               // (columns); null: none
    float* c;                        // out: (rows, columns), row stride c_row, columns contiguous
    int64_t a_row, a_term, b_term, b_column, c_row;
    int64_t rows, terms, columns;    // all at least 1
    int32_t threads, isa;
};

struct fdc_matmul_bf16_args {
    const uint16_t* a;               // (rows, terms), strides a_row and a_term in elements, one of which is 1
    const uint16_t* b;               // (terms, columns), strides b_term and b_column, one of which is 1
    const float* bias;               // (columns); null: none
    void* c;                         // out: (rows, columns) of c_dtype, contiguous
    float* row_sums;                 // out: (rows), sums of the terms of A where a_row is 1; null: not asked for
    int64_t a_row, a_term, b_term, b_column;
    int64_t rows, terms, columns;    // all at least 1; terms is even where only a_term or b_term is 1
    int32_t c_dtype, threads, isa;   // of isa FDC_AVX512_BF16 only
};

struct fdc_gelu_args {
    const void* x;      // (count) of dtype
    const void* grad;   // (count): gradient of the output; null: forward
    void* out;          // out: (count)
    int64_t count;
    int32_t dtype, threads, isa;
};

struct fdc_residual_norm_args {
    const float* x;            // (rows, width); backward: what the forward normalised
    const void* delta;         // (rows, width) of delta_dtype, read by the forward; null: nothing is added
    const float* weight;       // (width)
    const float* bias;         // (width), read by the forward
    float* stream;             // out, forward: x + delta
    void* y;                   // out, forward: (rows, width) of y_dtype
    float* stats;              // (rows, 2): mean and 1 / deviation; the forward writes it, the backward reads it
    const void* grad_y;        // (rows, width) of y_dtype, read by the backward
    const float* grad_stream;  // (rows, width), read by the backward; null: zero
    float* grad_x;             // out, backward: (rows, width); null: forward
    void* grad_delta;          // out, backward: grad_x in delta_dtype where that is bfloat16; null: not asked for
    float* grad_weight;        // out, backward: (2, width), gradients of weight and bias
    int64_t rows, width;       // width a multiple of 8
    float eps;
    int32_t delta_dtype, y_dtype, threads, isa;
};

// Defined once per instruction set, in a namespace of its name.
#define FDC_DECLARE(isa_name) \
    namespace isa_name { \
    int64_t visible_noise(const fdc_visible_noise_args& args); \
    int64_t masked_mse(const fdc_masked_mse_args& args); \
    int64_t short_attention_forward(const fdc_short_attention_args& args); \
    int64_t short_attention_backward(const fdc_short_attention_args& args); \
    int64_t matmul(const fdc_matmul_args& args); \
    int64_t matmul_bf16(const fdc_matmul_bf16_args& args); \
    int64_t gelu(const fdc_gelu_args& args); \
    int64_t residual_norm(const fdc_residual_norm_args& args); \
    }
FDC_DECLARE(baseline)
#if defined(__x86_64__)
FDC_DECLARE(avx2)
FDC_DECLARE(avx512)
FDC_DECLARE(avx512_bf16)
#endif
#undef FDC_DECLARE

/* weights.h: the tensors of a checkpoint, found by name, checked, converted to float32 and packed once, at load.
 *
 * Everything lies in one 64-byte aligned block, in the order of the forward pass.
 */
#ifndef FB_WEIGHTS_H
#define FB_WEIGHTS_H

#include "kernels.h"

/* Which of the kernel set's GEMMs a linear layer is packed for. */
typedef enum fb_format { FB_FORMAT_F32, FB_FORMAT_SPLIT, FB_FORMAT_S8 } fb_format;

/* A linear layer y = act(x W^T + bias), W [out][in] packed by the GEMM of its format; for gemm_s8 quantised per row of W
 * before that, and all but attention_output mixed (mix_f32) before that. */
typedef struct fb_linear {
    ptrdiff_t out, in;
    fb_format format;
    const void *packed;
    const float *bias; /* [out] or NULL */
} fb_linear;

typedef struct fb_norm {
    const float *gamma, *beta; /* [hidden] */
} fb_norm;

typedef struct fb_layer {
    fb_linear qkv; /* [heads][3][head_dim][hidden]: of each head its queries, keys and values */
    fb_linear attention_output;
    fb_norm attention_norm;
    fb_linear intermediate;
    fb_linear output;
    fb_norm output_norm;
} fb_layer;

typedef struct fb_weights {
    void *block; /* owns all that the pointers below point into */
    size_t bytes;
    const float *word;            /* [vocab][hidden]; NULL in int8 models, which have */
    const int8_t *word_s8;        /* [vocab][hidden], -127 .. 127, and */
    const float *word_scales;     /* [vocab] */
    const float *position, *type; /* [rows][hidden] */
    fb_norm embeddings_norm;
    fb_layer *layers; /* [num_hidden_layers] */
    fb_linear pooler; /* packed is NULL when the checkpoint has none */
    fb_linear dense[FB_MAX_DENSE];
} fb_weights;

/* Bytes of a matrix [n][k] packed for it. */
size_t fb_packed_bytes(const fb_kernels *kernels, fb_format format, ptrdiff_t n, ptrdiff_t k);

/* pack of fb_gemm_f32 or fb_gemm_split. */
void fb_pack_f32(const fb_kernels *kernels, fb_format format, ptrdiff_t n, ptrdiff_t k, const float *w,
                 ptrdiff_t stride_n, ptrdiff_t stride_k, void *packed);

/* Of the encoder's layers; pooler and dense modules are FB_FORMAT_F32. */
fb_format fb_encoder_format(const fb_config *config, const fb_kernels *kernels);

/* pooled_dim: the length that the first dense module takes. On failure nothing is held. */
fb_status fb_weights_load(fb_weights *weights, const fb_config *config, ptrdiff_t pooled_dim, const fb_kernels *kernels,
                          const fb_tensor *tensors, size_t num_tensors, fb_error *err);
void fb_weights_free(fb_weights *weights);

/* Rows first .. first + rows - 1 of a tensor [..][columns] to float32 in C order. One of rank 1 is a row, or, where columns
 * is 1, a column. */
void fb_tensor_to_f32(const fb_tensor *tensor, int64_t first, int64_t rows, int64_t columns, float *out);

/* 64-byte aligned memory, its content undefined; NULL when there is none. Freed by fb_aligned_free. */
void *fb_aligned_alloc(size_t bytes);
void fb_aligned_free(void *memory);

#endif

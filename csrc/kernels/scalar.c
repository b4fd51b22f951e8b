/* scalar.c: every kernel in portable C: the set that runs anywhere, and the floor that other sets inherit from.
 *
 * fmaf is one instruction where the compiler's target has it; elsewhere it is the C library's exact function.
 */
#include "../kernels.h"
#include "simd_scalar.h"

#define FB_ISA_NAME(op) op##_scalar
#include "activations.inc.h"
#include "epilogue.inc.h"
#include "rows.inc.h"

#define FB_GEMM_MR 2
#define FB_GEMM_TILES(X) X(1, 1) X(2, 1)
static const int fb_gemm_strips[FB_GEMM_MR + 1] = {0, 1, 1};
#include "gemm_f32.inc.h"

static inline vi vi_dot(vi acc, vrow row, vi w)
{
    int8_t bytes[64];
    memcpy(bytes, w.l, sizeof bytes);
    FB_LANES for (int p = 0; p < 4; p++) acc.l[i] += row[p] * bytes[i * 4 + p];
    return acc;
}
#define FB_S8_DEPTH 4
#define FB_A_SHIFT 0
#define FB_S8_MR 2
#define FB_S8_TILES(X) X(1, 1) X(2, 1)
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 1, 1};
#include "gemm_s8.inc.h"

static const fb_gemm_f32 gemm_f32 = {"gemm_f32_2x16_scalar", packed_bytes_scalar, pack_scalar, gemm_f32_scalar};

static const fb_gemm_s8 gemm_s8 = {
    "gemm_s8_2x16_scalar", s8_packed_bytes_scalar, s8_pack_scalar, s8_pack_f32_scalar, gemm_s8_scalar, 5e6, 0};

const fb_kernels fb_kernels_scalar = {
    .isa = "scalar",
    .needs = 0,
    .gemm_f32 = &gemm_f32,
    .softmax_f32 = softmax_f32_scalar,
    .softmax_u8 = softmax_u8_scalar,
    .layernorm_f32 = layernorm_f32_scalar,
    .mix_f32 = mix_f32_scalar,
    .quantize_u8 = quantize_u8_scalar,
    .mix_quantize_u8 = mix_quantize_u8_scalar,
    .gemm_s8 = &gemm_s8,
    .row_block = 64,
};

/* scalar.c: every kernel in portable C: the set that runs anywhere, and the floor that other sets inherit from.
 *
 * fmaf is one instruction where the compiler's target has it; elsewhere it is the C library's exact function.
 */
#include "../kernels.h"
#include "simd_scalar.h"

#define FB_ISA_NAME(op) op##_scalar
#include "rows.inc.h"

#define FB_GEMM_MR 2
#define FB_GEMM_TILES(X) X(1, 1) X(2, 1)
static const int fb_gemm_strips[FB_GEMM_MR + 1] = {0, 1, 1};
#include "gemm_f32.inc.h"

static const fb_gemm_f32 gemm_f32 = {"gemm_f32_2x16_scalar", packed_bytes_scalar, pack_scalar, gemm_f32_scalar};

const fb_kernels fb_kernels_scalar = {
    .isa = "scalar",
    .needs = 0,
    .gemm_f32 = &gemm_f32,
    .softmax_f32 = softmax_f32_scalar,
    .layernorm_f32 = layernorm_f32_scalar,
};

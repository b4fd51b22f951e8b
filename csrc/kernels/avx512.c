/* avx512.c: kernels for x86-64 with AVX-512 F, BW, DQ, VL (Intel Skylake-X 2017, AMD Zen 4 2022, and later).
 *
 * gemm_f32 keeps an 8x48 tile of C in 24 of the 32 zmm registers. Fewer rows take more strips, so that W is loaded less
 * often than it is used and enough chains hide the latency of the multiply-add. At M = 128 on a Sapphire Rapids class
 * Xeon 8x48 was the best of 6x64, 8x48, 12x32 and 14x32 (86, 87, 84 and 82 % of the FMA peak, K = 768; 2026-11).
 */
#include "../cpu.h"
#include "../kernels.h"
#include <math.h>
#include "simd_avx512.h"

#define FB_ISA_NAME(op) op##_avx512
#include "rows.inc.h"

#define FB_GEMM_MR 8
#define FB_TILES_3(X, mr) X(mr, 1) X(mr, 2) X(mr, 3)
#define FB_TILES_4(X, mr) FB_TILES_3(X, mr) X(mr, 4)
#define FB_TILES_8(X, mr) FB_TILES_4(X, mr) X(mr, 5) X(mr, 6) X(mr, 7) X(mr, 8)
/* clang-format off */
#define FB_GEMM_TILES(X) \
    FB_TILES_8(X, 1) FB_TILES_8(X, 2) FB_TILES_8(X, 3) FB_TILES_4(X, 4) \
    FB_TILES_4(X, 5) FB_TILES_4(X, 6) FB_TILES_3(X, 7) FB_TILES_3(X, 8)
/* clang-format on */
static const int fb_gemm_strips[FB_GEMM_MR + 1] = {0, 8, 8, 8, 4, 4, 4, 3, 3};
#include "gemm_f32.inc.h"

static const fb_gemm_f32 gemm_f32 = {"gemm_f32_8x48_avx512", packed_bytes_avx512, pack_avx512, gemm_f32_avx512};

const fb_kernels fb_kernels_avx512 = {
    .isa = "avx512",
    .needs = FB_CPU_AVX512F | FB_CPU_AVX512BW | FB_CPU_AVX512DQ | FB_CPU_AVX512VL | FB_CPU_FMA | FB_CPU_F16C,
    .gemm_f32 = &gemm_f32,
    .softmax_f32 = softmax_f32_avx512,
    .layernorm_f32 = layernorm_f32_avx512,
};

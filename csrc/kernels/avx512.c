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
#include "activations.inc.h"
#include "epilogue.inc.h"
#include "rows.inc.h"

#define FB_GEMM_MR 8
#define FB_GEMM_TILES FB_TILES_8X48
static const int fb_gemm_strips[FB_GEMM_MR + 1] = {0, 8, 8, 8, 4, 4, 4, 3, 3};
#include "gemm_f32.inc.h"

/* Unsigned by signed bytes, in pairs that fit 16 bits (s8_pairs.inc.h). */
static inline vi dot(vi acc, __m512i unsigned_bytes, __m512i signed_bytes)
{
    const __m512i pairs = _mm512_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
static inline vi vi_dot(vi acc, vrow row, vi w) { return dot(acc, w, row); }
#define FB_S8_DEPTH 4
#define FB_A_SHIFT 0
#define FB_S8_MR 8
#define FB_S8_TILES FB_TILES_8X48
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 8, 8, 8, 4, 4, 4, 3, 3};
#include "s8_pairs.inc.h"
#include "gemm_s8.inc.h"

static const fb_gemm_f32 gemm_f32 = {"gemm_f32_8x48_avx512", packed_bytes_avx512, pack_avx512, gemm_f32_avx512};

static const fb_gemm_s8 gemm_s8 = {
    "gemm_s8_8x48_avx512", s8_packed_bytes_avx512, s8_pack_avx512, s8_pack_f32_avx512, gemm_s8_avx512, 5e6, 1};

const fb_kernels fb_kernels_avx512 = {
    .isa = "avx512",
    .needs = FB_CPU_AVX512F | FB_CPU_AVX512BW | FB_CPU_AVX512DQ | FB_CPU_AVX512VL | FB_CPU_FMA | FB_CPU_F16C,
    .gemm_f32 = &gemm_f32,
    .softmax_f32 = softmax_f32_avx512,
    .softmax_u8 = softmax_u8_avx512,
    .layernorm_f32 = layernorm_f32_avx512,
    .mix_f32 = mix_f32_avx512,
    .quantize_u8 = quantize_u8_avx512,
    .mix_quantize_u8 = mix_quantize_u8_avx512,
    .gemm_s8 = &gemm_s8,
    .row_block = 64,
};

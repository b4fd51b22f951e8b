/* avx2.c: kernels for x86-64 with AVX2 and FMA (Intel Haswell 2013, AMD Excavator 2015, and later).
 *
 * gemm_f32 keeps a 6x16 tile of C in 12 of the 16 ymm registers; 2 hold one step of packed W and 1 or 2 the broadcast
 * elements of A. Fewer rows take more strips, so that about eight chains hide the latency of the multiply-add.
 */
#include "../cpu.h"
#include "../kernels.h"
#include <math.h>
#include "simd_avx2.h"

#define FB_ISA_NAME(op) op##_avx2
#include "activations.inc.h"
#include "epilogue.inc.h"
#include "rows.inc.h"

#define FB_GEMM_MR 6
#define FB_GEMM_TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(3, 2) X(4, 1) X(5, 1) X(6, 1)
static const int fb_gemm_strips[FB_GEMM_MR + 1] = {0, 4, 2, 2, 1, 1, 1};
#define FB_GEMM_TURN 8 /* 64 KB of W: a quarter of the smallest L2 cache among these cores */
#include "gemm_f32.inc.h"

/* Unsigned by signed bytes, in pairs that fit 16 bits (s8_pairs.inc.h). */
static inline __m256i dot(__m256i acc, __m256i unsigned_bytes, __m256i signed_bytes)
{
    const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline vi vi_dot(vi acc, vrow row, vi w) { return FB_BOTH_I(dot(acc.lo, w.lo, row), dot(acc.hi, w.hi, row)); }
#define FB_S8_DEPTH 4
#define FB_A_SHIFT 0
#define FB_S8_MR 6
#define FB_S8_TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(3, 2) X(4, 1) X(5, 1) X(6, 1)
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 4, 2, 2, 1, 1, 1};
#include "s8_pairs.inc.h"
#include "gemm_s8.inc.h"

static const fb_gemm_f32 gemm_f32 = {"gemm_f32_6x16_avx2", packed_bytes_avx2, pack_avx2, gemm_f32_avx2};

static const fb_gemm_s8 gemm_s8 = {
    "gemm_s8_6x16_avx2", s8_packed_bytes_avx2, s8_pack_avx2, s8_pack_f32_avx2, gemm_s8_avx2, 5e6, 1};

const fb_kernels fb_kernels_avx2 = {
    .isa = "avx2",
    .needs = FB_CPU_AVX2 | FB_CPU_FMA | FB_CPU_F16C,
    .gemm_f32 = &gemm_f32,
    .softmax_f32 = softmax_f32_avx2,
    .softmax_u8 = softmax_u8_avx2,
    .layernorm_f32 = layernorm_f32_avx2,
    .mix_f32 = mix_f32_avx2,
    .quantize_u8 = quantize_u8_avx2,
    .mix_quantize_u8 = mix_quantize_u8_avx2,
    .gemm_s8 = &gemm_s8,
    .row_block = 128,
};

/* avxvnni.c: kernels for x86-64 with AVX-VNNI (Intel Alder Lake 2021 and its small cores, AMD Zen 5 2024, and later).
 *
 * vpdpbusd in its 256-bit form: four unsigned bytes by four signed ones, added to an int32, exactly. gemm_s8 keeps a 6x16
 * tile in 12 of the 16 ymm registers, as the float32 GEMM of avx2.c does; all else is inherited from there.
 */
#include "../cpu.h"
#include "../kernels.h"
#include <math.h>
#include "simd_avx2.h"

#define FB_ISA_NAME(op) op##_avxvnni
#include "activations.inc.h"
#include "epilogue.inc.h"

static inline vi vi_dot(vi acc, vrow row, vi w)
{
    return FB_BOTH_I(_mm256_dpbusd_epi32(acc.lo, row, w.lo), _mm256_dpbusd_epi32(acc.hi, row, w.hi));
}
#define FB_S8_DEPTH 4
#define FB_A_SHIFT 0
#define FB_S8_MR 6
#define FB_S8_TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(3, 2) X(4, 1) X(5, 1) X(6, 1)
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 4, 2, 2, 1, 1, 1};
#include "gemm_s8.inc.h"

static const fb_gemm_s8 gemm_s8 = {
    "gemm_s8_6x16_avxvnni", s8_packed_bytes_avxvnni, s8_pack_avxvnni, s8_pack_f32_avxvnni, gemm_s8_avxvnni, 2e7, 0};

const fb_kernels fb_kernels_avxvnni = {
    .isa = "avxvnni",
    .needs = FB_CPU_AVX2 | FB_CPU_FMA | FB_CPU_F16C | FB_CPU_AVXVNNI,
    .gemm_s8 = &gemm_s8,
};

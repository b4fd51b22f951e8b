/* avx512vnni.c: kernels for x86-64 with AVX-512 VNNI (Intel Cascade Lake 2019, AMD Zen 4 2022, and later).
 *
 * vpdpbusd multiplies four unsigned bytes by four signed ones and adds them to an int32, exactly. gemm_s8 keeps an 8x48 tile
 * as the float32 GEMM of avx512.c does; all else is inherited from there.
 */
#include "../cpu.h"
#include "../kernels.h"
#include <math.h>
#include "simd_avx512.h"

#define FB_ISA_NAME(op) op##_avx512vnni
#include "activations.inc.h"
#include "epilogue.inc.h"

static inline vi vi_dot(vi acc, vrow row, vi w) { return _mm512_dpbusd_epi32(acc, row, w); }
#define FB_S8_DEPTH 4
#define FB_A_SHIFT 0
#define FB_S8_MR 8
#define FB_S8_TILES FB_TILES_8X48
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 8, 8, 8, 4, 4, 4, 3, 3};
#include "gemm_s8.inc.h"

static const fb_gemm_s8 gemm_s8 = {"gemm_s8_8x48_avx512vnni",
                                   s8_packed_bytes_avx512vnni,
                                   s8_pack_avx512vnni,
                                   s8_pack_f32_avx512vnni,
                                   gemm_s8_avx512vnni,
                                   2e7,
                                   0};

const fb_kernels fb_kernels_avx512vnni = {
    .isa = "avx512vnni",
    .needs = FB_CPU_AVX512F | FB_CPU_AVX512BW | FB_CPU_AVX512DQ | FB_CPU_AVX512VL | FB_CPU_AVX512VNNI | FB_CPU_FMA |
             FB_CPU_F16C,
    .gemm_s8 = &gemm_s8,
};

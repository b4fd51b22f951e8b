/* avx512vnni.c: kernels for x86-64 with AVX-512 VNNI (Intel Cascade Lake 2019, AMD Zen 4 2022, and later).
 *
 * gemm_s8 alone; all else is inherited from avx512.c.
 */
#include "../cpu.h"
#include "../kernels.h"
#include <math.h>
#include "simd_avx512.h"

#define FB_ISA_NAME(op) op##_avx512vnni
#include "activations.inc.h"
#include "epilogue.inc.h"

#include "gemm_s8_vnni512.inc.h"

static const fb_gemm_s8 gemm_s8 = {"gemm_s8_8x48_avx512vnni", s8_packed_bytes_avx512vnni, s8_pack_avx512vnni,
                                   s8_pack_f32_avx512vnni, gemm_s8_avx512vnni};

const fb_kernels fb_kernels_avx512vnni = {
    .isa = "avx512vnni",
    .needs = FB_CPU_AVX512F | FB_CPU_AVX512BW | FB_CPU_AVX512DQ | FB_CPU_AVX512VL | FB_CPU_AVX512VNNI | FB_CPU_FMA |
             FB_CPU_F16C,
    .gemm_s8 = &gemm_s8,
};

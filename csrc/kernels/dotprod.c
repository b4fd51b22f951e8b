/* dotprod.c: kernels for ARMv8-A with dot products (Cortex-A55, A75, A76 2018; the Raspberry Pi 5, Graviton 2, and later).
 *
 * sdot multiplies four signed bytes by four and adds them to an int32, exactly; one operand may be a lane of a register, so
 * 16 steps of a row of A are one load. Activations are taken as a - 128. gemm_s8 keeps a 5x16 tile as the float32 GEMM of
 * neon.c does; all else is inherited from there.
 */
#include "../cpu.h"
#include "../kernels.h"
#include <math.h>
#include "simd_neon.h"

#define FB_ISA_NAME(op) op##_dotprod
#include "activations.inc.h"
#include "epilogue.inc.h"

static inline int32x4_t dot(int32x4_t acc, int8x16_t w, int8x16_t x, int lane)
{
    switch (lane) { /* a lane is part of the instruction */
    case 0: return vdotq_laneq_s32(acc, w, x, 0);
    case 1: return vdotq_laneq_s32(acc, w, x, 1);
    case 2: return vdotq_laneq_s32(acc, w, x, 2);
    default: return vdotq_laneq_s32(acc, w, x, 3);
    }
}

#define FB_S8_MR 5
static inline __attribute__((always_inline)) void s8_sums_dotprod(const int mr, const int nv, ptrdiff_t k,
                                                                  const uint8_t *a, ptrdiff_t lda, const int8_t *strip,
                                                                  ptrdiff_t strip_bytes, ptrdiff_t ahead, int32_t *sums)
{
    (void)ahead;
    int32x4_t acc[FB_S8_MR][4 * 4];
    FB_UNROLL
    for (int i = 0; i < mr; i++)
        FB_UNROLL
    for (int j = 0; j < 4 * nv; j++)
        acc[i][j] = vdupq_n_s32(0);
    for (ptrdiff_t p = 0; p < k; p += 16) {
        int8x16_t x[FB_S8_MR];
        FB_UNROLL
        for (int lane = 0; lane < 4; lane++) {
            int8x16_t w[4 * 4];
            FB_UNROLL
            for (int j = 0; j < 4 * nv; j++)
                w[j] = vld1q_s8(strip + j / 4 * strip_bytes + (p + 4 * lane) * 16 + j % 4 * 16);
            FB_UNROLL
            for (int i = 0; i < mr; i++) {
                if (lane == 0)
                    x[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(a + i * lda + p), vdupq_n_u8(128)));
                FB_UNROLL
                for (int j = 0; j < 4 * nv; j++)
                    acc[i][j] = dot(acc[i][j], w[j], x[i], lane);
            }
        }
    }
    FB_UNROLL
    for (int i = 0; i < mr; i++)
        FB_UNROLL
    for (int j = 0; j < 4 * nv; j++)
        vst1q_s32(sums + i * 8 * 16 + j * 4, acc[i][j]);
}
#define FB_S8_SUMS s8_sums_dotprod
#define FB_S8_DEPTH 4
#define FB_A_SHIFT 128
#define FB_S8_TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(4, 1) X(5, 1)
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 4, 2, 1, 1, 1};
#include "gemm_s8.inc.h"

static const fb_gemm_s8 gemm_s8 = {
    "gemm_s8_5x16_dotprod", s8_packed_bytes_dotprod, s8_pack_dotprod, s8_pack_f32_dotprod, gemm_s8_dotprod, 5e6, 0};

const fb_kernels fb_kernels_dotprod = {
    .isa = "dotprod",
    .needs = FB_CPU_NEON | FB_CPU_DOTPROD,
    .gemm_s8 = &gemm_s8,
};

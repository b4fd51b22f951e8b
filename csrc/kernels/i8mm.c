/* i8mm.c: kernels for ARMv8-A with int8 matrix products (Neoverse V1, N2, Cortex-A710, Apple M2 2022, Graviton 3, and later).
 *
 * usmmla multiplies 2 rows by 8 steps of unsigned bytes with 2 columns of signed ones and adds to 2x2 int32, exactly: twice
 * the work of a dot product. gemm_s8 keeps a 4x16 tile as 2 x 8 such squares; the rows of A are paired on the way in, the
 * squares taken apart on the way out. All else is inherited from neon.c.
 */
#include "../cpu.h"
#include "../kernels.h"
#include <math.h>
#include "simd_neon.h"

#define FB_ISA_NAME(op) op##_i8mm
#include "activations.inc.h"
#include "epilogue.inc.h"

#define FB_S8_MR 4
static inline __attribute__((always_inline)) void s8_sums_i8mm(const int mr, const int nv, ptrdiff_t k,
                                                               const uint8_t *a, ptrdiff_t lda, const int8_t *strip,
                                                               ptrdiff_t strip_bytes, ptrdiff_t ahead, int32_t *sums)
{
    (void)ahead;
    const int pairs = (mr + 1) / 2;
    int32x4_t acc[FB_S8_MR / 2][2 * 8]; /* row 0: columns 2j, 2j + 1; row 1: the same */
    FB_UNROLL
    for (int i = 0; i < pairs; i++)
        FB_UNROLL
    for (int j = 0; j < 8 * nv; j++)
        acc[i][j] = vdupq_n_s32(0);
    for (ptrdiff_t p = 0; p < k; p += 16) {
        uint8x16_t x[FB_S8_MR / 2][2];
        FB_UNROLL
        for (int i = 0; i < pairs; i++) {
            const int other = 2 * i + 1 < mr ? 2 * i + 1 : 2 * i; /* an odd last row is its own pair */
            const uint64x2_t top = vreinterpretq_u64_u8(vld1q_u8(a + 2 * i * lda + p));
            const uint64x2_t bottom = vreinterpretq_u64_u8(vld1q_u8(a + other * lda + p));
            x[i][0] = vreinterpretq_u8_u64(vzip1q_u64(top, bottom));
            x[i][1] = vreinterpretq_u8_u64(vzip2q_u64(top, bottom));
        }
        FB_UNROLL
        for (int s = 0; s < 2; s++)
            FB_UNROLL
        for (int j = 0; j < 8 * nv; j++) {
            const int8x16_t w = vld1q_s8(strip + j / 8 * strip_bytes + (p + 8 * s) * 16 + j % 8 * 16);
            FB_UNROLL
            for (int i = 0; i < pairs; i++)
                acc[i][j] = vusmmlaq_s32(acc[i][j], x[i][s], w);
        }
    }
    FB_UNROLL
    for (int i = 0; i < mr; i++)
        FB_UNROLL
    for (int j = 0; j < 8 * nv; j += 2) {
        const int64x2_t left = vreinterpretq_s64_s32(acc[i / 2][j]), right = vreinterpretq_s64_s32(acc[i / 2][j + 1]);
        const int64x2_t row = i % 2 ? vzip2q_s64(left, right) : vzip1q_s64(left, right);
        vst1q_s32(sums + i * 8 * 16 + j * 2, vreinterpretq_s32_s64(row));
    }
}
#define FB_S8_SUMS s8_sums_i8mm
#define FB_S8_DEPTH 8
#define FB_A_SHIFT 0
#define FB_S8_TILES(X) X(1, 1) X(1, 2) X(2, 1) X(2, 2) X(3, 1) X(4, 1)
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 2, 2, 1, 1};
#include "gemm_s8.inc.h"

static const fb_gemm_s8 gemm_s8 = {
    "gemm_s8_4x16_i8mm", s8_packed_bytes_i8mm, s8_pack_i8mm, s8_pack_f32_i8mm, gemm_s8_i8mm, 5e6, 0};

const fb_kernels fb_kernels_i8mm = {
    .isa = "i8mm",
    .needs = FB_CPU_NEON | FB_CPU_I8MM,
    .gemm_s8 = &gemm_s8,
};

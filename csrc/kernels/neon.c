/* neon.c: kernels for any ARMv8-A in 64-bit mode (Cortex-A53 2012, A72, A73; the Raspberry Pi 3 and 4, and later).
 *
 * gemm_f32 keeps a 5x16 tile of C in 20 of the 32 q registers; 4 hold one step of packed W, 5 four steps of each row of A.
 * Four steps of k: 21 loads, 80 multiply-adds. bench/README.md has the figures by which 5x16 was chosen
 * over 4x16 and 6x16, and those of the int8 tile.
 */
#include "../cpu.h"
#include "../kernels.h"
#include <math.h>
#include "simd_neon.h"

#define FB_ISA_NAME(op) op##_neon
#include "activations.inc.h"
#include "epilogue.inc.h"
#include "rows.inc.h"

#define FB_GEMM_MR 5
#define FB_GEMM_TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(4, 1) X(5, 1)
static const int fb_gemm_strips[FB_GEMM_MR + 1] = {0, 4, 2, 1, 1, 1};
#include "gemm_f32.inc.h"

/* Exact without dot products: a as a - 128, in -128 .. 127, w in -127 .. 127, so that two products fit 16 bits
 * (2 * 128 * 127 = 32512): smull, smlal2, then sadalp adds neighbours to four int32. 16 steps of one column are one
 * register, as are 16 steps of one row; 16 accumulators hold one column each, of 4 rows by 4 columns, 2 by 8 or 1 by 16. */
#define FB_S8_MR 4
static inline __attribute__((always_inline)) void s8_sums_neon(const int mr, const int nv, ptrdiff_t k,
                                                               const uint8_t *a, ptrdiff_t lda, const int8_t *strip,
                                                               ptrdiff_t strip_bytes, ptrdiff_t ahead, int32_t *sums)
{
    (void)nv, (void)strip_bytes, (void)ahead; /* one strip */
    const int columns = mr == 1 ? 16 : mr == 2 ? 8 : 4;
    for (int column = 0; column < 16; column += columns, strip += columns * 16) {
        int32x4_t acc[FB_S8_MR][16];
        FB_UNROLL
        for (int i = 0; i < mr; i++)
            FB_UNROLL
        for (int j = 0; j < columns; j++)
            acc[i][j] = vdupq_n_s32(0);
        for (ptrdiff_t p = 0; p < k; p += 16) {
            int8x16_t x[FB_S8_MR];
            FB_UNROLL
            for (int i = 0; i < mr; i++)
                x[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(a + i * lda + p), vdupq_n_u8(128)));
            FB_UNROLL
            for (int j = 0; j < columns; j++) {
                const int8x16_t w = vld1q_s8(strip + p * 16 + j * 16);
                int16x8_t pairs[FB_S8_MR]; /* each step for all rows: in-order cores do not wait for a result */
                FB_UNROLL
                for (int i = 0; i < mr; i++)
                    pairs[i] = vmull_s8(vget_low_s8(x[i]), vget_low_s8(w));
                FB_UNROLL
                for (int i = 0; i < mr; i++)
                    pairs[i] = vmlal_high_s8(pairs[i], x[i], w);
                FB_UNROLL
                for (int i = 0; i < mr; i++)
                    acc[i][j] = vpadalq_s16(acc[i][j], pairs[i]);
            }
        }
        FB_UNROLL
        for (int i = 0; i < mr; i++)
            FB_UNROLL
        for (int j = 0; j < columns; j += 4) {
            const int32x4_t low = vpaddq_s32(acc[i][j], acc[i][j + 1]), high = vpaddq_s32(acc[i][j + 2], acc[i][j + 3]);
            vst1q_s32(sums + i * 8 * 16 + column + j, vpaddq_s32(low, high));
        }
    }
}
#define FB_S8_SUMS s8_sums_neon
#define FB_S8_DEPTH 16
#define FB_A_SHIFT 128
#define FB_S8_TILES(X) X(1, 1) X(2, 1) X(3, 1) X(4, 1)
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 1, 1, 1, 1};
#include "gemm_s8.inc.h"

static const fb_gemm_f32 gemm_f32 = {"gemm_f32_5x16_neon", packed_bytes_neon, pack_neon, gemm_f32_neon};

static const fb_gemm_s8 gemm_s8 = {
    "gemm_s8_4x16_neon", s8_packed_bytes_neon, s8_pack_neon, s8_pack_f32_neon, gemm_s8_neon, 5e6, 0};

const fb_kernels fb_kernels_neon = {
    .isa = "neon",
    .needs = FB_CPU_NEON,
    .gemm_f32 = &gemm_f32,
    .softmax_f32 = softmax_f32_neon,
    .softmax_u8 = softmax_u8_neon,
    .layernorm_f32 = layernorm_f32_neon,
    .mix_f32 = mix_f32_neon,
    .quantize_u8 = quantize_u8_neon,
    .mix_quantize_u8 = mix_quantize_u8_neon,
    .gemm_s8 = &gemm_s8,
    .row_block = 64,
};

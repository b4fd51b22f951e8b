/* kernels.h: the contracts between the engine and the kernel sets.
 *
 * A kernel set is one file, kernels/<isa>.c, that fills one const fb_kernels. Slots left NULL are inherited from the
 * next row of isa.def that this CPU supports (dispatch.c).
 *
 * What holds for every kernel:
 *   Units    m, n, k, lda, ldc, rows count elements; only names ending in _bytes count bytes.
 *   Errors   none: the caller has checked shapes.
 *   Threads  re-entrant: no globals, no allocation, no threads of their own. The caller splits the work.
 *   Memory   nothing outside the described elements is read or written.
 *   Numbers  the same bits in every kernel set that has the op: the order of float32 operations is part of the contract.
 *            Multiply-adds are fused (one rounding) exactly where the contract writes fma(a, b, c).
 */
#ifndef FB_KERNELS_H
#define FB_KERNELS_H

#include "fastbert.h"

/* gemm_f32 sums each output over blocks of FB_CHAIN products, one ascending fma chain a block, and adds the blocks in
 * ascending order: the rounding error is about sqrt(k / FB_CHAIN) times smaller than that of one chain over all of k. */
enum { FB_CHAIN = 64 };

/* Columns per packed strip in every layout: one 512-bit vector, or two of 256, or four of 128 bits. */
enum { FB_STRIP = 16 };

/* What happens to an output element between the sum and memory: residual + act(sum + bias). */
typedef struct fb_epilogue {
    const float *bias; /* [n] or NULL */
    fb_act act;
    const float *residual; /* [m][n], rows ldr apart, or NULL; may not overlap c */
    ptrdiff_t ldr;
} fb_epilogue;

/* gemm_f32: the linear layer, C = residual + act(A * W^T + bias), all float32.
 *
 *   sum[i][j] = block_0 + block_1 + ...,   block_b = fma chain over p = b*FB_CHAIN .. of A[i][p] * W[j][p], from 0
 *   C[i][j]   = residual[i][j] + act(sum[i][j] + bias[j])              0 <= i < m, 0 <= j < n
 *
 *   a       [m][k]  activations; rows lda apart, lda >= k
 *   packed  W [n][k] as laid out by pack of this same struct (the layout is private to the pair)
 *   c       [m][n]  rows ldc apart, ldc >= n; written in full, nothing outside is touched; holds partial sums meanwhile
 *
 * Sizes    any m, n, k >= 0: edge tiles are handled inside; k == 0 gives residual + act(bias).
 * Memory   a, bias, residual, c need no alignment; packed is 64-byte aligned; c overlaps no input.
 * Columns  strips of FB_STRIP columns are packed one after the other, so columns j0 .. of a packed matrix, j0 a
 *          multiple of FB_STRIP, are the matrix at packed + packed_bytes(j0, k): this is how threads split n.
 * Numbers  before act, |error| <= (min(k, FB_CHAIN) + k / FB_CHAIN + 2) * 2^-24 * (sum |A||W| + |bias|) to first order.
 * Source   packing and loop order: Goto & van de Geijn, ACM TOMS 34(3), 2008.
 */
typedef struct fb_gemm_f32 {
    const char *name; /* "gemm_f32_8x48_avx512": what bench and fastbert.kernels() show */
    size_t (*packed_bytes)(ptrdiff_t n, ptrdiff_t k);
    /* Packs W with element [j][p] at w[j * stride_n + p * stride_k]: a weight matrix (ldw, 1), the keys of attention
     * (ld, 1) or its values, transposed (1, ld). One of the strides is 1. */
    void (*pack)(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k, void *packed);
    void (*run)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const void *packed,
                const fb_epilogue *epilogue, float *c, ptrdiff_t ldc);
} fb_gemm_f32;

/* gemm_split: the linear layer of gemm_f32 on units that multiply bfloat16 and add in float32.
 *
 *   C[i][j] = residual[i][j] + act(sum[i][j] + bias[j]),   sum ~ A * W^T,   operands as gemm_f32's
 *
 * Every x of A and W is three bfloat16, x = x1 + x2 + x3: x1 is x rounded, x2 the rest x - x1 rounded, x3 what is left,
 * ties away from 0. Of nine products six are added; those left out are below 2^-26 of |A||W|. With k padded with zeros:
 *
 *   dot(a, w, s)   of 32 steps:  s + (even + odd),  even and odd fma chains from 0 over steps 0 .. 15 and 16 .. 31
 *   sum[i][j]      panel_0 + panel_1 + ...,   a panel: FB_SPLIT_PANEL steps of k
 *   panel          s = 0;  for every 32 steps, ascending:  s = dot(a1, w3, s), dot(a1, w2, s), dot(a2, w2, s),
 *                  dot(a2, w1, s), dot(a3, w1, s);  then for every 32 steps, ascending:  s = dot(a1, w1, s)
 *
 * dot, unlike all else here, takes denormals for 0 and flushes them to 0.
 *
 * Scratch  of FB_SPLIT_SCRATCH bytes, 64-byte aligned, is the call's own.
 * Sizes    as gemm_f32. Memory  as gemm_f32. Columns  as gemm_f32.
 * Numbers  before act, where sum |A||W| is below 2^127, to first order
 *              |error| <= (16 + 1 + min(k, FB_SPLIT_PANEL) / 32 + k / FB_SPLIT_PANEL + 3) * 2^-24 * (sum |A||W| + |bias|)
 *                         + 2^-124 * (sum |A| + sum |W|) + 14 k * 2^-126
 *          the second line only where something is below 2^-100 or so. From 2^128 - 2^119 on, the smallest that bfloat16
 *          rounds to infinity, an element of A or W counts as infinite; a sum with an infinite or NaN factor is NaN.
 * Source   Henry, Tang & Heinecke, arXiv:1904.06376. tdpbf16ps: Intel SDM volume 2B.
 */
enum { FB_SPLIT_PANEL = 192, FB_SPLIT_SCRATCH = 512 * (FB_SPLIT_PANEL / 32 * 3 + 1) * 64 };
typedef struct fb_gemm_split {
    const char *name;
    uint32_t needs; /* FB_CPU_*, beyond those of the kernel set that brings it */
    size_t (*packed_bytes)(ptrdiff_t n, ptrdiff_t k);
    /* Strides as in fb_gemm_f32. */
    void (*pack)(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k, void *packed);
    void (*run)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const void *packed,
                const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, void *scratch);
} fb_gemm_split;

/* Bytes of K of a packed int8 matrix: K rounded up to the depth of the deepest tile (one AMX tile row). */
enum { FB_K8 = 64 };
static inline ptrdiff_t fb_k8(ptrdiff_t k) { return (k + FB_K8 - 1) / FB_K8 * FB_K8; }

/* mix_f32: y = M x for each row, M orthogonal up to a power of two: spreads a few large elements over many, so that eight
 * bits resolve the rest. M works on octets, 8 neighbouring elements, and keeps their order. With v = n / 8 octets:
 *
 *   v = 0, or n no multiple of 16    M = I
 *   otherwise  B = the largest power of two that divides v, at most 128: each run of B octets goes through the
 *              Hadamard butterfly of size B (additions and subtractions, not scaled), strides 1, 2, 4, ... ascending;
 *              then, if 3 B divides v, octets a, b, c that are B apart become a - m, b - m, c - m,
 *              m = ((a + b) + c) * (2 / 3), 2 / 3 rounded to float32            (a Householder reflection)
 *
 * M is symmetric and M M = B I (fb_mix_gain), so x . w = (M x) . (M w) / B: weights are mixed once, at load.
 *   x, y    [rows][n], rows ldx and ldy apart; y == x with ldy == ldx is allowed, other overlap is not
 * Source   the idea: Hadamard rotation before quantisation, QuaRot (Ashkboos et al., arXiv:2404.00456).
 */
typedef void fb_mix_f32(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, float *y, ptrdiff_t ldy);

static inline ptrdiff_t fb_mix_gain(ptrdiff_t n)
{
    const ptrdiff_t octets = n / 8, divisor = octets & -octets; /* the largest power of two that divides it */
    return n < 16 || n % 16 != 0 ? 1 : divisor < 128 ? divisor : 128;
}

/* quantize_u8: each row as x[j] ~ scale * (q[j] - zero), q in 0 .. 255, 0 represented exactly.
 *
 *   hi = max(0, max(x)), lo = min(0, min(x)),  scale = hi / 255 - lo / 255,  inverse = 1 / scale
 *   zero = rint(-lo * inverse),  q[j] = clamp(rint(x[j] * inverse) + zero, 0, 255)
 *
 *   x       [rows][k], rows ldx apart
 *   q       [rows][fb_k8(k)], rows ldq >= fb_k8(k) apart; bytes from k on are 0
 *   scale   [rows]; 0, with all q = zero = 0, where scale would be below 2^-120 (a row of zeros); NaN, with all q = zero = 0,
 *           where the row holds a NaN or an infinity, so that all that is made from it is NaN
 *   zero    [rows] 0 .. 255
 */
typedef void fb_quantize_u8(ptrdiff_t rows, ptrdiff_t k, const float *x, ptrdiff_t ldx, uint8_t *q, ptrdiff_t ldq,
                            float *scale, int32_t *zero);

/* mix_quantize_u8: mix_f32 from x to y, then quantize_u8 of y, in fewer passes. y == x with ldy == ldx is allowed. */
typedef void fb_mix_quantize_u8(ptrdiff_t rows, ptrdiff_t k, const float *x, ptrdiff_t ldx, float *y, ptrdiff_t ldy,
                                uint8_t *q, ptrdiff_t ldq, float *scale, int32_t *zero);

/* gemm_s8: the linear layer with int8 operands and a float32 result.
 *
 *   t[i][j] = sum_p (a[i][p] - zero[i]) * W[j][p]                         exact, in int32
 *   C[i][j] = residual[i][j] + act(fma((float)t[i][j], scale_a[i] * scale_w[j], bias[j]))
 *
 *   act     as in gemm_f32, but GELU, GELU_TANH and SILU, which are quantised next, with an absolute error of at most 2.6e-5,
 *           2.2e-5 and 1.03e-4 and one rounding, as fma(-|x|, (r r) (r r), max(0, x)), r = max(0, Q(|x|)), Q by fmas from
 *           its highest power down (v_act_s8): exactly x or 0 beyond 4.68, 4.59 and 13.28, NaN for an infinity
 *   a       [m][fb_k8(k)] u8, rows lda bytes apart; bytes from k on meet zero weights
 *   scale_a, zero [m]
 *   packed  W [n][k] in -127 .. 127, its column sums and scale_w [n], as laid out by pack of this same struct
 *
 * Sizes    any m, n >= 0, 0 <= k <= 32768: |t| < 2^31.
 * Memory   as gemm_f32. Columns  as gemm_f32.
 * Numbers  no saturating instruction; the same bits in every kernel set.
 */
typedef struct fb_gemm_s8 {
    const char *name;
    size_t (*packed_bytes)(ptrdiff_t n, ptrdiff_t k);
    void (*pack)(ptrdiff_t n, ptrdiff_t k, const int8_t *w, ptrdiff_t ldw, const float *scale_w, void *packed);
    /* Quantises and packs W with element [j][p] at w[j * stride_n + p * stride_k], strides as in fb_gemm_f32, as q and scale_w:
     *   scale_w[j] = max_p |w[j][p]| / 127,  q = rint(w * (1 / scale_w)), the product not rounded
     * scale_w 0 with all q 0 where it would be below 2^-120; NaN with all q 0 where a row holds a NaN or an infinity. */
    void (*pack_f32)(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k, void *packed);
    void (*run)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
                const int32_t *zero, const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc);
    double small_work; /* multiply-adds under which a second thread costs more than it saves */
    int prepares;      /* each call first works on all of a: one wide call beats many narrow ones */
} fb_gemm_s8;

/* Row reductions (softmax, layernorm) run in 16 virtual lanes: element j goes to lane j mod 16, each lane in ascending
 * order, absent elements of the last vector counting as 0; the lanes are then added as a fixed tree: lane l and l + 8,
 * then l and l + 4, l + 2, l + 1. */

/* softmax_f32: x[i][j] = e[j] / sum(e),   e[j] = exp((x[i][j] - max_j(x[i][j])) * scale), in place.
 *
 *   x       [rows][n], rows ldx apart; n >= 1; 2^-100 < scale < 2^100
 * Numbers  the difference is rounded, its product with scale is not; exp has relative error < 2^-22 and is held at
 *          exp(-87.3) below that; e[j] is multiplied by 1 / sum(e).
 *          A NaN in a row makes that row NaN.
 */
typedef void fb_softmax_f32(ptrdiff_t rows, ptrdiff_t n, float scale, float *x, ptrdiff_t ldx);

/* softmax_u8: the softmax of each row as bytes over their sum, the activations of a gemm_s8 with zero 0.
 *
 *   e[j] = 255 exp(x[j] - max(x)),  q[j] = e[j] rounded,  scale = 1 / sum(q)
 *
 *   x       [rows][n], rows ldx apart; 1 <= n <= 65536
 *   q       [rows][fb_k8(n)], rows ldq >= fb_k8(n) apart; bytes from n on are 0
 *   scale   [rows]; NaN, with all q 0, where softmax_f32 has a NaN
 * Numbers  |e error| < 0.0124 (v_exp_255), so |q - e| < 0.5124; the largest q of a row is 255. sum(q) is exact. Ties, which
 *          are rounded as the sum of the lane so far has it, are all that depends on the order of a row.
 */
typedef void fb_softmax_u8(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, uint8_t *q, ptrdiff_t ldq,
                           float *scale);

/* layernorm_f32: y = (x - mean) / sqrt(var + eps) * gamma + beta for each row (Ba et al., arXiv:1607.06450).
 *
 *   mean = sum(x) / n,  var = sum(fma(d, d, .)) / n with d = x - mean,  rstd = 1 / sqrt(var + eps)
 *   y    = fma((x - mean) * rstd, gamma, beta)
 *
 *   x, y    [rows][n], rows ldx and ldy apart; y == x with ldy == ldx is allowed, other overlap is not; n >= 1
 *   gamma, beta [n]
 */
typedef void fb_layernorm_f32(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, const float *gamma,
                              const float *beta, float eps, float *y, ptrdiff_t ldy);

enum { FB_ROW_BLOCK_NEAR = 256 };

typedef struct fb_kernels {
    const char *isa;
    uint32_t needs; /* FB_CPU_* bits, all of them (cpu.h) */
    const fb_gemm_f32 *gemm_f32;
    fb_softmax_f32 *softmax_f32;
    fb_softmax_u8 *softmax_u8;
    fb_layernorm_f32 *layernorm_f32;
    fb_mix_f32 *mix_f32;
    fb_quantize_u8 *quantize_u8;
    fb_mix_quantize_u8 *mix_quantize_u8;
    const fb_gemm_s8 *gemm_s8;
    ptrdiff_t row_block; /* rows that go through a layer together after attention, by the size of the L2 cache; at least
                          * FB_ROW_BLOCK_NEAR on CPUs of FB_CPU_NEAR_L3 */
    const fb_gemm_split *gemm_split; /* NULL in sets and on CPUs without it; then float32 models run on gemm_f32 */
} fb_kernels;

#endif

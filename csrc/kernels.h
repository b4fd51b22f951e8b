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
 *   Numbers  the same bits in every kernel set: the order of float32 operations is part of the contract.
 *            Multiply-adds are fused (one rounding) exactly where the contract writes fma(a, b, c).
 */
#ifndef FB_KERNELS_H
#define FB_KERNELS_H

#include "fastbert.h"

/* gemm_f32 sums each output over blocks of FB_KC products, one ascending fma chain a block, and adds the blocks in
 * ascending order. The blocks keep the packed panel in the L1 cache, and make the rounding error of k = 3072 about
 * sqrt(k / FB_KC) times smaller than one chain over all of k would. */
enum { FB_KC = 128 };

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
 *   sum[i][j] = block_0 + block_1 + ...,   block_b = fma chain over p = b*FB_KC .. of A[i][p] * W[j][p], from 0
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
 * Numbers  before act, |error| <= (min(k, FB_KC) + k / FB_KC + 2) * 2^-24 * (sum |A||W| + |bias|) to first order.
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

/* Row reductions (softmax, layernorm) run in 16 virtual lanes: element j goes to lane j mod 16, each lane in ascending
 * order, absent elements of the last vector counting as 0; the lanes are then added as a fixed tree: lane l and l + 8,
 * then l and l + 4, l + 2, l + 1. */

/* softmax_f32: x[i][j] = e[j] / sum(e),   e[j] = exp(fma(x[i][j], scale, -max_j(x[i][j]) * scale)), in place.
 *
 *   x       [rows][n], rows ldx apart; n >= 1; scale > 0
 * Numbers  exp has relative error < 2^-22 and is held at exp(-87.3) below that; e[j] is multiplied by 1 / sum(e).
 *          A NaN in a row makes that row NaN.
 */
typedef void fb_softmax_f32(ptrdiff_t rows, ptrdiff_t n, float scale, float *x, ptrdiff_t ldx);

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

typedef struct fb_kernels {
    const char *isa;
    uint32_t needs; /* FB_CPU_* bits, all of them (cpu.h) */
    const fb_gemm_f32 *gemm_f32;
    fb_softmax_f32 *softmax_f32;
    fb_layernorm_f32 *layernorm_f32;
} fb_kernels;

#endif

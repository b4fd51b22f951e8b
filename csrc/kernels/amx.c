/* amx.c: kernels for x86-64 with AMX-INT8 and AMX-BF16 (Intel Sapphire Rapids 2023 and later; no CPU has one of them
 * alone). gemm_s8, and in gemm_split.inc.h gemm_split; all else is inherited.
 *
 * A tile register holds 16 rows of 64 bytes. tdpbusd multiplies a tile of A, 16 rows by 64 steps of k, by a tile of W, 16
 * columns by the same steps, and adds to 16x16 int32, exactly. A strip of packed W (gemm_s8.inc.h) is, for every 64 steps
 * of k, such a tile of W, and rows of A are padded to 64 bytes: all tiles are loaded from where they lie.
 *
 * Blocks of C, four tiles of sums each:
 *   m > 16     32x32 as 2x2 tiles: two of A and two of W make four products
 *   m <= 16    16x64 as 1x4 tiles: W is read once, and that is what such a call waits for
 *
 * A tile's shape is set by ldtilecfg, which empties all tiles: once for a call. So all blocks of a call have the same number
 * of rows, which divides m as evenly as can be; where it does not divide it, the last block is moved up and some rows are
 * computed twice, to the same bits (at most one row in 32). No row is padding.
 *
 * A block's sums go to memory (L1) and become float32 row by row between the products of the next block, because a
 * product takes 16 cycles and one instruction: the vector units are free meanwhile.
 */
#include "../cpu.h"
#include "../kernels.h"

#ifdef __x86_64__ /* 32-bit code has no tiles: there the set is empty, and cpu.c never grants what it needs */
#include <math.h>
#include <string.h>
#include "simd_avx512.h"

#define FB_ISA_NAME(op) op##_amx
#include "activations.inc.h"
#include "epilogue.inc.h"

#define FB_S8_DEPTH 4
#define FB_A_SHIFT 0
#include "gemm_s8.inc.h"

/* From this many rows on, the next strips are fetched while these are worked on; below, it costs more than it gives. */
enum { AHEAD_ROWS = 128 };

/* What ldtilecfg loads: Intel SDM volume 2A. */
typedef struct tile_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Tiles for blocks of so many rows, numbered as in multiply_2x2 and multiply_1x4. */
static void configure(ptrdiff_t rows, ptrdiff_t upper)
{
    const uint8_t m = (uint8_t)rows, u = (uint8_t)upper, l = (uint8_t)(rows - upper);
    const uint8_t tall[2][8] = {{m, m, m, m, m, 16, 16, 16}, {u, u, l, l, u, l, 16, 16}};
    tile_shapes shapes = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}};
    memcpy(shapes.rows, tall[rows > 16], sizeof tall[0]);
    /* GCC 12 tells its optimiser of 8 of the 64 bytes that are read here, and of none that a tile is loaded from. */
    __asm__ volatile("" : : "r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
}

/* A block of C on its way. */
typedef struct block {
    fb_s8_tile_args args;
    ptrdiff_t rows, strips;
    ptrdiff_t wide;                     /* strips of a block that is full: 2 with 2x2 tiles, 4 with 1x4 */
    ptrdiff_t finished;                 /* rows */
    _Alignas(64) int32_t sums[32 * 32]; /* [rows][wide * 16] */
} block;

static void finish(block *b, ptrdiff_t rows)
{
    const ptrdiff_t end = rows < b->rows - b->finished ? b->finished + rows : b->rows;
    s8_finish(b->finished, end, b->strips, b->sums, b->wide * 16, &b->args);
    b->finished = end;
}

/* What is done while tiles are multiplied, a share with every 64 steps of k. */
typedef struct errand {
    block *before; /* is finished */
    ptrdiff_t rows_share;
    const int8_t *ahead, *ahead_end; /* packed W to be fetched into the L2 cache */
    ptrdiff_t bytes_share;           /* a multiple of 64 */
} errand;

static __attribute__((noinline)) void run_errand(errand *e)
{
    finish(e->before, e->rows_share);
    const int8_t *end = e->bytes_share < e->ahead_end - e->ahead ? e->ahead + e->bytes_share : e->ahead_end;
    for (; e->ahead < end; e->ahead += 64)
        __builtin_prefetch(e->ahead, 0, 2);
}

/* Sums in tiles 0 1 over 2 3, A in 4 over 5, W in 6 7. */
static __attribute__((noinline)) void multiply_2x2(block *b, ptrdiff_t upper, errand *e)
{
    const ptrdiff_t lda = b->args.lda, strip_bytes = b->args.strip_bytes, strips = b->strips;
    const uint8_t *a = b->args.a, *const end = a + b->args.k, *lower = a + upper * lda;
    const int8_t *w = b->args.strip;
    for (; a < end; a += FB_K8, lower += FB_K8, w += FB_K8 * 16) {
        _tile_loadd(4, a, lda);
        _tile_loadd(6, w, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(5, lower, lda);
        _tile_dpbusd(2, 5, 6);
        if (strips > 1) {
            _tile_loadd(7, w + strip_bytes, 64);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
        run_errand(e);
    }
}

/* Sums in tiles 0 1 2 3, A in 4, W in 5 6 7 5. */
static __attribute__((noinline)) void multiply_1x4(block *b, errand *e)
{
    const ptrdiff_t lda = b->args.lda, strip_bytes = b->args.strip_bytes, strips = b->strips;
    const uint8_t *a = b->args.a, *const end = a + b->args.k;
    const int8_t *w = b->args.strip;
    for (; a < end; a += FB_K8, w += FB_K8 * 16) {
        _tile_loadd(4, a, lda);
        _tile_loadd(5, w, 64);
        _tile_dpbusd(0, 4, 5);
        if (strips > 1) {
            _tile_loadd(6, w + strip_bytes, 64);
            _tile_dpbusd(1, 4, 6);
        }
        if (strips > 2) {
            _tile_loadd(7, w + 2 * strip_bytes, 64);
            _tile_dpbusd(2, 4, 7);
        }
        if (strips > 3) {
            _tile_loadd(5, w + 3 * strip_bytes, 64);
            _tile_dpbusd(3, 4, 5);
        }
        run_errand(e);
    }
}

/* The sums of b, and all of the errand's block finished. */
static void multiply(block *b, ptrdiff_t upper, errand *e)
{
    const ptrdiff_t steps = b->args.k > 0 ? b->args.k / FB_K8 : 1;
    e->rows_share = (e->before->rows + steps - 1) / steps;
    e->bytes_share = ((e->ahead_end - e->ahead) / 64 + steps - 1) / steps * 64;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int32_t *lower_left;
    if (b->wide == 2) {
        multiply_2x2(b, upper, e);
        lower_left = b->sums + upper * 32;
    } else {
        multiply_1x4(b, e);
        lower_left = b->sums + 32;
    }
    finish(e->before, e->before->rows);
    const ptrdiff_t row_bytes = b->wide * 64;
    _tile_stored(0, b->sums, row_bytes);
    _tile_stored(1, b->sums + 16, row_bytes);
    _tile_stored(2, lower_left, row_bytes);
    _tile_stored(3, lower_left + 16, row_bytes);
}

static void gemm_s8_amx(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
                        const int32_t *zero, const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc)
{
    if (m <= 0 || n <= 0)
        return;
    const ptrdiff_t groups = (m + 31) / 32, rows = (m + groups - 1) / groups, upper = (rows + 1) / 2;
    const ptrdiff_t strips = (n + 15) / 16, wide = rows > 16 ? 2 : 4, strip_bytes = s8_strip_bytes(k);
    block blocks[2], *b = &blocks[0], *before = &blocks[1];
    b->wide = before->wide = wide;
    before->rows = before->strips = before->finished = 0;
    configure(rows, upper);
    for (ptrdiff_t s = 0; s < strips; s += wide) {
        const ptrdiff_t left = strips - s, nv = left < wide ? left : wide, column = s * 16;
        const ptrdiff_t columns = nv == left ? n - column : nv * 16;
        const int8_t *strip = (const int8_t *)packed + s * strip_bytes, *next = strip + nv * strip_bytes;
        const ptrdiff_t next_lines = m < AHEAD_ROWS ? 0 : (left - nv < wide ? left - nv : wide) * strip_bytes / 64;
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t i = g < groups - 1 ? g * rows : m - rows;
            b->args = (fb_s8_tile_args){
                .k = fb_k8(k),
                .a = a + i * lda,
                .lda = lda,
                .scale_a = scale_a + i,
                .zero = zero + i,
                .strip = strip,
                .strip_bytes = strip_bytes,
                .bias = epilogue->bias ? epilogue->bias + column : NULL,
                .act = epilogue->act,
                .residual = epilogue->residual ? epilogue->residual + i * epilogue->ldr + column : NULL,
                .ldr = epilogue->ldr,
                .last_columns = columns - (nv - 1) * 16,
                .c = c + i * ldc + column,
                .ldc = ldc,
            };
            b->rows = rows;
            b->strips = nv;
            b->finished = 0;
            errand e = {.before = before,
                        .ahead = next + next_lines * g / groups * 64,
                        .ahead_end = next + next_lines * (g + 1) / groups * 64};
            multiply(b, upper, &e);
            block *const finished = before;
            before = b;
            b = finished;
        }
    }
    _tile_release(); /* else the OS saves 8 KB of tiles whenever it switches away from this thread */
    finish(before, before->rows);
}

#include "gemm_split.inc.h"

static const fb_gemm_split gemm_split = {"gemm_split_32x32_amx", split_packed_bytes, split_pack, gemm_split_amx};

static const fb_gemm_s8 gemm_s8 = {"gemm_s8_32x32_amx", s8_packed_bytes_amx, s8_pack_amx, gemm_s8_amx};
#endif

const fb_kernels fb_kernels_amx = {
    .isa = "amx",
    .needs = FB_CPU_AVX512F | FB_CPU_AVX512BW | FB_CPU_AVX512DQ | FB_CPU_AVX512VL | FB_CPU_FMA | FB_CPU_F16C |
             FB_CPU_AMXTILE | FB_CPU_AMXINT8 | FB_CPU_AMXBF16,
#ifdef __x86_64__
    .gemm_s8 = &gemm_s8,
    .gemm_split = &gemm_split,
#endif
};

/* amx.c: kernels for x86-64 with AMX-INT8 (Intel Sapphire Rapids 2023 and later): gemm_s8, and where the CPU has AMX-BF16,
 * too, gemm_split, in gemm_split.inc.h; all else is inherited.
 *
 * A tile register holds 16 rows of 64 bytes. tdpbusd multiplies a tile of A, 16 rows by 64 steps of k, by a tile of W, 16
 * columns by the same steps, and adds to 16x16 int32, exactly. A strip of packed W (gemm_s8.inc.h) is, for every 64 steps
 * of k, such a tile of W, and rows of A are padded to 64 bytes: all tiles are loaded from where they lie.
 *
 * Blocks of C, four tiles of sums each:
 *   m > 16        32x32 as 2x2 tiles: two of A and two of W make four products
 *   m = 9 .. 16   16x64 as 1x4 tiles: W is read once, and that is what such a call waits for
 *   m <= 8        none: dot products of avx512vnni.c, on the same packed W to the same bits, take as long for 8 rows, and for
 *                 one a third as long (ldtilecfg alone takes 200 cycles)
 *
 * A tile's shape is set by ldtilecfg, which empties all tiles: once for a call. So all blocks of a call have the same number
 * of rows, which divides m as evenly as can be; where it does not divide it, the last block is moved up and some rows are
 * computed twice, to the same bits (at most one row in 32). No row is padding.
 *
 * The sums of a block go to memory (L1) with the first products of the next block, and become float32 between its other
 * ones: a product takes 16 cycles and is one instruction. For some hundred cycles after a tile instruction 512-bit multiply-adds
 * have one port instead of two (csrc/README.md), so that an activation has more of them than the products take: where k is
 * long it is done between products, a few rows at a time, where k is short all of it after them.
 *
 * A block runs over k forwards, the next one backwards: of W the tiles used last are still in the L1 cache where k is too
 * long for all of them (K = 1536 and 3072: 0.95 of the time; sums of integers have no order).
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

/* For few rows, as in avx512vnni.c. */
static inline vi vi_dot(vi acc, vrow row, vi w) { return _mm512_dpbusd_epi32(acc, row, w); }
#define FB_S8_DEPTH 4
#define FB_A_SHIFT 0
#define FB_S8_MR 8
#define FB_S8_TILES FB_TILES_8X48
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 8, 8, 8, 4, 4, 4, 3, 3};
#include "gemm_s8.inc.h"

/* From this many rows on, the next strips are fetched while these are worked on; below, it costs more than it gives. */
enum { AHEAD_ROWS = 128 };
enum { ROWS_MOST = 512 }; /* that tiles are set up for at once */

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

/* What turns the sums of 16 columns into float32. */
typedef struct columns {
    vi sums; /* of W, as pairs of int16: the low seven bits, and the rest */
    vf scales, bias;
    __mmask16 used;
} columns;

/* What all blocks of a call share. */
typedef struct work {
    _Alignas(64) int32_t sums[32 * 32]; /* of the block before: [rows][wide * 16], wide as in run */
    int32_t minus_zero[ROWS_MOST];      /* [m] -zero and -128 zero as int16 */
    ptrdiff_t rows, upper;              /* of a block; of its upper tiles where it has 2x2 */
    ptrdiff_t k, lda;                   /* bytes; k a multiple of FB_K8 */
    ptrdiff_t strip_bytes, ldc, ldr;
    const float *scale_a;
    const int8_t *ahead, *ahead_end; /* W that is fetched next, */
    ptrdiff_t ahead_share;           /* so many bytes with every 64 steps of k: a multiple of 64 */
} work;

/* A block of C whose sums are to be finished. */
typedef struct block {
    ptrdiff_t rows; /* 0: none */
    ptrdiff_t row;  /* its first one, of all m */
    const columns *columns;
    const float *residual;
    float *c;
} block;

/* Of `wide` strips, of which so many are there, with n columns; the first of them ends at `after`. */
static inline __attribute__((always_inline)) void read_columns(const int wide, ptrdiff_t strips, ptrdiff_t n,
                                                               const int8_t *after, ptrdiff_t strip_bytes,
                                                               const float *bias, columns *c)
{
    for (ptrdiff_t j = 0; j < strips; j++, after += strip_bytes) {
        const vi sums = vi_load((const int32_t *)after), low = _mm512_and_si512(sums, vi_set1(127));
        c[j].sums = _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(sums, 9));
        c[j].scales = v_load((const float *)(after + 64));
        c[j].used = v_mask(n - j * 16 < 16 ? n - j * 16 : 16);
        c[j].bias = bias ? _mm512_maskz_loadu_ps(c[j].used, bias + j * 16) : v_set1(0.0f);
    }
    for (ptrdiff_t j = strips; j < wide; j++)
        c[j].used = 0;
}

/* n rows of b from `row` on, all but the last three constant. Straight code out of registers: tiles wait where the window
 * of instructions in flight is full, or a branch was mispredicted. */
static inline __attribute__((always_inline)) void finish_rows(const fb_act act, const int add, const int wide,
                                                              const int n, const work *e, const block *b, ptrdiff_t row)
{
    const ptrdiff_t ldc = e->ldc, ldr = e->ldr;
    const int32_t *minus_zero = e->minus_zero + b->row + row;
    const float *scale = e->scale_a + b->row + row;
    for (int j = 0; j < wide; j += 2) {
        const columns l = b->columns[j], r = b->columns[j + 1];
        const int32_t *sums = e->sums + (row * wide + j) * 16;
        const float *residual = add ? b->residual + row * ldr + j * 16 : NULL;
        float *out = b->c + row * ldc + j * 16;
        FB_UNROLL
        for (int i = 0; i < n; i++, sums += wide * 16, out += ldc, residual += add ? ldr : 0) {
            const vi z = vi_set1(minus_zero[i]);
            const vi exact_l = _mm512_dpwssd_epi32(vi_load(sums), l.sums, z); /* sums - zero * sums of W */
            const vi exact_r = _mm512_dpwssd_epi32(vi_load(sums + 16), r.sums, z);
            vf x = v_act_s8(act, v_fma(vi_to_f32(exact_l), v_mul(v_set1(scale[i]), l.scales), l.bias));
            vf y = v_act_s8(act, v_fma(vi_to_f32(exact_r), v_mul(v_set1(scale[i]), r.scales), r.bias));
            if (add) {
                x = v_add(_mm512_maskz_loadu_ps(l.used, residual), x);
                y = v_add(_mm512_maskz_loadu_ps(r.used, residual + 16), y);
            }
            _mm512_mask_storeu_ps(out, l.used, x);
            _mm512_mask_storeu_ps(out + 16, r.used, y);
        }
    }
}

/* All of b from `row` on. */
enum { FEW_ROWS = 8 };
static inline __attribute__((always_inline)) void finish(const fb_act act, const int add, const int wide, const work *e,
                                                         const block *b, ptrdiff_t row)
{
    for (; row + FEW_ROWS <= b->rows; row += FEW_ROWS)
        finish_rows(act, add, wide, FEW_ROWS, e, b, row);
    for (; row < b->rows; row++)
        finish_rows(act, add, wide, 1, e, b, row);
}

/* A tile of sums passes from one block to the next: it is stored, and starts from zero again. tilezero would do, but on
 * Sapphire Rapids a product on a tile that it emptied waits for all products before it; a tile loaded does not. */
static const _Alignas(64) int32_t zeros[16];
#define FB_TURN_OVER(tile, to)                                                                                         \
    do {                                                                                                               \
        _tile_stored(tile, to, row_bytes);                                                                             \
        _tile_loadd(tile, zeros, 0);                                                                                   \
    } while (0)

/* The last block's, laid out as those of blocks before: 32-bit sums [rows][wide * 16]. */
static inline void store_tiles(const int wide, ptrdiff_t upper, void *sums)
{
    const ptrdiff_t row_bytes = wide * 64;
    char *const left = sums, *const lower_left = left + (wide == 2 ? upper * row_bytes : 2 * 64);
    _tile_stored(0, left, row_bytes);
    _tile_stored(1, left + 64, row_bytes);
    _tile_stored(2, lower_left, row_bytes);
    _tile_stored(3, lower_left + 64, row_bytes);
}

/* A function for each kind of epilogue from run(act, add, wide, ...), which is inlined, and one that chooses among them. */
#define FB_RUN(run, kind, act, add, type_a, type_w, work)                                                              \
    static void run##_##kind(ptrdiff_t m, ptrdiff_t n, const type_a *a, const type_w *w, const fb_epilogue *epilogue,  \
                             float *c, work *e)                                                                        \
    {                                                                                                                  \
        if (e->rows > 16)                                                                                              \
            run(act, add, 2, m, n, a, w, epilogue, c, e);                                                              \
        else                                                                                                           \
            run(act, add, 4, m, n, a, w, epilogue, c, e);                                                              \
    }
#define FB_RUNS(run, type_a, type_w, work)                                                                             \
    FB_RUN(run, plain, FB_ACT_NONE, 0, type_a, type_w, work)                                                           \
    FB_RUN(run, add, FB_ACT_NONE, 1, type_a, type_w, work)                                                             \
    FB_RUN(run, gelu, FB_ACT_GELU, 0, type_a, type_w, work)                                                            \
    FB_RUN(run, any, epilogue->act, epilogue->residual != NULL, type_a, type_w, work)                                  \
    static void run##_chosen(ptrdiff_t m, ptrdiff_t n, const type_a *a, const type_w *w, const fb_epilogue *epilogue,  \
                             float *c, work *e)                                                                        \
    {                                                                                                                  \
        const int add = epilogue->residual != NULL;                                                                    \
        if (epilogue->act == FB_ACT_NONE)                                                                              \
            (add ? run##_add : run##_plain)(m, n, a, w, epilogue, c, e);                                               \
        else                                                                                                           \
            (epilogue->act == FB_ACT_GELU && !add ? run##_gelu : run##_any)(m, n, a, w, epilogue, c, e);               \
    }

/* 64 steps of k. Sums in tiles 0 1 over 2 3, A in 4 over 5, W in 6 7. A is loaded as a stream, past the L1 cache: it does not
 * come again before the next strips, while W and C do (M = 128, N = K = 768: 53 % of the rate of products instead of 45). */
static inline __attribute__((always_inline)) void multiply_2x2(const int first, ptrdiff_t strips, const uint8_t *a,
                                                               const int8_t *w, work *e)
{
    const ptrdiff_t lda = e->lda, row_bytes = 2 * 64;
    int32_t *const lower_sums = e->sums + e->upper * 32;
    _tile_stream_loadd(4, a, lda);
    _tile_loadd(6, w, 64);
    if (first)
        FB_TURN_OVER(0, e->sums);
    _tile_dpbusd(0, 4, 6);
    _tile_stream_loadd(5, a + e->upper * lda, lda);
    if (first)
        FB_TURN_OVER(2, lower_sums);
    _tile_dpbusd(2, 5, 6);
    if (strips > 1)
        _tile_loadd(7, w + e->strip_bytes, 64);
    if (first)
        FB_TURN_OVER(1, e->sums + 16);
    if (strips > 1)
        _tile_dpbusd(1, 4, 7);
    if (first)
        FB_TURN_OVER(3, lower_sums + 16);
    if (strips > 1)
        _tile_dpbusd(3, 5, 7);
}

/* 64 steps of k. Sums in tiles 0 1 2 3, A in 4, W in 5 6 7 5. */
static inline __attribute__((always_inline)) void multiply_1x4(const int first, ptrdiff_t strips, const uint8_t *a,
                                                               const int8_t *w, work *e)
{
    const ptrdiff_t strip_bytes = e->strip_bytes, row_bytes = 4 * 64;
    _tile_loadd(4, a, e->lda);
    _tile_loadd(5, w, 64);
    if (first)
        FB_TURN_OVER(0, e->sums);
    _tile_dpbusd(0, 4, 5);
    if (strips > 1)
        _tile_loadd(6, w + strip_bytes, 64);
    if (first)
        FB_TURN_OVER(1, e->sums + 16);
    if (strips > 1)
        _tile_dpbusd(1, 4, 6);
    if (strips > 2)
        _tile_loadd(7, w + 2 * strip_bytes, 64);
    if (first)
        FB_TURN_OVER(2, e->sums + 32);
    if (strips > 2)
        _tile_dpbusd(2, 4, 7);
    if (strips > 3)
        _tile_loadd(5, w + 3 * strip_bytes, 64);
    if (first)
        FB_TURN_OVER(3, e->sums + 48);
    if (strips > 3)
        _tile_dpbusd(3, 4, 5);
}

/* From so many bytes of k on, LONG_ROWS rows of an activation are finished after each step. With GELU and N = 4 K that takes, at
 * M = 32 to 128, 0.93 of the time for K = 384 and 512 and 0.92 to 1.00 for K = 768, with 2 or 4 rows 0.94 to 1.03; for K = 256
 * it would take more than 1 (2026-11). */
enum { LONG_K = 384, LONG_ROWS = 3 };

/* The sums of a block of so many strips are made in the tiles, from the last step of k on where `back`; those of the block
 * before are finished, `few` rows after each step. few, act, add and wide are constant. */
static inline __attribute__((always_inline)) void multiply(const int few, const fb_act act, const int add,
                                                           const int wide, ptrdiff_t strips, const int back,
                                                           const uint8_t *a, const int8_t *w, work *e,
                                                           const block *before)
{
    ptrdiff_t row = 0;
    for (ptrdiff_t p = 0; p < e->k; p += FB_K8) {
        const ptrdiff_t at = back ? e->k - FB_K8 - p : p;
        if (wide == 2)
            p == 0 ? multiply_2x2(1, strips, a + at, w + at * 16, e) : multiply_2x2(0, strips, a + at, w + at * 16, e);
        else
            p == 0 ? multiply_1x4(1, strips, a + at, w + at * 16, e) : multiply_1x4(0, strips, a + at, w + at * 16, e);
        if (few > 0 && p > 0 && row + few <= before->rows) {
            finish_rows(act, add, wide, few, e, before, row);
            row += few;
        }
        const int8_t *end = e->ahead_share < e->ahead_end - e->ahead ? e->ahead + e->ahead_share : e->ahead_end;
        for (; e->ahead < end; e->ahead += 64)
            __builtin_prefetch(e->ahead, 0, 2);
    }
    finish(act, add, wide, e, before, row);
}

/* `wide` strips at a time, 2 with 2x2 tiles and 4 with 1x4, down all rows: W is read once, A once for each of these. */
static inline __attribute__((always_inline)) void run(const fb_act act, const int add, const int wide, ptrdiff_t m,
                                                      ptrdiff_t n, const uint8_t *a, const int8_t *packed,
                                                      const fb_epilogue *epilogue, float *c, work *e)
{
    const ptrdiff_t groups = (m + e->rows - 1) / e->rows, strips = (n + 15) / 16, steps = e->k > 0 ? e->k / FB_K8 : 1;
    columns columns[2][4]; /* of these strips, and of those before */
    block before = {.rows = 0};
    for (ptrdiff_t s = 0, turn = 0; s < strips; s += wide, turn = !turn) {
        const ptrdiff_t left = strips - s, nv = left < wide ? left : wide, column = s * 16;
        const int8_t *strip = packed + s * e->strip_bytes;
        read_columns(wide, nv, n - column, strip + e->k * 16, e->strip_bytes,
                     epilogue->bias ? epilogue->bias + column : NULL, columns[turn]);
        e->ahead = strip + nv * e->strip_bytes;
        e->ahead_end = e->ahead + (m < AHEAD_ROWS ? 0 : (left - nv < wide ? left - nv : wide) * e->strip_bytes);
        e->ahead_share = ((e->ahead_end - e->ahead) / 64 + groups * steps - 1) / (groups * steps) * 64;
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t row = g < groups - 1 ? g * e->rows : m - e->rows;
            if (act == FB_ACT_NONE) /* a loop for each: one that asks for k at every step gains nothing */
                multiply(FEW_ROWS, act, add, wide, nv, g & 1, a + row * e->lda, strip, e, &before);
            else if (wide == 2 && e->k >= LONG_K)
                multiply(LONG_ROWS, act, add, wide, nv, g & 1, a + row * e->lda, strip, e, &before);
            else
                multiply(0, act, add, wide, nv, g & 1, a + row * e->lda, strip, e, &before);
            before = (block){.rows = e->rows,
                             .row = row,
                             .columns = columns[turn],
                             .residual = add ? epilogue->residual + row * e->ldr + column : NULL,
                             .c = c + row * e->ldc + column};
        }
    }
    store_tiles(wide, e->upper, e->sums);
    _tile_release(); /* else the OS saves 8 KB of tiles whenever it switches away from this thread */
    finish(act, add, wide, e, &before, 0);
}

FB_RUNS(run, uint8_t, int8_t, work)

/* Up to ROWS_MOST rows. */
static void gemm_s8_tiles(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
                          const int32_t *zero, const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc)
{
    const ptrdiff_t groups = (m + 31) / 32, rows = (m + groups - 1) / groups;
    work e;
    e.rows = rows;
    e.upper = (rows + 1) / 2;
    e.k = fb_k8(k);
    e.lda = lda;
    e.strip_bytes = s8_strip_bytes(k);
    e.ldc = ldc;
    e.ldr = epilogue->ldr;
    e.scale_a = scale_a;
    if (k == 0)
        memset(e.sums, 0, sizeof e.sums);
    for (ptrdiff_t i = 0; i < m; i += 16) {
        const vi z = vi_sub(vi_set1(0), _mm512_maskz_loadu_epi32(v_mask(m - i < 16 ? m - i : 16), zero + i));
        vi_store(e.minus_zero + i, _mm512_mask_blend_epi16(0xaaaaaaaa, z, vi_shl(z, 23)));
    }
    configure(rows, e.upper);
    run_chosen(m, n, a, packed, epilogue, c, &e);
}

enum { FEW_FOR_TILES = 8 };
static void gemm_s8_any(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
                        const int32_t *zero, const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc)
{
    if (m <= FEW_FOR_TILES || n <= 0) {
        gemm_s8_amx(m, n, k, a, lda, scale_a, zero, packed, epilogue, c, ldc);
        return;
    }
    const ptrdiff_t parts = (m + ROWS_MOST - 1) / ROWS_MOST;
    for (ptrdiff_t p = 0; p < parts; p++) {
        const ptrdiff_t i = m * p / parts, rows = m * (p + 1) / parts - i;
        fb_epilogue part = *epilogue;
        part.residual = part.residual ? part.residual + i * part.ldr : NULL;
        gemm_s8_tiles(rows, n, k, a + i * lda, lda, scale_a + i, zero + i, packed, &part, c + i * ldc, ldc);
    }
}

static const fb_gemm_s8 gemm_s8 = {
    "gemm_s8_32x32_amx", s8_packed_bytes_amx, s8_pack_amx, s8_pack_f32_amx, gemm_s8_any, 2e7, 0};

#include "gemm_split.inc.h"

static const fb_gemm_split gemm_split = {"gemm_split_32x32_amx", FB_CPU_AMXBF16, split_packed_bytes, split_pack,
                                         gemm_split_amx};
#endif

const fb_kernels fb_kernels_amx = {
    .isa = "amx",
    .needs = FB_CPU_AVX512F | FB_CPU_AVX512BW | FB_CPU_AVX512DQ | FB_CPU_AVX512VL | FB_CPU_AVX512VNNI | FB_CPU_FMA |
             FB_CPU_F16C | FB_CPU_AMXTILE | FB_CPU_AMXINT8,
#ifdef __x86_64__
    .gemm_s8 = &gemm_s8,
    .gemm_split = &gemm_split,
#endif
};

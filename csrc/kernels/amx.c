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
 * ones: a product takes 16 cycles and is one instruction. While tiles are multiplied, 512-bit arithmetic runs at half its
 * rate (they share port 5), so that an activation, which has more of it than the products take, is better done after them
 * (1 GELU block of K = 384: 967 cycles instead of 1124; Sapphire Rapids class Xeon, 2026-11).
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

/* A block of C and what goes into it. */
typedef struct block {
    ptrdiff_t rows, strips;
    ptrdiff_t upper; /* rows of the upper tiles where it has 2x2 */
    ptrdiff_t k;     /* bytes, a multiple of FB_K8 */
    const uint8_t *a;
    ptrdiff_t lda;
    const float *scale_a;
    const int32_t *zero;
    const int8_t *strip; /* the first of its strips of W */
    ptrdiff_t strip_bytes;
    ptrdiff_t last_columns; /* of its last strip: 1 .. 16 */
    const float *bias, *residual;
    ptrdiff_t ldr;
    float *c;
    ptrdiff_t ldc;
} block;

/* What turns the sums of 16 columns into float32. */
typedef struct columns {
    vi sums; /* of W, as pairs of int16: the low seven bits, and the rest */
    vf scales, bias;
    __mmask16 used;
} columns;

/* What is done while the tiles of a block are multiplied, a share with every 64 steps of k: the block before is finished,
 * packed W is fetched. */
typedef struct errand {
    _Alignas(64) int32_t sums[32 * 32]; /* of the block before: [rows][wide * 16] */
    int32_t minus_zero[32];             /* [rows] -zero and -128 zero as int16 */
    columns columns[4];
    block before;
    fb_act act;
    void (*finish)(struct errand *e);
    ptrdiff_t wide;     /* strips of a block that is full: 2 with 2x2 tiles, 4 with 1x4 */
    ptrdiff_t finished; /* rows of the block before */
    ptrdiff_t share;    /* calls of finish; what is left is done after the last step */
    const int8_t *ahead, *ahead_end;
    ptrdiff_t ahead_share; /* bytes, a multiple of 64 */
} errand;

/* b is the block to finish from now on. */
static void take_over(errand *e, const block *b)
{
    e->before = *b;
    e->finished = 0;
    for (ptrdiff_t i = 0; i < b->rows; i++) {
        const unsigned zero = (unsigned)-b->zero[i];
        e->minus_zero[i] = (int32_t)(zero << 23 | (zero & 0xffff));
    }
    const int8_t *after = b->strip + b->k * 16;
    for (ptrdiff_t j = 0; j < b->strips; j++, after += b->strip_bytes) {
        columns *c = &e->columns[j];
        const vi sums = vi_load((const int32_t *)after), low = _mm512_and_si512(sums, vi_set1(127));
        c->sums = _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(sums, 9));
        c->scales = v_load((const float *)(after + 64));
        c->used = v_mask(j == b->strips - 1 ? b->last_columns : 16);
        c->bias = b->bias ? _mm512_maskz_loadu_ps(c->used, b->bias + j * 16) : v_set1(0.0f);
    }
    for (ptrdiff_t j = b->strips; j < e->wide; j++)
        e->columns[j].used = 0;
}

/* n rows of the block before, all but e constant. Straight code out of registers: tiles wait where the window of
 * instructions in flight is full, or a branch was mispredicted. C two strips on is fetched into the L2 cache: for wide
 * layers it is not there (N = 3072: 44 % of the peak instead of 42). */
static inline __attribute__((always_inline)) void finish_rows(const fb_act act, const int add, const int wide,
                                                              const int n, const errand *e)
{
    const ptrdiff_t row = e->finished, ldc = e->before.ldc, ldr = e->before.ldr;
    const int32_t *minus_zero = e->minus_zero + row;
    const float *scale = e->before.scale_a + row;
    for (int j = 0; j < wide; j += 2) {
        const columns l = e->columns[j], r = e->columns[j + 1];
        const int32_t *sums = e->sums + (row * wide + j) * 16;
        const float *residual = add ? e->before.residual + row * ldr + j * 16 : NULL;
        float *out = e->before.c + row * ldc + j * 16;
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
            __builtin_prefetch(out + wide * 16, 1, 2);
            __builtin_prefetch(out + wide * 16 + 16, 1, 2);
            _mm512_mask_storeu_ps(out, l.used, x);
            _mm512_mask_storeu_ps(out + 16, r.used, y);
        }
    }
}

/* The next FEW_ROWS rows, or all that are left where these are fewer. */
enum { FEW_ROWS = 8 };
static inline __attribute__((always_inline)) void finish(const fb_act act, const int add, const int wide, errand *e)
{
    if (e->before.rows - e->finished >= FEW_ROWS) {
        finish_rows(act, add, wide, FEW_ROWS, e);
        e->finished += FEW_ROWS;
    } else {
        for (; e->finished < e->before.rows; e->finished++)
            finish_rows(act, add, wide, 1, e);
    }
}

#define FB_FINISH(name, act, add)                                                                                      \
    static void name##_2(errand *e) { finish(act, add, 2, e); }                                                        \
    static void name##_4(errand *e) { finish(act, add, 4, e); }
FB_FINISH(finish_plain, FB_ACT_NONE, 0)
FB_FINISH(finish_add, FB_ACT_NONE, 1)
FB_FINISH(finish_gelu, FB_ACT_GELU, 0)
FB_FINISH(finish_any, e->act, e->before.residual != NULL)
#undef FB_FINISH

static void (*choose_finish(const fb_epilogue *epilogue, int wide))(errand *e)
{
    const int add = epilogue->residual != NULL;
    if (epilogue->act == FB_ACT_NONE)
        return add ? (wide == 2 ? finish_add_2 : finish_add_4) : (wide == 2 ? finish_plain_2 : finish_plain_4);
    if (epilogue->act == FB_ACT_GELU && !add)
        return wide == 2 ? finish_gelu_2 : finish_gelu_4;
    return wide == 2 ? finish_any_2 : finish_any_4;
}

static inline void run_errand(errand *e)
{
    for (ptrdiff_t i = 0; i < e->share && e->finished < e->before.rows; i++)
        e->finish(e);
    const int8_t *end = e->ahead_share < e->ahead_end - e->ahead ? e->ahead + e->ahead_share : e->ahead_end;
    for (; e->ahead < end; e->ahead += 64)
        __builtin_prefetch(e->ahead, 0, 2);
}

/* A tile of sums passes from one block to the next: it is stored, and starts from zero again. tilezero would do, but on
 * Sapphire Rapids a product on a tile that it emptied waits for all products before it; a tile loaded does not. */
static const _Alignas(64) int32_t zeros[16];
#define FB_TURN_OVER(tile, to)                                                                                         \
    do {                                                                                                               \
        _tile_stored(tile, to, row_bytes);                                                                             \
        _tile_loadd(tile, zeros, 0);                                                                                   \
    } while (0)

/* 64 steps of k. Sums in tiles 0 1 over 2 3, A in 4 over 5, W in 6 7. A is loaded as a stream, past the L1 cache: it does not
 * come again before the next strips, while W and C do (M = 128, K = 768: N = 768 63 % of the peak instead of 49, N = 3072
 * 44 instead of 36). */
static inline __attribute__((always_inline)) void multiply_2x2(const int first, const block *b, const uint8_t *a,
                                                               const int8_t *w, errand *e)
{
    const ptrdiff_t lda = b->lda, row_bytes = 2 * 64;
    int32_t *const lower_sums = e->sums + e->before.upper * 32;
    _tile_stream_loadd(4, a, lda);
    _tile_loadd(6, w, 64);
    if (first)
        FB_TURN_OVER(0, e->sums);
    _tile_dpbusd(0, 4, 6);
    _tile_stream_loadd(5, a + b->upper * lda, lda);
    if (first)
        FB_TURN_OVER(2, lower_sums);
    _tile_dpbusd(2, 5, 6);
    if (b->strips > 1)
        _tile_loadd(7, w + b->strip_bytes, 64);
    if (first)
        FB_TURN_OVER(1, e->sums + 16);
    if (b->strips > 1)
        _tile_dpbusd(1, 4, 7);
    if (first)
        FB_TURN_OVER(3, lower_sums + 16);
    if (b->strips > 1)
        _tile_dpbusd(3, 5, 7);
}

/* 64 steps of k. Sums in tiles 0 1 2 3, A in 4, W in 5 6 7 5. */
static inline __attribute__((always_inline)) void multiply_1x4(const int first, const block *b, const uint8_t *a,
                                                               const int8_t *w, errand *e)
{
    const ptrdiff_t strip_bytes = b->strip_bytes, row_bytes = 4 * 64;
    _tile_loadd(4, a, b->lda);
    _tile_loadd(5, w, 64);
    if (first)
        FB_TURN_OVER(0, e->sums);
    _tile_dpbusd(0, 4, 5);
    if (b->strips > 1)
        _tile_loadd(6, w + strip_bytes, 64);
    if (first)
        FB_TURN_OVER(1, e->sums + 16);
    if (b->strips > 1)
        _tile_dpbusd(1, 4, 6);
    if (b->strips > 2)
        _tile_loadd(7, w + 2 * strip_bytes, 64);
    if (first)
        FB_TURN_OVER(2, e->sums + 32);
    if (b->strips > 2)
        _tile_dpbusd(2, 4, 7);
    if (b->strips > 3)
        _tile_loadd(5, w + 3 * strip_bytes, 64);
    if (first)
        FB_TURN_OVER(3, e->sums + 48);
    if (b->strips > 3)
        _tile_dpbusd(3, 4, 5);
}

/* The sums of b are made in the tiles, and those of the block before finished. */
static inline __attribute__((always_inline)) void multiply(const int wide, const block *b, errand *e)
{
    for (ptrdiff_t p = 0; p < b->k; p += FB_K8) {
        const uint8_t *a = b->a + p;
        const int8_t *w = b->strip + p * 16;
        if (wide == 2)
            p == 0 ? multiply_2x2(1, b, a, w, e) : multiply_2x2(0, b, a, w, e);
        else
            p == 0 ? multiply_1x4(1, b, a, w, e) : multiply_1x4(0, b, a, w, e);
        run_errand(e);
    }
    while (e->finished < e->before.rows)
        e->finish(e);
}

static void gemm_s8_tiles(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
                          const int32_t *zero, const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc)
{
    if (m <= 0 || n <= 0)
        return;
    const ptrdiff_t groups = (m + 31) / 32, rows = (m + groups - 1) / groups, upper = (rows + 1) / 2;
    const ptrdiff_t strips = (n + 15) / 16, wide = rows > 16 ? 2 : 4, strip_bytes = s8_strip_bytes(k);
    const ptrdiff_t steps = k > 0 ? fb_k8(k) / FB_K8 : 1;
    errand e;
    if (k == 0)
        memset(e.sums, 0, sizeof e.sums);
    e.before.rows = e.before.upper = e.finished = 0;
    e.act = epilogue->act;
    e.finish = choose_finish(epilogue, (int)wide);
    e.wide = wide;
    e.share = e.act == FB_ACT_NONE ? ((rows + FEW_ROWS - 1) / FEW_ROWS + steps - 1) / steps : 0;
    configure(rows, upper);
    for (ptrdiff_t s = 0; s < strips; s += wide) {
        const ptrdiff_t left = strips - s, nv = left < wide ? left : wide, column = s * 16;
        const int8_t *strip = (const int8_t *)packed + s * strip_bytes;
        e.ahead = strip + nv * strip_bytes;
        e.ahead_end = e.ahead + (m < AHEAD_ROWS ? 0 : (left - nv < wide ? left - nv : wide) * strip_bytes);
        e.ahead_share = ((e.ahead_end - e.ahead) / 64 + groups * steps - 1) / (groups * steps) * 64;
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t i = g < groups - 1 ? g * rows : m - rows;
            const block b = {
                .rows = rows,
                .strips = nv,
                .upper = upper,
                .k = fb_k8(k),
                .a = a + i * lda,
                .lda = lda,
                .scale_a = scale_a + i,
                .zero = zero + i,
                .strip = strip,
                .strip_bytes = strip_bytes,
                .last_columns = nv == left ? n - column - (nv - 1) * 16 : 16,
                .bias = epilogue->bias ? epilogue->bias + column : NULL,
                .residual = epilogue->residual ? epilogue->residual + i * epilogue->ldr + column : NULL,
                .ldr = epilogue->ldr,
                .c = c + i * ldc + column,
                .ldc = ldc,
            };
            if (wide == 2)
                multiply(2, &b, &e);
            else
                multiply(4, &b, &e);
            take_over(&e, &b);
        }
    }
    const ptrdiff_t row_bytes = wide * 64;
    int32_t *const lower_left = e.sums + (wide == 2 ? upper * 32 : 32);
    _tile_stored(0, e.sums, row_bytes);
    _tile_stored(1, e.sums + 16, row_bytes);
    _tile_stored(2, lower_left, row_bytes);
    _tile_stored(3, lower_left + 16, row_bytes);
    _tile_release(); /* else the OS saves 8 KB of tiles whenever it switches away from this thread */
    while (e.finished < rows)
        e.finish(&e);
}

enum { FEW_FOR_TILES = 8 };
static void gemm_s8_any(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
                        const int32_t *zero, const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc)
{
    (m <= FEW_FOR_TILES ? gemm_s8_amx : gemm_s8_tiles)(m, n, k, a, lda, scale_a, zero, packed, epilogue, c, ldc);
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

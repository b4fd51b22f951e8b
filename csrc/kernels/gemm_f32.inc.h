/* gemm_f32.inc.h: the float32 GEMM, written once over the 16-lane vector of simd_*.h.
 *
 * A kernel file includes its simd_*.h, activations.inc.h and epilogue.inc.h, then defines
 *   FB_GEMM_TILES(X)   the register tiles it can hold, X(rows, strips) each, for every rows 1..FB_GEMM_MR and every
 *                      strips 1..fb_gemm_strips[rows]
 *   FB_GEMM_MR         most rows of a tile
 *   fb_gemm_strips     [FB_GEMM_MR + 1] strips of 16 columns that a tile of so many rows takes
 *   FB_GEMM_TURN       where it is defined: groups of strips of a turn in products of FB_TURN_ROWS rows and more; else 1
 *
 * Packed W: strips of 16 rows of W (columns of C), k-major, so that one step of k is 16 consecutive floats:
 *     strip 0: p=0: w0 .. w15 | p=1: w0 .. w15 | ...     strip 1: p=0: w16 .. w31 | ...     (last padded with 0)
 *
 * Loops, outermost first: turns of some groups of strips | panels of FB_PANEL along k | groups of rows | groups of strips of
 * the turn | chains of FB_CHAIN. In a turn of one group its panel stays in the L1 cache while the rows of A pass by, from the
 * L2 cache, once for each group. In a longer turn the rows stay, and the panels come from the L2 cache: for cores whose L2
 * cache does not hold A beside all else. C holds the sum of the panels so far. Rows are divided evenly (13 = 7 + 6, not
 * 12 + 1), strips too.
 */
#include "unroll.h"

/* How a row of A is held: va_load(p, steps) takes the next steps of k, FB_A_STEPS or 1; va_fma(a, step, w, acc) is
 * fma(that step for all lanes, w, acc). A simd_*.h whose multiply-add can pick one lane brings its own; on such cores, of
 * ARM, prefetching in the loop would cost more issue slots than there are (7 % of the loop by LLVM's neoverse-n1). */
#ifndef FB_A_STEPS
#define FB_A_STEPS 1
#define FB_FETCHES(mr) ((mr) > FB_GEMM_MR / 2) /* fewer rows have no load to spare */
typedef vf va;
static inline va va_load(const float *p, int steps) { return (void)steps, v_set1(*p); }
static inline vf va_fma(va a, int step, vf w, vf acc) { return (void)step, v_fma(a, w, acc); }
#endif

/* Steps of k in a panel. On a Sapphire Rapids class Xeon 128 and 192 are equal, 256 loses 2 to 5 % where the weights come
 * from the L3 cache; chains of 64 inside it are as fast as one of 128 (2026-11). */
enum { FB_PANEL = 2 * FB_CHAIN };

/* Weights come from far: the first FB_AHEAD steps ahead of their use, for the hardware's own prefetch stops at every 4 KB,
 * and the strips of the next panel one with each of the first groups of rows. One line to a step of k: a burst of them
 * would fill the line buffers and stop the loop. A group of rows that is alone waits for its weights, and fetches nothing for
 * others: from nearer it is 1.2 times as fast where they come from memory (8 rows, avx512, Zen 4; 2026-11). Groups
 * between the first and the last, whose fetches run on into what comes next, find all in the L1 cache and fetch nothing.
 * In longer turns no tile fetches, for the hardware brings panels from the L2 cache as well (with fetches 0.91 to 0.97 times
 * as fast); each group of rows asks for its share of the next panels, a few lines before each tile, where the first group
 * alone would wait for all of them (1.01 to 1.06 times as fast; all avx2, Zen 3, 2026-11). */
enum { FB_AHEAD = 32, FB_AHEAD_ALONE = 12 };
typedef enum { FB_FETCH_NONE, FB_FETCH_NEXT, FB_FETCH_ALONE, FB_FETCH_KINDS } fb_fetch;
#ifndef FB_FETCHES
#define FB_FETCHES(mr) 0
#endif
/* Fewer rows wait for weights from afar, which come fastest in the order in which they lie: with turns of 8 MiniLM takes
 * 1.09 times as long for 8 and 16 tokens, 1.0 to 1.03 for 32 and 64, 0.97 for 128 (avx2, Zen 3; 2026-11). */
enum { FB_TURN_ROWS = 96 };
#ifndef FB_GEMM_TURN
#define FB_GEMM_TURN 1
#endif

/* One tile of C and what goes into it. */
typedef struct fb_tile_args {
    ptrdiff_t k;    /* steps of this panel */
    const float *a; /* [mr][k], rows lda apart */
    ptrdiff_t lda;
    const float *strip;           /* first step of the first strip */
    ptrdiff_t strip_floats;       /* from one strip to the next */
    ptrdiff_t ahead;              /* floats from strip to memory to prefetch, as much as one strip of this panel */
    int first_panel;              /* C is written; else added to */
    const float *bias, *residual; /* added when not NULL: with the last panel */
    ptrdiff_t ldr;
    ptrdiff_t last_columns; /* of the last strip: 1 .. 16 */
    float *c;
    ptrdiff_t ldc;
} fb_tile_args;

typedef void fb_tile(const fb_tile_args *t);

/* acc += the next steps of k, one after the other, in ascending order. Instructions that are no multiply-adds are few, for
 * another program may share the core and take issue slots: with a turn of the loop for each step and prefetches in every
 * tile, 8 x 32 tokens of BERT-Mini on avx2 took 1.09 times as long in busy moments, 1.01 times in others (Zen 3, 2026-11). */
static inline __attribute__((always_inline)) void fb_steps(const int mr, const int nv, const fb_fetch fetch,
                                                           const int steps, const float *a, ptrdiff_t lda,
                                                           const float *strip, ptrdiff_t strip_floats, ptrdiff_t ahead,
                                                           vf acc[FB_GEMM_MR][8])
{
    va x[FB_GEMM_MR];
    FB_UNROLL
    for (int s = 0; s < steps; s++) {
        if (fetch == FB_FETCH_NEXT)
            __builtin_prefetch(strip + s * 16 + ahead, 0, 2);
        if (fetch != FB_FETCH_NONE) {
            const float *w = strip + (s + (fetch == FB_FETCH_ALONE ? FB_AHEAD_ALONE : FB_AHEAD)) * 16;
            FB_UNROLL
            for (int j = 0; j < nv; j++)
                __builtin_prefetch(w + j * strip_floats);
        }
        vf w[8];
        FB_UNROLL
        for (int j = 0; j < nv; j++)
            w[j] = v_load(strip + j * strip_floats + s * 16);
        FB_UNROLL
        for (int i = 0; i < mr; i++) {
            if (s == 0)
                x[i] = va_load(a + i * lda, steps);
            FB_UNROLL
            for (int j = 0; j < nv; j++)
                acc[i][j] = va_fma(x[i], s, w[j], acc[i][j]);
        }
    }
}

static inline __attribute__((always_inline)) void add_rows(const int mr, const int nv, vf acc[FB_GEMM_MR][8],
                                                           const float *x, ptrdiff_t ldx, ptrdiff_t last_columns)
{
    FB_UNROLL
    for (int i = 0; i < mr; i++)
        FB_UNROLL
    for (int j = 0; j < nv; j++)
        acc[i][j] = v_add(load_columns(x + i * ldx + j * 16, j == nv - 1 ? last_columns : 16), acc[i][j]);
}

static inline __attribute__((always_inline)) void finish(const int mr, const int nv, vf acc[FB_GEMM_MR][8],
                                                         const fb_tile_args *t, ptrdiff_t last_columns)
{
    float *const c = t->c;
    const ptrdiff_t ldc = t->ldc;
    if (t->bias)
        add_rows(mr, nv, acc, t->bias, 0, last_columns);
    if (t->residual)
        add_rows(mr, nv, acc, t->residual, t->ldr, last_columns);
    FB_UNROLL
    for (int i = 0; i < mr; i++)
        FB_UNROLL
    for (int j = 0; j < nv; j++)
        store_columns(c + i * ldc + j * 16, acc[i][j], j == nv - 1 ? last_columns : 16);
}

/* C = residual + act(C) for a finished tile of m rows and n columns, while it is in the L1 cache. */
static inline __attribute__((always_inline)) void activate_columns(const fb_act act, ptrdiff_t columns,
                                                                   const float *residual, float *c)
{
    const vf x = v_act(act, load_columns(c, columns));
    store_columns(c, residual ? v_add(load_columns(residual, columns), x) : x, columns);
}
static inline __attribute__((always_inline)) void
activate_as(const fb_act act, ptrdiff_t m, ptrdiff_t n, const float *residual, ptrdiff_t ldr, float *c, ptrdiff_t ldc)
{
    const ptrdiff_t body = n - n % 16;
    for (ptrdiff_t i = 0; i < m; i++, c += ldc, residual += residual ? ldr : 0) {
        for (ptrdiff_t j = 0; j < body; j += 16)
            activate_columns(act, 16, residual ? residual + j : NULL, c + j);
        if (body < n)
            activate_columns(act, n - body, residual ? residual + body : NULL, c + body);
    }
}
static __attribute__((noinline)) void activate(fb_act act, ptrdiff_t m, ptrdiff_t n, const float *residual,
                                               ptrdiff_t ldr, float *c, ptrdiff_t ldc)
{
    switch (act) { /* a loop of its own for each: no branch in it, and constants in registers */
    case FB_ACT_NONE: break;
    case FB_ACT_GELU: activate_as(FB_ACT_GELU, m, n, residual, ldr, c, ldc); break;
    case FB_ACT_GELU_TANH: activate_as(FB_ACT_GELU_TANH, m, n, residual, ldr, c, ldc); break;
    case FB_ACT_RELU: activate_as(FB_ACT_RELU, m, n, residual, ldr, c, ldc); break;
    case FB_ACT_SILU: activate_as(FB_ACT_SILU, m, n, residual, ldr, c, ldc); break;
    case FB_ACT_TANH: activate_as(FB_ACT_TANH, m, n, residual, ldr, c, ldc); break;
    }
}

/* mr rows by nv strips over one panel. mr and nv are constants at each call, so acc stays in registers; between two chains
 * the sum waits in memory, aligned. */
static inline __attribute__((always_inline)) void fb_tile_any(const int mr, const int nv, const fb_fetch fetch,
                                                              const fb_tile_args *t)
{
    const ptrdiff_t k = t->k, lda = t->lda, strip_floats = t->strip_floats, ahead = t->ahead;
    const float *a = t->a, *strip = t->strip;
    vf acc[FB_GEMM_MR][8];
    _Alignas(64) float sums[FB_GEMM_MR][8 * 16];
    const float *before = t->first_panel ? NULL : t->c;
    ptrdiff_t ldb = t->ldc;
    ask_for_c(mr, nv, t->c, t->ldc);
    for (ptrdiff_t p = 0;;) {
        const ptrdiff_t end = k - p < FB_CHAIN ? k : p + FB_CHAIN;
        FB_UNROLL
        for (int i = 0; i < mr; i++)
            FB_UNROLL
        for (int j = 0; j < nv; j++)
            acc[i][j] = v_set1(0.0f);
#if FB_A_STEPS > 1
        for (; p + FB_A_STEPS <= end; p += FB_A_STEPS)
            fb_steps(mr, nv, fetch, FB_A_STEPS, a + p, lda, strip + p * 16, strip_floats, ahead, acc);
#else
        FB_FOUR_A_TURN
#endif
        for (; p < end; p++)
            fb_steps(mr, nv, fetch, 1, a + p, lda, strip + p * 16, strip_floats, ahead, acc);
        if (before)
            add_rows(mr, nv, acc, before, ldb, t->last_columns);
        if (p == k)
            break;
        FB_UNROLL
        for (int i = 0; i < mr; i++)
            FB_UNROLL
        for (int j = 0; j < nv; j++)
            v_store(sums[i] + j * 16, acc[i][j]);
        before = sums[0];
        ldb = 8 * 16;
    }
    if (t->last_columns == 16)
        finish(mr, nv, acc, t, 16);
    else
        finish(mr, nv, acc, t, t->last_columns);
}

#define FB_TILE(mr, nv)                                                                                                \
    static void tile_##mr##x##nv(const fb_tile_args *t) { fb_tile_any(mr, nv, FB_FETCH_NONE, t); }                     \
    static void first_##mr##x##nv(const fb_tile_args *t) { fb_tile_any(mr, nv, FB_FETCH_NEXT, t); }                    \
    static void alone_##mr##x##nv(const fb_tile_args *t) { fb_tile_any(mr, nv, FB_FETCH_ALONE, t); }
FB_GEMM_TILES(FB_TILE)
#undef FB_TILE

#define FB_TILE(mr, nv)                                                                                                \
    [mr][nv] = {tile_##mr##x##nv, FB_FETCHES(mr) ? first_##mr##x##nv : tile_##mr##x##nv,                               \
                FB_FETCHES(mr) ? alone_##mr##x##nv : tile_##mr##x##nv},
static fb_tile *const tiles[FB_GEMM_MR + 1][8 + 1][FB_FETCH_KINDS] = {FB_GEMM_TILES(FB_TILE)}; /* [rows][strips] */
#undef FB_TILE

static size_t FB_ISA_NAME(packed_bytes)(ptrdiff_t n, ptrdiff_t k)
{
    return (size_t)((n + 15) / 16) * 16 * (size_t)k * sizeof(float);
}

static void FB_ISA_NAME(pack)(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k,
                              void *packed)
{
    float *out = packed;
    for (ptrdiff_t j = 0; j < n; j += 16, w += 16 * stride_n, out += k * 16)
        strip_of(n - j < 16 ? n - j : 16, k, w, stride_n, stride_k, out);
}

/* Steps first .. end of nv strips of k steps, to the L2 cache. */
static inline void ask_for_steps(ptrdiff_t first, ptrdiff_t end, ptrdiff_t nv, const float *strip, ptrdiff_t k)
{
    for (ptrdiff_t j = 0; j < nv; j++)
        for (ptrdiff_t p = first; p < end; p++)
            __builtin_prefetch(strip + (j * k + p) * 16, 0, 2);
}

static void FB_ISA_NAME(gemm_f32)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda,
                                  const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc)
{
    if (m <= 0 || n <= 0)
        return;
    const float *w = packed;
    const int acts = epilogue->act != FB_ACT_NONE;
    const ptrdiff_t row_groups = (m + FB_GEMM_MR - 1) / FB_GEMM_MR;
    const parts of_rows = parts_of(m, row_groups);
    const ptrdiff_t strips = (n + 15) / 16, wide = fb_gemm_strips[part_size(of_rows, 0)];
    const ptrdiff_t strip_groups = (strips + wide - 1) / wide;
    const parts of_strips = parts_of(strips, strip_groups);
    const ptrdiff_t longest = m < FB_TURN_ROWS ? 1 : FB_GEMM_TURN;
    fb_tile_args t = {.lda = lda, .strip_floats = k * 16, .ldr = epilogue->ldr, .ldc = ldc};
    for (ptrdiff_t first = 0, turn; first < strip_groups; first += turn) {
        ptrdiff_t p = 0, starts[2 * FB_GEMM_TURN + 1]; /* first strips of the groups of this turn and the next */
        turn = strip_groups - first < longest ? strip_groups - first : longest;
        for (ptrdiff_t g = 0; g <= 2 * turn; g++)
            starts[g] = part_start(of_strips, first + g < strip_groups ? first + g : strip_groups);
        do {
            t.k = k - p < FB_PANEL ? k - p : FB_PANEL;
            t.first_panel = p == 0;
            const int last = p + t.k == k;
            const float *bias = last ? epilogue->bias : NULL, *residual = last ? epilogue->residual : NULL;
            for (ptrdiff_t h = 0, i = 0, mr; h < row_groups; h++, i += mr) {
                mr = part_size(of_rows, h);
                const ptrdiff_t share = longest > 1 ? t.k * h / row_groups : 0;
                const ptrdiff_t share_end = longest > 1 ? t.k * (h + 1) / row_groups : 0;
                const int fetches = longest == 1 && (h < wide || h + 1 == row_groups);
                const fb_fetch fetch = row_groups == 1 ? FB_FETCH_ALONE : fetches ? FB_FETCH_NEXT : FB_FETCH_NONE;
                t.a = a + i * lda + p;
                for (ptrdiff_t g = 0; g < turn; g++) {
                    const ptrdiff_t s = starts[g], s_end = starts[g + 1], nv = s_end - s;
                    const ptrdiff_t column = s * 16, columns = s_end * 16 <= n ? nv * 16 : n - column;
                    const ptrdiff_t next = last ? ((starts[g + turn] - s) * k - p) * 16 : t.k * 16;
                    const int more = row_groups > 1 && !(last && starts[g + turn] >= strips);
                    const float *add = residual ? residual + i * epilogue->ldr + column : NULL;
                    t.strip = w + (s * k + p) * 16;
                    t.ahead = more && h < nv ? next + h * k * 16 : 0;
                    t.bias = bias ? bias + column : NULL;
                    t.residual = acts ? NULL : add;
                    t.last_columns = columns - (nv - 1) * 16;
                    t.c = c + i * ldc + column;
                    if (longest > 1 && more)
                        ask_for_steps(share, share_end, nv, t.strip + next, k);
                    tiles[mr][nv][fetch](&t);
                    if (last && acts)
                        activate(epilogue->act, mr, columns, add, epilogue->ldr, t.c, ldc);
                }
            }
            p += t.k;
        } while (p < k);
    }
}

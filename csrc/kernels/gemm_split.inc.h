/* gemm_split.inc.h: gemm_split on AMX-BF16, included by amx.c after epilogue.inc.h and configure().
 *
 * W is split once, at load. Rows of A are split a panel of k at a time into scratch, before the panel is multiplied by all
 * of W. Tiles are shaped as for gemm_s8: 2x2 of them, or 1x4 up to 16 rows. A block's sums are added to C between the
 * products of the next block. With all operands in the L2 cache a 2x2 block of 256 steps takes 3091 cycles, of 128 steps
 * 1571; its products alone are 3072 and 1536 (Sapphire Rapids class Xeon, 2026-11).
 *
 * Packed W: strips of 16 columns, k padded with zeros to a multiple of 32; for every 32 steps p of k three tiles of 1 KB,
 * the first, second and third parts, each
 *     w0[p] w0[p+16] | w1[p] w1[p+16] | .. | w15[p] w15[p+16]     p + 1: ..     .. p + 15                     (bf16)
 * An element and the one 16 steps on are neighbours, in A too: that is cheaper to make than pairs of p and p + 1.
 *
 * Loops, outermost first: blocks of SPLIT_ROWS rows | panels of k | groups of strips | groups of rows.
 *
 * Not done: W in the four bytes of float32, first parts as tiles and the rest made from 16 more bits a panel at a time. It
 * reads a third less, but making the parts (0.29 cycles an element) did not overlap with products as hoped. 768 x 768: a
 * sixth faster at M = 8, 23 % slower at M = 128; 512 x 128 in the L2 cache: half as fast at M = 8 (Emerald Rapids, 2026-11).
 */
enum {
    SPLIT_STEP = 32,   /* of k, in a tile */
    SPLIT_TILE = 1024, /* bytes */
    SPLIT_PARTS = 3,
    SPLIT_STEPS = FB_SPLIT_PANEL / SPLIT_STEP,
    SPLIT_ROWS = 256,                                /* of A are held split */
    SPLIT_LDA = (SPLIT_STEPS * SPLIT_PARTS + 1) * 64 /* bytes; an odd number of lines meets all sets of the cache */
};
_Static_assert(SPLIT_ROWS *SPLIT_LDA <= FB_SPLIT_SCRATCH, "kernels.h promises that it is enough");

static inline ptrdiff_t split_strip_bytes(ptrdiff_t k)
{
    return (k + SPLIT_STEP - 1) / SPLIT_STEP * (SPLIT_PARTS * SPLIT_TILE);
}

static size_t split_packed_bytes(ptrdiff_t n, ptrdiff_t k)
{
    return (size_t)((n + 15) / 16) * (size_t)split_strip_bytes(k);
}

/* The nearest bf16, ties away from 0, as a float32. From 2^128 - 2^119 on an infinity; a NaN may become anything. */
static inline __m512 split_round(__m512 x)
{
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(-0x10000);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper));
}

/* The upper halves of x and y, in the lower and upper halves of 32 bits. */
static inline __m512i split_pair(__m512 x, __m512 y)
{
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(x), 16), upper = _mm512_set1_epi32(-0x10000);
    return _mm512_ternarylogic_epi32(low, _mm512_castps_si512(y), upper, 0xf8); /* low | y & upper */
}

/* The parts of 16 lanes and 16 more, part after part, `apart` bytes from one to the next. */
static inline void split_store(__m512 x, __m512 y, char *out, ptrdiff_t apart)
{
    for (int part = 0; part < SPLIT_PARTS; part++) {
        const __m512 rounded_x = split_round(x), rounded_y = split_round(y);
        _mm512_storeu_si512(out + part * apart, split_pair(rounded_x, rounded_y));
        x = v_sub(x, rounded_x);
        y = v_sub(y, rounded_y);
    }
}

/* Element 0 .. 15 of a row of so many elements, 0 for those beyond. */
static inline vf split_load(const float *p, ptrdiff_t elements)
{
    return elements >= 16 ? v_load(p) : elements > 0 ? v_load_n(p, elements, 0.0f) : v_set1(0.0f);
}

static void split_pack(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t ldw, void *packed)
{
    char *out = packed;
    for (ptrdiff_t j = 0; j < n; j += 16, w += 16 * ldw)
        for (ptrdiff_t p = 0; p < k; p += SPLIT_STEP, out += SPLIT_PARTS * SPLIT_TILE) {
            vf x[2][16];
            for (ptrdiff_t half = 0; half < 2; half++) {
                const ptrdiff_t at = p + 16 * half;
                for (ptrdiff_t i = 0; i < 16; i++)
                    x[half][i] = j + i < n && at < k ? split_load(w + i * ldw + at, k - at) : v_set1(0.0f);
                v_transpose(x[half]);
            }
            for (ptrdiff_t i = 0; i < 16; i++)
                split_store(x[0][i], x[1][i], out + i * 64, SPLIT_TILE);
        }
}

/* m rows of A, k steps: for every 32 of them the three parts, 64 bytes each. */
static void split_rows(ptrdiff_t m, ptrdiff_t k, const float *a, ptrdiff_t lda, char *out)
{
    for (ptrdiff_t i = 0; i < m; i++, a += lda, out += SPLIT_LDA)
        for (ptrdiff_t p = 0; p < k; p += SPLIT_STEP) {
            const vf y = p + 16 < k ? split_load(a + p + 16, k - p - 16) : v_set1(0.0f);
            split_store(split_load(a + p, k - p), y, out + p / SPLIT_STEP * (SPLIT_PARTS * 64), 64);
        }
}

/* A block of C on its way: the sums of a panel of k. */
typedef struct split_block {
    ptrdiff_t rows, strips, last_columns;
    ptrdiff_t done;  /* rows at the top that are those of the block above */
    ptrdiff_t upper; /* rows of the upper tiles where it has 2x2 */
    int first_panel; /* C is written, not added to */
    int last_panel;  /* and completed */
    const char *a, *w;
    ptrdiff_t strip_bytes, steps;
    const float *bias, *residual;
    ptrdiff_t ldr;
    float *c;
    ptrdiff_t ldc;
} split_block;

/* What is done while the tiles of a block are multiplied: the block before is added to C, packed W is fetched. */
typedef struct split_errand {
    _Alignas(64) float sums[32 * 32]; /* of the block before: [rows][wide * 16] */
    vf bias[4];
    __mmask16 used[4], added[4]; /* columns of C; those that hold the panels so far */
    split_block before;
    fb_act act;
    void (*finish)(struct split_errand *e), (*finish_last)(struct split_errand *e);
    ptrdiff_t wide;                   /* strips of a block that is full: 2 with 2x2 tiles, 4 with 1x4 */
    ptrdiff_t finished;               /* rows of the block before */
    ptrdiff_t share;                  /* calls of finish with every step */
    ptrdiff_t ahead;                  /* bytes from a strip to the one to be fetched into the L2 cache meanwhile, */
    ptrdiff_t ahead_begin, ahead_end; /* these bytes of every step; 1x4 tiles fetch nothing: it would cost them time */
} split_errand;

/* n rows of the block before, all but e constant; straight code, see finish_rows. */
static inline __attribute__((always_inline)) void split_finish_rows(const fb_act act, const int add, const int wide,
                                                                    const int n, const split_errand *e)
{
    const ptrdiff_t row = e->finished, ldc = e->before.ldc, ldr = e->before.ldr;
    for (int j = 0; j < wide; j += 2) {
        const __mmask16 used_l = e->used[j], used_r = e->used[j + 1];
        const __mmask16 added_l = e->added[j], added_r = e->added[j + 1];
        const vf bias_l = e->bias[j], bias_r = e->bias[j + 1];
        const float *sums = e->sums + (row * wide + j) * 16;
        const float *residual = add ? e->before.residual + row * ldr + j * 16 : NULL;
        float *out = e->before.c + row * ldc + j * 16;
        FB_UNROLL
        for (int i = 0; i < n; i++, sums += wide * 16, out += ldc, residual += add ? ldr : 0) {
            const vf sum_l = v_add(_mm512_maskz_loadu_ps(added_l, out), v_load(sums));
            const vf sum_r = v_add(_mm512_maskz_loadu_ps(added_r, out + 16), v_load(sums + 16));
            vf x = v_act(act, v_add(sum_l, bias_l)), y = v_act(act, v_add(sum_r, bias_r));
            if (add) {
                x = v_add(_mm512_maskz_loadu_ps(used_l, residual), x);
                y = v_add(_mm512_maskz_loadu_ps(used_r, residual + 16), y);
            }
            _mm512_mask_storeu_ps(out, used_l, x);
            _mm512_mask_storeu_ps(out + 16, used_r, y);
        }
    }
}

/* The next SPLIT_FEW_ROWS rows, or all that are left where these are fewer. */
enum { SPLIT_FEW_ROWS = 4 };
static inline __attribute__((always_inline)) void split_finish(const fb_act act, const int add, const int wide,
                                                               split_errand *e)
{
    if (e->before.rows - e->finished >= SPLIT_FEW_ROWS) {
        split_finish_rows(act, add, wide, SPLIT_FEW_ROWS, e);
        e->finished += SPLIT_FEW_ROWS;
    } else {
        for (; e->finished < e->before.rows; e->finished++)
            split_finish_rows(act, add, wide, 1, e);
    }
}

#define FB_FINISH(name, act, add)                                                                                      \
    static void name##_2(split_errand *e) { split_finish(act, add, 2, e); }                                            \
    static void name##_4(split_errand *e) { split_finish(act, add, 4, e); }
FB_FINISH(split_plain, FB_ACT_NONE, 0)
FB_FINISH(split_add, FB_ACT_NONE, 1)
FB_FINISH(split_gelu, FB_ACT_GELU, 0)
FB_FINISH(split_any, e->act, e->before.residual != NULL)
#undef FB_FINISH

static void (*split_choose_finish(const fb_epilogue *epilogue, ptrdiff_t wide))(split_errand *e)
{
    const int add = epilogue->residual != NULL;
    if (epilogue->act == FB_ACT_NONE)
        return add ? (wide == 2 ? split_add_2 : split_add_4) : (wide == 2 ? split_plain_2 : split_plain_4);
    if (epilogue->act == FB_ACT_GELU && !add)
        return wide == 2 ? split_gelu_2 : split_gelu_4;
    return wide == 2 ? split_any_2 : split_any_4;
}

/* b is the block to finish from now on. */
static void split_take_over(split_errand *e, const split_block *b)
{
    e->before = *b;
    e->finished = b->done;
    e->finish = b->last_panel ? e->finish_last : e->wide == 2 ? split_plain_2 : split_plain_4;
    for (ptrdiff_t j = 0; j < e->wide; j++) {
        e->used[j] = j < b->strips ? v_mask(j == b->strips - 1 ? b->last_columns : 16) : 0;
        e->added[j] = b->first_panel ? 0 : e->used[j];
        e->bias[j] = b->last_panel && b->bias ? _mm512_maskz_loadu_ps(e->used[j], b->bias + j * 16) : v_set1(0.0f);
    }
}

static inline void split_run_errand(split_errand *e)
{
    for (ptrdiff_t i = 0; i < e->share && e->finished < e->before.rows; i++)
        e->finish(e);
}

/* 32 steps of k, all products but that of the first parts, small ones first. Sums in tiles 0 1 over 2 3, A in 4 over 5, W
 * in 6 7; the second strip is the first again where there is but one. */
static inline __attribute__((always_inline)) void split_small_2x2(const int first, const split_block *b, const char *a,
                                                                  const char *w, split_errand *e)
{
    const ptrdiff_t row_bytes = 2 * 64;
    float *const lower_sums = e->sums + e->before.upper * 32;
    const char *const lower = a + b->upper * SPLIT_LDA, *const w1 = w + (b->strips > 1 ? b->strip_bytes : 0);
    for (ptrdiff_t line = e->ahead_begin; line < e->ahead_end; line += 64) {
        __builtin_prefetch(w + e->ahead + line, 0, 2);
        __builtin_prefetch(w1 + e->ahead + line, 0, 2);
    }
    _tile_loadd(4, a, SPLIT_LDA);
    _tile_loadd(6, w + 2 * SPLIT_TILE, 64);
    if (first)
        FB_TURN_OVER(0, e->sums);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w1 + 2 * SPLIT_TILE, 64);
    if (first)
        FB_TURN_OVER(1, e->sums + 16);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, SPLIT_LDA);
    if (first)
        FB_TURN_OVER(2, lower_sums);
    _tile_dpbf16ps(2, 5, 6);
    if (first)
        FB_TURN_OVER(3, lower_sums + 16);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, w + SPLIT_TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w1 + SPLIT_TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, a + 64, SPLIT_LDA);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + 64, SPLIT_LDA);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w1, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, a + 128, SPLIT_LDA);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + 128, SPLIT_LDA);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* The product of the first parts. */
static inline __attribute__((always_inline)) void split_large_2x2(const split_block *b, const char *a, const char *w)
{
    _tile_loadd(4, a, SPLIT_LDA);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + (b->strips > 1 ? b->strip_bytes : 0), 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + b->upper * SPLIT_LDA, SPLIT_LDA);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* Products of the rows in tile 4 by one part of up to four strips; sums in 0 1 2 3, W in 5 6 7 5. */
static inline __attribute__((always_inline)) void split_row(const int first, const split_block *b, const char *w,
                                                            split_errand *e)
{
    const ptrdiff_t strip_bytes = b->strip_bytes, row_bytes = 4 * 64;
    _tile_loadd(5, w, 64);
    if (first)
        FB_TURN_OVER(0, e->sums);
    _tile_dpbf16ps(0, 4, 5);
    if (b->strips > 1)
        _tile_loadd(6, w + strip_bytes, 64);
    if (first)
        FB_TURN_OVER(1, e->sums + 16);
    if (b->strips > 1)
        _tile_dpbf16ps(1, 4, 6);
    if (b->strips > 2)
        _tile_loadd(7, w + 2 * strip_bytes, 64);
    if (first)
        FB_TURN_OVER(2, e->sums + 32);
    if (b->strips > 2)
        _tile_dpbf16ps(2, 4, 7);
    if (b->strips > 3)
        _tile_loadd(5, w + 3 * strip_bytes, 64);
    if (first)
        FB_TURN_OVER(3, e->sums + 48);
    if (b->strips > 3)
        _tile_dpbf16ps(3, 4, 5);
}

/* As split_small_2x2. */
static inline __attribute__((always_inline)) void split_small_1x4(const int first, const split_block *b, const char *a,
                                                                  const char *w, split_errand *e)
{
    _tile_loadd(4, a, SPLIT_LDA);
    split_row(first, b, w + 2 * SPLIT_TILE, e);
    split_row(0, b, w + SPLIT_TILE, e);
    _tile_loadd(4, a + 64, SPLIT_LDA);
    split_row(0, b, w + SPLIT_TILE, e);
    split_row(0, b, w, e);
    _tile_loadd(4, a + 128, SPLIT_LDA);
    split_row(0, b, w, e);
}

/* The sums of b are made in the tiles, and those of the block before finished. */
static inline __attribute__((always_inline)) void split_multiply(const int wide, const split_block *b, split_errand *e)
{
    const char *a = b->a, *w = b->w;
    for (ptrdiff_t s = 0; s < b->steps; s++, a += SPLIT_PARTS * 64, w += SPLIT_PARTS * SPLIT_TILE) {
        if (wide == 2)
            s == 0 ? split_small_2x2(1, b, a, w, e) : split_small_2x2(0, b, a, w, e);
        else
            s == 0 ? split_small_1x4(1, b, a, w, e) : split_small_1x4(0, b, a, w, e);
        split_run_errand(e);
    }
    while (e->finished < e->before.rows)
        e->finish(e);
    a = b->a;
    w = b->w;
    for (ptrdiff_t s = 0; s < b->steps; s++, a += SPLIT_PARTS * 64, w += SPLIT_PARTS * SPLIT_TILE)
        if (wide == 2) {
            split_large_2x2(b, a, w);
        } else {
            _tile_loadd(4, a, SPLIT_LDA);
            split_row(0, b, w, e);
        }
}

/* As gemm_split, for up to SPLIT_ROWS rows. */
static void split_few_rows(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const char *packed,
                           const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, char *scratch)
{
    const ptrdiff_t groups = (m + 31) / 32, rows = (m + groups - 1) / groups, upper = (rows + 1) / 2;
    const ptrdiff_t strips = (n + 15) / 16, wide = rows > 16 ? 2 : 4, strip_bytes = split_strip_bytes(k);
    split_errand e;
    if (k == 0)
        memset(e.sums, 0, sizeof e.sums);
    e.before.rows = e.before.upper = e.finished = 0;
    e.act = epilogue->act;
    e.finish_last = split_choose_finish(epilogue, wide);
    e.wide = wide;
    configure(rows, upper);
    ptrdiff_t p = 0, depth;
    do { /* once where k is 0 */
        depth = k - p < FB_SPLIT_PANEL ? k - p : FB_SPLIT_PANEL;
        split_rows(m, depth, a + p, lda, scratch);
        const ptrdiff_t steps = (depth + SPLIT_STEP - 1) / SPLIT_STEP;
        e.share = steps ? ((rows + SPLIT_FEW_ROWS - 1) / SPLIT_FEW_ROWS + steps - 1) / steps : 0;
        for (ptrdiff_t s = 0; s < strips; s += wide) {
            const ptrdiff_t column = s * 16, nv = strips - s < wide ? strips - s : wide;
            for (ptrdiff_t g = 0; g < groups; g++) {
                const ptrdiff_t i = g < groups - 1 ? g * rows : m - rows;
                const split_block b = {
                    .rows = rows,
                    .strips = nv,
                    .last_columns = s + nv < strips ? 16 : n - (strips - 1) * 16,
                    .done = g * rows - i,
                    .upper = upper,
                    .first_panel = p == 0,
                    .last_panel = p + depth == k,
                    .a = scratch + i * SPLIT_LDA,
                    .w = packed + s * strip_bytes + p / SPLIT_STEP * (SPLIT_PARTS * SPLIT_TILE),
                    .strip_bytes = strip_bytes,
                    .steps = steps,
                    .bias = epilogue->bias ? epilogue->bias + column : NULL,
                    .residual = epilogue->residual ? epilogue->residual + i * epilogue->ldr + column : NULL,
                    .ldr = epilogue->ldr,
                    .c = c + i * ldc + column,
                    .ldc = ldc,
                };
                const ptrdiff_t lines = SPLIT_PARTS * SPLIT_TILE / 64;
                e.ahead =
                    s + wide < strips ? wide * strip_bytes : SPLIT_STEPS * SPLIT_PARTS * SPLIT_TILE - s * strip_bytes;
                e.ahead_begin = lines * g / groups * 64;
                e.ahead_end = lines * (g + 1) / groups * 64;
                if (wide == 2)
                    split_multiply(2, &b, &e);
                else
                    split_multiply(4, &b, &e);
                split_take_over(&e, &b);
            }
        }
        p += depth;
    } while (p < k);
    const ptrdiff_t row_bytes = wide * 64;
    float *const lower_left = e.sums + (wide == 2 ? upper * 32 : 32);
    _tile_stored(0, e.sums, row_bytes);
    _tile_stored(1, e.sums + 16, row_bytes);
    _tile_stored(2, lower_left, row_bytes);
    _tile_stored(3, lower_left + 16, row_bytes);
    _tile_release(); /* see run in amx.c */
    while (e.finished < rows)
        e.finish(&e);
}

static void gemm_split_amx(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const void *packed,
                           const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, void *scratch)
{
    const ptrdiff_t blocks = n > 0 ? (m + SPLIT_ROWS - 1) / SPLIT_ROWS : 0;
    for (ptrdiff_t b = 0; b < blocks; b++) {
        const ptrdiff_t i = m * b / blocks, end = m * (b + 1) / blocks;
        fb_epilogue e = *epilogue;
        e.residual = e.residual ? e.residual + i * e.ldr : NULL;
        split_few_rows(end - i, n, k, a + i * lda, lda, packed, &e, c + i * ldc, ldc, scratch);
    }
}

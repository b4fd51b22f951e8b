/* gemm_split.inc.h: gemm_split on AMX-BF16, included by amx.c after epilogue.inc.h and configure().
 *
 * W is split once, at load. Rows of A are split a panel of k at a time into scratch, before the panel is multiplied by all
 * of W. Tiles are shaped as for gemm_s8: 2x2 of them, or 1x4 up to 16 rows. Tiles of A pass by the L1 cache, which holds W of
 * a block, 37 KB. The sums of a block are finished and added to C between the products of the next block, two rows after
 * every four products: many rows at a time, more seldom, and products wait for them (csrc/README.md).
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
    SPLIT_ROWS = 512,                                 /* of A are held split, */
    SPLIT_FEW_WEIGHTS = 65536,                        /* half as many where W has no more elements than this */
    SPLIT_LDA = (SPLIT_STEPS * SPLIT_PARTS + 1) * 64, /* bytes; an odd number of lines meets all sets of the cache */
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

/* The parts of 16 lanes and 16 more, part after part, `apart` bytes from one to the next. What is left for the last one has
 * eight significant bits: nothing is to be rounded. */
static inline void split_store(__m512 x, __m512 y, char *out, ptrdiff_t apart)
{
    for (int part = 0; part < SPLIT_PARTS - 1; part++, out += apart) {
        const __m512 rounded_x = split_round(x), rounded_y = split_round(y);
        _mm512_storeu_si512(out, split_pair(rounded_x, rounded_y));
        x = v_sub(x, rounded_x);
        y = v_sub(y, rounded_y);
    }
    _mm512_storeu_si512(out, split_pair(x, y));
}

/* Element 0 .. 15 of a row of so many elements, 0 for those beyond. */
static inline vf split_load(const float *p, ptrdiff_t elements)
{
    return elements >= 16 ? v_load(p) : elements > 0 ? v_load_n(p, elements, 0.0f) : v_set1(0.0f);
}

static void split_pack(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k, void *packed)
{
    char *out = packed;
    for (ptrdiff_t j = 0; j < n; j += 16)
        for (ptrdiff_t p = 0; p < k; p += SPLIT_STEP, out += SPLIT_PARTS * SPLIT_TILE) {
            _Alignas(64) float steps[SPLIT_STEP * 16];
            const ptrdiff_t depth = k - p < SPLIT_STEP ? k - p : SPLIT_STEP;
            strip_of(n - j < 16 ? n - j : 16, depth, w + j * stride_n + p * stride_k, stride_n, stride_k, steps);
            for (ptrdiff_t i = depth; i < SPLIT_STEP; i++)
                v_store(steps + i * 16, v_set1(0.0f));
            for (ptrdiff_t i = 0; i < 16; i++)
                split_store(v_load(steps + i * 16), v_load(steps + (i + 16) * 16), out + i * 64, SPLIT_TILE);
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

/* What turns the sums of 16 columns into float32. */
typedef struct split_columns {
    vf bias;
    __mmask16 used, added; /* columns of C; those that hold the panels so far */
} split_columns;

/* What all blocks of a panel share. */
typedef struct split_work {
    _Alignas(64) float sums[32 * 32]; /* of the block before: [rows][wide * 16], wide as in split_run */
    ptrdiff_t rows, upper;            /* of a block; of its upper tiles where it has 2x2 */
    ptrdiff_t steps;                  /* of SPLIT_STEP */
    ptrdiff_t strip_bytes, ldc, ldr;
    int first_panel;                  /* C is written, not added to */
    ptrdiff_t ahead;                  /* bytes from a strip to the one to be fetched into the L2 cache meanwhile, */
    ptrdiff_t ahead_begin, ahead_end; /* these bytes of every step; 1x4 tiles fetch nothing: it would cost them time */
} split_work;

/* A block of C whose sums are to be added to it. */
typedef struct split_block {
    ptrdiff_t rows; /* 0: none */
    ptrdiff_t done; /* rows at the top that are those of the block above, too */
    const split_columns *columns;
    const float *residual;
    float *c;
} split_block;

/* Of `wide` strips, of which so many are there, with n columns. */
static inline __attribute__((always_inline)) void
split_read_columns(const int wide, ptrdiff_t strips, ptrdiff_t n, int first_panel, const float *bias, split_columns *c)
{
    for (ptrdiff_t j = 0; j < wide; j++) {
        c[j].used = j < strips ? v_mask(n - j * 16 < 16 ? n - j * 16 : 16) : 0;
        c[j].added = first_panel ? 0 : c[j].used;
        c[j].bias = bias ? _mm512_maskz_loadu_ps(c[j].used, bias + j * 16) : v_set1(0.0f);
    }
}

/* n rows of b from `row` on, all but the last three constant: straight code, see finish_rows. */
static inline __attribute__((always_inline)) void split_finish_rows(const fb_act act, const int add, const int wide,
                                                                    const int n, const split_work *e,
                                                                    const split_block *b, ptrdiff_t row)
{
    const ptrdiff_t ldc = e->ldc, ldr = e->ldr;
    for (int j = 0; j < wide; j += 2) {
        const split_columns l = b->columns[j], r = b->columns[j + 1];
        const float *sums = e->sums + (row * wide + j) * 16;
        const float *residual = add ? b->residual + row * ldr + j * 16 : NULL;
        float *out = b->c + row * ldc + j * 16;
        FB_UNROLL
        for (int i = 0; i < n; i++, sums += wide * 16, out += ldc, residual += add ? ldr : 0) {
            const vf sum_l = v_add(_mm512_maskz_loadu_ps(l.added, out), v_load(sums));
            const vf sum_r = v_add(_mm512_maskz_loadu_ps(r.added, out + 16), v_load(sums + 16));
            vf x = v_act(act, v_add(sum_l, l.bias)), y = v_act(act, v_add(sum_r, r.bias));
            if (add) {
                x = v_add(_mm512_maskz_loadu_ps(l.used, residual), x);
                y = v_add(_mm512_maskz_loadu_ps(r.used, residual + 16), y);
            }
            _mm512_mask_storeu_ps(out, l.used, x);
            _mm512_mask_storeu_ps(out + 16, r.used, y);
        }
    }
}

/* A few rows of b from `row` on, where so many are left, returning the row after them: done after every four products. */
enum { SPLIT_FEW_ROWS = 2 };
static inline __attribute__((always_inline)) ptrdiff_t split_finish_few(const fb_act act, const int add, const int wide,
                                                                        const split_work *e, const split_block *b,
                                                                        ptrdiff_t row)
{
    if (row + SPLIT_FEW_ROWS > b->rows)
        return row;
    split_finish_rows(act, add, wide, SPLIT_FEW_ROWS, e, b, row);
    return row + SPLIT_FEW_ROWS;
}

/* All rows of b that are left, from `row` on. */
static inline __attribute__((always_inline)) void split_finish(const fb_act act, const int add, const int wide,
                                                               const split_work *e, const split_block *b, ptrdiff_t row)
{
    for (; row + SPLIT_FEW_ROWS <= b->rows; row += SPLIT_FEW_ROWS)
        split_finish_rows(act, add, wide, SPLIT_FEW_ROWS, e, b, row);
    if (row < b->rows)
        split_finish_rows(act, add, wide, 1, e, b, row);
}

/* 32 steps of k, all products but that of the first parts, small ones first. Sums in tiles 0 1 over 2 3, A in 4 over 5, W
 * in 6 7; the second strip is the first again where there is but one. */
static inline __attribute__((always_inline)) ptrdiff_t split_small_2x2(const fb_act act, const int add, const int first,
                                                                       ptrdiff_t strips, const char *a, const char *w,
                                                                       split_work *e, const split_block *before,
                                                                       ptrdiff_t row)
{
    const ptrdiff_t row_bytes = 2 * 64;
    float *const lower_sums = e->sums + e->upper * 32;
    const char *const lower = a + e->upper * SPLIT_LDA, *const w1 = w + (strips > 1 ? e->strip_bytes : 0);
    for (ptrdiff_t line = e->ahead_begin; line < e->ahead_end; line += 64) {
        __builtin_prefetch(w + e->ahead + line, 0, 2);
        __builtin_prefetch(w1 + e->ahead + line, 0, 2);
    }
    _tile_stream_loadd(4, a, SPLIT_LDA);
    _tile_loadd(6, w + 2 * SPLIT_TILE, 64);
    if (first)
        FB_TURN_OVER(0, e->sums);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w1 + 2 * SPLIT_TILE, 64);
    if (first)
        FB_TURN_OVER(1, e->sums + 16);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, lower, SPLIT_LDA);
    if (first)
        FB_TURN_OVER(2, lower_sums);
    _tile_dpbf16ps(2, 5, 6);
    if (first)
        FB_TURN_OVER(3, lower_sums + 16);
    _tile_dpbf16ps(3, 5, 7);
    row = split_finish_few(act, add, 2, e, before, row);
    _tile_loadd(6, w + SPLIT_TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w1 + SPLIT_TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    row = split_finish_few(act, add, 2, e, before, row);
    _tile_stream_loadd(4, a + 64, SPLIT_LDA);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, lower + 64, SPLIT_LDA);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    row = split_finish_few(act, add, 2, e, before, row);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w1, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    row = split_finish_few(act, add, 2, e, before, row);
    _tile_stream_loadd(4, a + 128, SPLIT_LDA);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, lower + 128, SPLIT_LDA);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    return split_finish_few(act, add, 2, e, before, row);
}

/* The product of the first parts. */
static inline __attribute__((always_inline)) void split_large_2x2(ptrdiff_t strips, const char *a, const char *w,
                                                                  const split_work *e)
{
    _tile_stream_loadd(4, a, SPLIT_LDA);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + (strips > 1 ? e->strip_bytes : 0), 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, a + e->upper * SPLIT_LDA, SPLIT_LDA);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* Products of the rows in tile 4 by one part of up to four strips; sums in 0 1 2 3, W in 5 6 7 5. */
static inline __attribute__((always_inline)) void split_row(const int first, ptrdiff_t strips, const char *w,
                                                            split_work *e)
{
    const ptrdiff_t strip_bytes = e->strip_bytes, row_bytes = 4 * 64;
    _tile_loadd(5, w, 64);
    if (first)
        FB_TURN_OVER(0, e->sums);
    _tile_dpbf16ps(0, 4, 5);
    if (strips > 1)
        _tile_loadd(6, w + strip_bytes, 64);
    if (first)
        FB_TURN_OVER(1, e->sums + 16);
    if (strips > 1)
        _tile_dpbf16ps(1, 4, 6);
    if (strips > 2)
        _tile_loadd(7, w + 2 * strip_bytes, 64);
    if (first)
        FB_TURN_OVER(2, e->sums + 32);
    if (strips > 2)
        _tile_dpbf16ps(2, 4, 7);
    if (strips > 3)
        _tile_loadd(5, w + 3 * strip_bytes, 64);
    if (first)
        FB_TURN_OVER(3, e->sums + 48);
    if (strips > 3)
        _tile_dpbf16ps(3, 4, 5);
}

/* As split_small_2x2. */
static inline __attribute__((always_inline)) ptrdiff_t split_small_1x4(const fb_act act, const int add, const int first,
                                                                       ptrdiff_t strips, const char *a, const char *w,
                                                                       split_work *e, const split_block *before,
                                                                       ptrdiff_t row)
{
    _tile_loadd(4, a, SPLIT_LDA);
    split_row(first, strips, w + 2 * SPLIT_TILE, e);
    row = split_finish_few(act, add, 4, e, before, row);
    split_row(0, strips, w + SPLIT_TILE, e);
    row = split_finish_few(act, add, 4, e, before, row);
    _tile_loadd(4, a + 64, SPLIT_LDA);
    split_row(0, strips, w + SPLIT_TILE, e);
    row = split_finish_few(act, add, 4, e, before, row);
    split_row(0, strips, w, e);
    row = split_finish_few(act, add, 4, e, before, row);
    _tile_loadd(4, a + 128, SPLIT_LDA);
    split_row(0, strips, w, e);
    return split_finish_few(act, add, 4, e, before, row);
}

/* The sums of a block of so many strips are made in the tiles, and those of the block before finished. */
static inline __attribute__((always_inline)) void split_multiply(const fb_act act, const int add, const int wide,
                                                                 ptrdiff_t strips, const char *a, const char *w,
                                                                 split_work *e, const split_block *before)
{
    const ptrdiff_t a_bytes = SPLIT_PARTS * 64, w_bytes = SPLIT_PARTS * SPLIT_TILE, steps = e->steps;
    ptrdiff_t row = before->done;
    for (ptrdiff_t s = 0; s < steps; s++) {
        const char *const a_s = a + s * a_bytes, *const w_s = w + s * w_bytes;
        if (wide == 2)
            row = s == 0 ? split_small_2x2(act, add, 1, strips, a, w, e, before, row)
                         : split_small_2x2(act, add, 0, strips, a_s, w_s, e, before, row);
        else
            row = s == 0 ? split_small_1x4(act, add, 1, strips, a, w, e, before, row)
                         : split_small_1x4(act, add, 0, strips, a_s, w_s, e, before, row);
    }
    split_finish(act, add, wide, e, before, row);
    for (ptrdiff_t s = 0; s < steps; s++, a += a_bytes, w += w_bytes)
        if (wide == 2) {
            split_large_2x2(strips, a, w, e);
        } else {
            _tile_loadd(4, a, SPLIT_LDA);
            split_row(0, strips, w, e);
        }
}

/* A panel: w its first strip, a the split rows. */
static inline __attribute__((always_inline)) void split_run(const fb_act act, const int add, const int wide,
                                                            ptrdiff_t m, ptrdiff_t n, const char *a, const char *w,
                                                            const fb_epilogue *epilogue, float *c, split_work *e)
{
    const ptrdiff_t groups = (m + e->rows - 1) / e->rows, strips = (n + 15) / 16;
    const ptrdiff_t step_bytes = SPLIT_PARTS * SPLIT_TILE, panel_bytes = SPLIT_STEPS * step_bytes;
    const ptrdiff_t ahead_bytes = (step_bytes / 64 + groups - 1) / groups * 64;
    split_columns columns[2][4]; /* of these strips, and of those before */
    split_block before = {.rows = 0};
    for (ptrdiff_t s = 0, turn = 0; s < strips; s += wide, turn = !turn) {
        const ptrdiff_t column = s * 16, nv = strips - s < wide ? strips - s : wide;
        split_read_columns(wide, nv, n - column, e->first_panel, epilogue->bias ? epilogue->bias + column : NULL,
                           columns[turn]);
        e->ahead = s + wide < strips ? wide * e->strip_bytes : panel_bytes - s * e->strip_bytes;
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t row = g < groups - 1 ? g * e->rows : m - e->rows;
            e->ahead_begin = g * ahead_bytes;
            e->ahead_end = e->ahead_begin + ahead_bytes < step_bytes ? e->ahead_begin + ahead_bytes : step_bytes;
            split_multiply(act, add, wide, nv, a + row * SPLIT_LDA, w + s * e->strip_bytes, e, &before);
            before = (split_block){.rows = e->rows,
                                   .done = g * e->rows - row,
                                   .columns = columns[turn],
                                   .residual = add ? epilogue->residual + row * e->ldr + column : NULL,
                                   .c = c + row * e->ldc + column};
        }
    }
    store_tiles(wide, e->upper, e->sums);
    split_finish(act, add, wide, e, &before, before.done);
}

FB_RUNS(split_run, char, char, split_work)

/* Up to SPLIT_ROWS rows. */
static void split_few_rows(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const char *packed,
                           const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, char *scratch)
{
    const ptrdiff_t groups = (m + 31) / 32, rows = (m + groups - 1) / groups;
    static const fb_epilogue sums_alone = {NULL, FB_ACT_NONE, NULL, 0};
    split_work e;
    e.rows = rows;
    e.upper = (rows + 1) / 2;
    e.strip_bytes = split_strip_bytes(k);
    e.ldc = ldc;
    e.ldr = epilogue->ldr;
    if (k == 0)
        memset(e.sums, 0, sizeof e.sums);
    configure(rows, e.upper);
    ptrdiff_t p = 0, depth;
    do { /* once where k is 0 */
        const char *w = packed + p / SPLIT_STEP * (SPLIT_PARTS * SPLIT_TILE);
        depth = k - p < FB_SPLIT_PANEL ? k - p : FB_SPLIT_PANEL;
        split_rows(m, depth, a + p, lda, scratch);
        e.steps = (depth + SPLIT_STEP - 1) / SPLIT_STEP;
        e.first_panel = p == 0;
        p += depth;
        split_run_chosen(m, n, scratch, w, p < k ? &sums_alone : epilogue, c, &e);
    } while (p < k);
    _tile_release(); /* see run in amx.c */
}

static void gemm_split_amx(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const void *packed,
                           const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, void *scratch)
{
    const ptrdiff_t most = n * k > SPLIT_FEW_WEIGHTS ? SPLIT_ROWS : SPLIT_ROWS / 2;
    const ptrdiff_t blocks = n > 0 ? (m + most - 1) / most : 0;
    for (ptrdiff_t b = 0; b < blocks; b++) {
        const ptrdiff_t i = m * b / blocks, end = m * (b + 1) / blocks;
        fb_epilogue e = *epilogue;
        e.residual = e.residual ? e.residual + i * e.ldr : NULL;
        split_few_rows(end - i, n, k, a + i * lda, lda, packed, &e, c + i * ldc, ldc, scratch);
    }
}

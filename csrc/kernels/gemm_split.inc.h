/* gemm_split.inc.h: gemm_split on AMX-BF16, included by amx.c after epilogue.inc.h and configure().
 *
 * W is split once, at load. Rows of A are split a panel of k at a time into scratch, before the panel is multiplied by all
 * of W. Tiles are shaped as for gemm_s8: 2x2 of them, or 1x4 up to 16 rows. A block's sums are added to C between the
 * products of the next block.
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

/* A block of C on its way. */
typedef struct split_block {
    ptrdiff_t rows, strips, last_columns;
    ptrdiff_t wide;              /* strips of a block that is full: 2 with 2x2 tiles, 4 with 1x4 */
    ptrdiff_t finished;          /* rows */
    int first_panel, last_panel; /* C is written, not added to; and completed */
    fb_act act;
    const float *bias, *residual;
    ptrdiff_t ldr;
    float *c;
    ptrdiff_t ldc;
    _Alignas(64) float sums[32 * 32]; /* [rows][wide * 16] */
} split_block;

/* The next rows of C, at most so many. */
static __attribute__((noinline)) void split_finish(split_block *b, ptrdiff_t rows)
{
    const ptrdiff_t begin = b->finished, end = rows < b->rows - begin ? begin + rows : b->rows;
    const int acts = b->last_panel && b->act != FB_ACT_NONE;
    const float *bias = b->last_panel ? b->bias : NULL, *residual = b->last_panel && !acts ? b->residual : NULL;
    b->finished = end;
    for (ptrdiff_t i = begin; i < end; i++)
        for (ptrdiff_t j = 0; j < b->strips; j++) {
            const ptrdiff_t columns = j == b->strips - 1 ? b->last_columns : 16;
            float *c = b->c + i * b->ldc + j * 16;
            vf x = v_load(b->sums + (i * b->wide + j) * 16);
            if (!b->first_panel)
                x = v_add(load_columns(c, columns), x);
            if (bias)
                x = v_add(x, load_columns(bias + j * 16, columns));
            if (residual)
                x = v_add(load_columns(residual + i * b->ldr + j * 16, columns), x);
            store_columns(c, x, columns);
        }
    if (acts && begin < end)
        activate(b->act, end - begin, (b->strips - 1) * 16 + b->last_columns,
                 b->residual ? b->residual + begin * b->ldr : NULL, b->ldr, b->c + begin * b->ldc, b->ldc);
}

/* What is multiplied: rows of a split panel by strips. */
typedef struct split_factors {
    const char *a, *w; /* first row, first strip */
    ptrdiff_t upper;   /* rows of the upper tiles, of two */
    ptrdiff_t strip_bytes, strips, steps;
    ptrdiff_t ahead;     /* bytes from a strip to the one to be fetched into the L2 cache meanwhile; 0: none */
    split_block *before; /* is finished meanwhile, */
    ptrdiff_t share;     /* so many rows at a time */
} split_factors;

/* Sums in tiles 0 1 over 2 3, A in 4 over 5, W in 6 7; the second strip is the first again where there is but one. Small
 * products first. Each changes one operand of the product before. */
static __attribute__((noinline)) void split_2x2(const split_factors *f)
{
    const char *const w = f->w, *const w1 = w + (f->strips > 1 ? f->strip_bytes : 0);
    const char *const a = f->a, *const lower = a + f->upper * SPLIT_LDA;
    for (ptrdiff_t s = 0; s < f->steps; s++) {
        const char *upper_parts = a + s * (SPLIT_PARTS * 64), *lower_parts = lower + s * (SPLIT_PARTS * 64);
        const char *parts = w + s * (SPLIT_PARTS * SPLIT_TILE), *parts1 = w1 + s * (SPLIT_PARTS * SPLIT_TILE);
        if (f->ahead)
            for (ptrdiff_t line = 0; line < SPLIT_PARTS * SPLIT_TILE; line += 64) {
                __builtin_prefetch(parts + line + f->ahead, 0, 2);
                __builtin_prefetch(parts1 + line + f->ahead, 0, 2);
            }
        _tile_loadd(4, upper_parts, SPLIT_LDA);
        _tile_loadd(6, parts + 2 * SPLIT_TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, parts1 + 2 * SPLIT_TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower_parts, SPLIT_LDA);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, parts + SPLIT_TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, parts1 + SPLIT_TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, upper_parts + 64, SPLIT_LDA);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower_parts + 64, SPLIT_LDA);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, parts, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, parts1, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, upper_parts + 128, SPLIT_LDA);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower_parts + 128, SPLIT_LDA);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        split_finish(f->before, f->share);
    }
    for (ptrdiff_t s = 0; s < f->steps; s++) {
        _tile_loadd(4, a + s * (SPLIT_PARTS * 64), SPLIT_LDA);
        _tile_loadd(6, w + s * (SPLIT_PARTS * SPLIT_TILE), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w1 + s * (SPLIT_PARTS * SPLIT_TILE), 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + s * (SPLIT_PARTS * 64), SPLIT_LDA);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* Products of the rows in tile 4 by one part of up to four strips; sums in 0 1 2 3, W in 5 6 7 5. */
static inline __attribute__((always_inline)) void split_row(const char *w, const split_factors *f)
{
    _tile_loadd(5, w, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (f->strips > 1) {
        _tile_loadd(6, w + f->strip_bytes, 64);
        _tile_dpbf16ps(1, 4, 6);
    }
    if (f->strips > 2) {
        _tile_loadd(7, w + 2 * f->strip_bytes, 64);
        _tile_dpbf16ps(2, 4, 7);
    }
    if (f->strips > 3) {
        _tile_loadd(5, w + 3 * f->strip_bytes, 64);
        _tile_dpbf16ps(3, 4, 5);
    }
}

static __attribute__((noinline)) void split_1x4(const split_factors *f)
{
    for (ptrdiff_t s = 0; s < f->steps; s++) {
        const char *a = f->a + s * (SPLIT_PARTS * 64), *w = f->w + s * (SPLIT_PARTS * SPLIT_TILE);
        for (ptrdiff_t j = 0; j < f->strips; j++)
            for (ptrdiff_t line = 0; line < SPLIT_PARTS * SPLIT_TILE; line += 64)
                __builtin_prefetch(w + j * f->strip_bytes + line + f->ahead, 0, 2);
        _tile_loadd(4, a, SPLIT_LDA);
        split_row(w + 2 * SPLIT_TILE, f);
        split_row(w + SPLIT_TILE, f);
        _tile_loadd(4, a + 64, SPLIT_LDA);
        split_row(w + SPLIT_TILE, f);
        split_row(w, f);
        _tile_loadd(4, a + 128, SPLIT_LDA);
        split_row(w, f);
        split_finish(f->before, f->share);
    }
    for (ptrdiff_t s = 0; s < f->steps; s++) {
        _tile_loadd(4, f->a + s * (SPLIT_PARTS * 64), SPLIT_LDA);
        split_row(f->w + s * (SPLIT_PARTS * SPLIT_TILE), f);
    }
}

/* The sums of b, and the block before it finished. */
static void split_multiply(split_block *b, split_factors *f)
{
    const ptrdiff_t steps = f->steps > 0 ? f->steps : 1, row_bytes = b->wide * 64;
    f->share = (f->before->rows - f->before->finished + steps - 1) / steps;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    float *lower_left;
    if (b->wide == 2) {
        split_2x2(f);
        lower_left = b->sums + f->upper * 32;
    } else {
        split_1x4(f);
        lower_left = b->sums + 32;
    }
    split_finish(f->before, f->before->rows);
    _tile_stored(0, b->sums, row_bytes);
    _tile_stored(1, b->sums + 16, row_bytes);
    _tile_stored(2, lower_left, row_bytes);
    _tile_stored(3, lower_left + 16, row_bytes);
}

/* As gemm_split, for up to SPLIT_ROWS rows. */
static void split_few_rows(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const char *packed,
                           const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, char *scratch)
{
    const ptrdiff_t groups = (m + 31) / 32, rows = (m + groups - 1) / groups, upper = (rows + 1) / 2;
    const ptrdiff_t strips = (n + 15) / 16, wide = rows > 16 ? 2 : 4, strip_bytes = split_strip_bytes(k);
    split_block blocks[2], *b = &blocks[0], *before = &blocks[1];
    b->wide = before->wide = wide;
    before->rows = before->finished = 0;
    configure(rows, upper);
    ptrdiff_t p = 0, depth;
    do { /* once where k is 0 */
        depth = k - p < FB_SPLIT_PANEL ? k - p : FB_SPLIT_PANEL;
        split_rows(m, depth, a + p, lda, scratch);
        for (ptrdiff_t s = 0; s < strips; s += wide) {
            const ptrdiff_t column = s * 16, nv = strips - s < wide ? strips - s : wide;
            for (ptrdiff_t g = 0; g < groups; g++) {
                const ptrdiff_t i = g < groups - 1 ? g * rows : m - rows;
                b->rows = rows;
                b->finished = g * rows - i; /* the rows of the last block that belong to the one above */
                b->strips = nv;
                b->last_columns = s + nv < strips ? 16 : n - (strips - 1) * 16;
                b->first_panel = p == 0;
                b->last_panel = p + depth == k;
                b->act = epilogue->act;
                b->bias = epilogue->bias ? epilogue->bias + column : NULL;
                b->residual = epilogue->residual ? epilogue->residual + i * epilogue->ldr + column : NULL;
                b->ldr = epilogue->ldr;
                b->c = c + i * ldc + column;
                b->ldc = ldc;
                split_factors f = {.a = scratch + i * SPLIT_LDA,
                                   .w = packed + s * strip_bytes + p / SPLIT_STEP * (SPLIT_PARTS * SPLIT_TILE),
                                   .upper = upper,
                                   .strip_bytes = strip_bytes,
                                   .strips = nv,
                                   .steps = (depth + SPLIT_STEP - 1) / SPLIT_STEP,
                                   .ahead = g > 0 ? 0
                                            : s + wide < strips
                                                ? wide * strip_bytes
                                                : SPLIT_STEPS * SPLIT_PARTS * SPLIT_TILE - s * strip_bytes,
                                   .before = before};
                split_multiply(b, &f);
                split_block *const finished = before;
                before = b;
                b = finished;
            }
        }
        p += depth;
    } while (p < k);
    _tile_release(); /* see gemm_s8_amx */
    split_finish(before, before->rows);
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

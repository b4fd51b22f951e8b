/* gemm_split.inc.h: gemm_split on AMX-BF16, included by amx.c after epilogue.inc.h.
 *
 * Rows of A are split a panel of k at a time, all three parts, before the panel is multiplied; of W the first parts lie
 * packed as tiles and the rest of each element as 16 bits more, so that packed W is as large as float32: what few rows wait
 * for. The second and third parts of a panel of W are made from that into the L1 cache, once for all rows, while the panel
 * before is multiplied: a product takes 16 cycles and one instruction, and the vector units are free meanwhile. So is a
 * block's sum turned into C during the products of the next block.
 *
 * Packed W: strips of 16 columns, k padded with zeros to a multiple of 32; for every 32 steps p of k
 *     1 KB  a tile, first parts:  w0[p] w0[p+16] | w1[p] w1[p+16] | .. | w15[p+16]   p + 1: ..                 (bf16)
 *     1 KB  low halves of float32: w0[p] w1[p] .. w15[p] | w0[p+16] .. w15[p+16]     p + 1: ..               (16 bits)
 * An element and the element 16 steps on share a lane, in A too: that is cheaper than pairs of neighbours.
 *
 * Loops, outermost first: blocks of SPLIT_ROWS rows | panels of k | groups of strips | groups of rows. Tiles are shaped as
 * for gemm_s8: 2x2 of them, or 1x4 up to 16 rows.
 */
enum {
    SPLIT_STEP = 32,                                       /* of k, in a tile */
    SPLIT_STEPS = FB_SPLIT_PANEL / SPLIT_STEP,             /* in a panel */
    SPLIT_ROWS = 256,                                      /* of A are held split */
    SPLIT_LDA = (SPLIT_STEPS * 3 + 1) * 64,                /* bytes; an odd number of lines meets all sets of the cache */
    SPLIT_TILE = 1024,                                     /* bytes */
    SPLIT_W_BYTES = 4 * SPLIT_STEPS * 2 * SPLIT_TILE,      /* two parts of a panel of four strips */
    SPLIT_SUMS = 32 * 32,                                  /* of a block of C */
    SPLIT_SCRATCH = SPLIT_ROWS * SPLIT_LDA + 2 * SPLIT_W_BYTES
};

static inline ptrdiff_t split_strip_bytes(ptrdiff_t k)
{
    return (k + SPLIT_STEP - 1) / SPLIT_STEP * (2 * SPLIT_TILE);
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

static void split_pack(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t ldw, void *packed)
{
    char *out = packed;
    for (ptrdiff_t j = 0; j < n; j += 16, w += 16 * ldw)
        for (ptrdiff_t p = 0; p < k; p += SPLIT_STEP, out += 2 * SPLIT_TILE) {
            vf x[2][16];
            for (ptrdiff_t half = 0; half < 2; half++) {
                const ptrdiff_t left = k - p - 16 * half, depth = left < 16 ? left : 16;
                for (ptrdiff_t i = 0; i < 16; i++)
                    x[half][i] = j + i < n && depth > 0 ? v_load_n(w + i * ldw + p + 16 * half, depth, 0.0f) : v_set1(0.0f);
                v_transpose(x[half]);
            }
            for (ptrdiff_t i = 0; i < 16; i++) {
                char *low = out + SPLIT_TILE + i * 64;
                _mm512_storeu_si512(out + i * 64, split_pair(split_round(x[0][i]), split_round(x[1][i])));
                _mm256_storeu_si256((__m256i *)low, _mm512_cvtepi32_epi16(_mm512_castps_si512(x[0][i])));
                _mm256_storeu_si256((__m256i *)(low + 32), _mm512_cvtepi32_epi16(_mm512_castps_si512(x[1][i])));
            }
        }
}

/* Rows of A, a panel of k: for every 32 steps the three parts, 64 bytes each. */
static void split_rows(ptrdiff_t m, ptrdiff_t k, const float *a, ptrdiff_t lda, char *out)
{
    for (ptrdiff_t i = 0; i < m; i++, a += lda, out += SPLIT_LDA)
        for (ptrdiff_t p = 0; p < k; p += SPLIT_STEP) {
            char *parts = out + p / SPLIT_STEP * (3 * 64);
            const ptrdiff_t left = k - p;
            vf x, y;
            if (left >= SPLIT_STEP) {
                x = v_load(a + p);
                y = v_load(a + p + 16);
            } else {
                x = v_load_n(a + p, left < 16 ? left : 16, 0.0f);
                y = left > 16 ? v_load_n(a + p + 16, left - 16, 0.0f) : v_set1(0.0f);
            }
            for (int part = 0; part < 3; part++) {
                const vf rx = split_round(x), ry = split_round(y);
                _mm512_storeu_si512(parts + part * 64, split_pair(rx, ry));
                x = v_sub(x, rx);
                y = v_sub(y, ry);
            }
        }
}

/* Second and third parts of 16 columns and two steps of k. */
static inline void split_line(const char *first, const char *low, char *second, char *third)
{
    const __m512i h = _mm512_loadu_si512(first), upper = _mm512_set1_epi32(-0x10000);
    const __m512i hx = _mm512_slli_epi32(h, 16), hy = _mm512_and_si512(h, upper);
    const __m512i lx = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)low));
    const __m512i ly = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(low + 32)));
    const vf x = v_sub(_mm512_castsi512_ps(_mm512_add_epi32(hx, lx)), _mm512_castsi512_ps(hx));
    const vf y = v_sub(_mm512_castsi512_ps(_mm512_add_epi32(hy, ly)), _mm512_castsi512_ps(hy));
    const vf mx = split_round(x), my = split_round(y);
    _mm512_storeu_si512(second, split_pair(mx, my));
    _mm512_storeu_si512(third, split_pair(v_sub(x, mx), v_sub(y, my)));
}

/* A panel of a group of strips, and how much of its second and third parts is made. */
typedef struct split_panel {
    const char *packed; /* of the first strip */
    ptrdiff_t strip_bytes, strips, steps;
    ptrdiff_t ahead; /* bytes from packed to the panel after it, to be fetched into the L2 cache */
    char *parts;     /* [strips][SPLIT_STEPS] second and third tile */
    ptrdiff_t made;  /* lines, of strips * steps * 16 */
} split_panel;

static void split_make(split_panel *w, ptrdiff_t lines)
{
    const ptrdiff_t per_strip = w->steps * 16, all = w->strips * per_strip;
    ptrdiff_t at = w->made, end = lines < all - at ? at + lines : all;
    w->made = end;
    while (at < end) {
        const ptrdiff_t strip = at / per_strip, tile = at % per_strip / 16;
        ptrdiff_t line = at % 16, stop = line + (end - at) < 16 ? line + (end - at) : 16;
        const char *from = w->packed + strip * w->strip_bytes + tile * (2 * SPLIT_TILE);
        char *to = w->parts + (strip * SPLIT_STEPS + tile) * (2 * SPLIT_TILE);
        at += stop - line;
        for (; line < stop; line++) {
            const char *first = from + line * 64, *low = first + SPLIT_TILE;
            __builtin_prefetch(first + w->ahead, 0, 2);
            __builtin_prefetch(low + w->ahead, 0, 2);
            split_line(first, low, to + line * 64, to + SPLIT_TILE + line * 64);
        }
    }
}

/* A block of C on its way. */
typedef struct split_block {
    ptrdiff_t rows, skip, strips; /* the first `skip` rows are another block's */
    ptrdiff_t wide;
    ptrdiff_t finished;
    int first, last; /* panel */
    fb_act act;
    const float *bias, *residual;
    ptrdiff_t ldr, last_columns;
    float *c;
    ptrdiff_t ldc;
    _Alignas(64) float sums[SPLIT_SUMS]; /* [rows][wide * 16] */
} split_block;

static void split_finish(split_block *b, ptrdiff_t rows)
{
    const ptrdiff_t begin = b->finished, end = rows < b->rows - begin ? begin + rows : b->rows, lds = b->wide * 16;
    const int acts = b->act != FB_ACT_NONE;
    b->finished = end;
    for (ptrdiff_t i = begin; i < end; i++)
        for (ptrdiff_t j = 0; j < b->strips; j++) {
            const ptrdiff_t columns = j == b->strips - 1 ? b->last_columns : 16;
            float *c = b->c + i * b->ldc + j * 16;
            vf x = v_load(b->sums + i * lds + j * 16);
            if (!b->first)
                x = v_add(load_columns(c, columns), x);
            if (b->last) {
                if (b->bias)
                    x = v_add(x, load_columns(b->bias + j * 16, columns));
                if (b->residual && !acts)
                    x = v_add(load_columns(b->residual + i * b->ldr + j * 16, columns), x);
            }
            store_columns(c, x, columns);
        }
    if (b->last && acts && begin < end)
        activate(b->act, end - begin, (b->strips - 1) * 16 + b->last_columns,
                 b->residual ? b->residual + begin * b->ldr : NULL, b->ldr, b->c + begin * b->ldc, b->ldc);
}

/* What is done while tiles are multiplied, a share with every step. */
typedef struct split_errand {
    split_block *before;
    ptrdiff_t rows_share;
    split_panel *next;
    ptrdiff_t lines_share;
} split_errand;

static __attribute__((noinline)) void split_run_errand(split_errand *e)
{
    split_finish(e->before, e->rows_share);
    split_make(e->next, e->lines_share);
}

#define FB_DP _tile_dpbf16ps

/* Sums in tiles 0 1 over 2 3, A in 4 over 5, W in 6 7: the five small products, then the large one. */
static __attribute__((noinline)) void split_2x2(const char *a, ptrdiff_t upper, const split_panel *w, split_errand *e)
{
    const ptrdiff_t steps = w->steps;
    const char *lower = a + upper * SPLIT_LDA, *first = w->packed, *first1 = first + w->strip_bytes;
    const char *parts = w->parts, *parts1 = parts + SPLIT_STEPS * 2 * SPLIT_TILE;
    const int two = w->strips > 1;
    if (!two) {
        first1 = first;
        parts1 = parts;
    }
    for (ptrdiff_t s = 0; s < steps; s++) {
        const char *au = a + s * 192, *al = lower + s * 192;
        const ptrdiff_t at = s * 2 * SPLIT_TILE;
        _tile_loadd(4, au, SPLIT_LDA);
        _tile_loadd(6, parts + at + SPLIT_TILE, 64);
        FB_DP(0, 4, 6);
        _tile_loadd(7, parts1 + at + SPLIT_TILE, 64);
        FB_DP(1, 4, 7);
        _tile_loadd(5, al, SPLIT_LDA);
        FB_DP(2, 5, 6);
        FB_DP(3, 5, 7);
        split_run_errand(e);
        _tile_loadd(6, parts + at, 64);
        FB_DP(0, 4, 6);
        _tile_loadd(7, parts1 + at, 64);
        FB_DP(1, 4, 7);
        FB_DP(2, 5, 6);
        FB_DP(3, 5, 7);
        split_run_errand(e);
        _tile_loadd(4, au + 64, SPLIT_LDA);
        FB_DP(0, 4, 6);
        FB_DP(1, 4, 7);
        _tile_loadd(5, al + 64, SPLIT_LDA);
        FB_DP(2, 5, 6);
        FB_DP(3, 5, 7);
        split_run_errand(e);
        _tile_loadd(6, first + at, 64);
        FB_DP(0, 4, 6);
        _tile_loadd(7, first1 + at, 64);
        FB_DP(1, 4, 7);
        FB_DP(2, 5, 6);
        FB_DP(3, 5, 7);
        split_run_errand(e);
        _tile_loadd(4, au + 128, SPLIT_LDA);
        FB_DP(0, 4, 6);
        FB_DP(1, 4, 7);
        _tile_loadd(5, al + 128, SPLIT_LDA);
        FB_DP(2, 5, 6);
        FB_DP(3, 5, 7);
        split_run_errand(e);
    }
    for (ptrdiff_t s = 0; s < steps; s++) {
        const ptrdiff_t at = s * 2 * SPLIT_TILE;
        _tile_loadd(4, a + s * 192, SPLIT_LDA);
        _tile_loadd(6, first + at, 64);
        FB_DP(0, 4, 6);
        _tile_loadd(7, first1 + at, 64);
        FB_DP(1, 4, 7);
        _tile_loadd(5, lower + s * 192, SPLIT_LDA);
        FB_DP(2, 5, 6);
        FB_DP(3, 5, 7);
        split_run_errand(e);
    }
}

/* Sums in tiles 0 1 2 3, A in 4, W in 5 6 7 5. */
static inline __attribute__((always_inline)) void split_row(const char *w, ptrdiff_t next, ptrdiff_t strips)
{
    _tile_loadd(5, w, 64);
    FB_DP(0, 4, 5);
    if (strips > 1) {
        _tile_loadd(6, w + next, 64);
        FB_DP(1, 4, 6);
    }
    if (strips > 2) {
        _tile_loadd(7, w + 2 * next, 64);
        FB_DP(2, 4, 7);
    }
    if (strips > 3) {
        _tile_loadd(5, w + 3 * next, 64);
        FB_DP(3, 4, 5);
    }
}

static __attribute__((noinline)) void split_1x4(const char *a, const split_panel *w, split_errand *e)
{
    const ptrdiff_t steps = w->steps, strips = w->strips, next = SPLIT_STEPS * 2 * SPLIT_TILE;
    for (ptrdiff_t s = 0; s < steps; s++) {
        const char *second = w->parts + s * 2 * SPLIT_TILE, *first = w->packed + s * 2 * SPLIT_TILE;
        _tile_loadd(4, a + s * 192, SPLIT_LDA);
        split_row(second + SPLIT_TILE, next, strips);
        split_run_errand(e);
        split_row(second, next, strips);
        split_run_errand(e);
        _tile_loadd(4, a + s * 192 + 64, SPLIT_LDA);
        split_row(second, next, strips);
        split_run_errand(e);
        split_row(first, w->strip_bytes, strips);
        split_run_errand(e);
        _tile_loadd(4, a + s * 192 + 128, SPLIT_LDA);
        split_row(first, w->strip_bytes, strips);
        split_run_errand(e);
    }
    for (ptrdiff_t s = 0; s < steps; s++) {
        _tile_loadd(4, a + s * 192, SPLIT_LDA);
        split_row(w->packed + s * 2 * SPLIT_TILE, w->strip_bytes, strips);
        split_run_errand(e);
    }
}

/* Up to SPLIT_ROWS rows. */
static void split_block_of_rows(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const char *packed,
                                const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, char *scratch)
{
    const ptrdiff_t groups = (m + 31) / 32, rows = (m + groups - 1) / groups, upper = (rows + 1) / 2;
    const ptrdiff_t strips = (n + 15) / 16, wide = rows > 16 ? 2 : 4, strip_bytes = split_strip_bytes(k);
    const ptrdiff_t panels = k > 0 ? (k + FB_SPLIT_PANEL - 1) / FB_SPLIT_PANEL : 1;
    const ptrdiff_t strip_groups = (strips + wide - 1) / wide;
    char *const rows_split = scratch, *const parts = scratch + SPLIT_ROWS * SPLIT_LDA;
    split_block blocks[2], *b = &blocks[0], *before = &blocks[1];
    split_panel w[2];
    b->wide = before->wide = wide;
    before->rows = before->strips = before->finished = 0;
    before->last = 0;
    before->act = FB_ACT_NONE;
    configure(rows, upper);
    /* w[t & 1] is the turn's panel */
    const ptrdiff_t turns = panels * strip_groups;
    for (ptrdiff_t t = -1; t < turns; t++) {
        split_panel *now = &w[t & 1], *next = &w[(t + 1) & 1];
        const ptrdiff_t np = (t + 1) / strip_groups, ns = (t + 1) % strip_groups * wide;
        if (t + 1 < turns) {
            const ptrdiff_t left = k - np * FB_SPLIT_PANEL, depth = left < FB_SPLIT_PANEL ? left : FB_SPLIT_PANEL;
            *next = (split_panel){
                .packed = packed + ns * strip_bytes + np * SPLIT_STEPS * 2 * SPLIT_TILE,
                .strip_bytes = strip_bytes,
                .strips = strips - ns < wide ? strips - ns : wide,
                .steps = (depth + SPLIT_STEP - 1) / SPLIT_STEP,
                .ahead = ns + wide < strips ? wide * strip_bytes
                                            : SPLIT_STEPS * 2 * SPLIT_TILE - ns * strip_bytes,
                .parts = parts + ((t + 1) & 1) * SPLIT_W_BYTES,
            };
        } else {
            next->strips = 0, next->made = 0;
        }
        const ptrdiff_t lines = next->strips * next->steps * 16;
        if (t < 0) {
            split_make(next, lines);
            continue;
        }
        const ptrdiff_t panel = t / strip_groups, s = t % strip_groups * wide, column = s * 16;
        if (s == 0 && k > 0) {
            const ptrdiff_t from = panel * FB_SPLIT_PANEL;
            split_rows(m, k - from < FB_SPLIT_PANEL ? k - from : FB_SPLIT_PANEL, a + from, lda, rows_split);
        }
        split_errand e = {.next = next, .lines_share = now->steps ? (lines + groups * now->steps * 6 - 1) / (groups * now->steps * 6) : lines};
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t i = g < groups - 1 ? g * rows : m - rows;
            b->rows = rows;
            b->skip = g < groups - 1 ? 0 : g * rows - i;
            b->finished = b->skip;
            b->strips = now->strips;
            b->first = panel == 0;
            b->last = panel == panels - 1;
            b->act = epilogue->act;
            b->bias = epilogue->bias ? epilogue->bias + column : NULL;
            b->residual = epilogue->residual ? epilogue->residual + i * epilogue->ldr + column : NULL;
            b->ldr = epilogue->ldr;
            b->last_columns = n - column - (now->strips - 1) * 16 < 16 ? n - column - (now->strips - 1) * 16 : 16;
            b->c = c + i * ldc + column;
            b->ldc = ldc;
            e.before = before;
            e.rows_share = now->steps ? (before->rows + now->steps * 6 - 1) / (now->steps * 6) : before->rows;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            float *lower_left;
            if (wide == 2) {
                split_2x2(rows_split + i * SPLIT_LDA, upper, now, &e);
                lower_left = b->sums + upper * 32;
            } else {
                split_1x4(rows_split + i * SPLIT_LDA, now, &e);
                lower_left = b->sums + 32;
            }
            split_finish(before, before->rows);
            const ptrdiff_t row_bytes = wide * 64;
            _tile_stored(0, b->sums, row_bytes);
            _tile_stored(1, b->sums + 16, row_bytes);
            _tile_stored(2, lower_left, row_bytes);
            _tile_stored(3, lower_left + 16, row_bytes);
            split_block *const finished = before;
            before = b;
            b = finished;
        }
        split_make(next, lines);
    }
    _tile_release();
    split_finish(before, before->rows);
}

static void gemm_split_amx(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const void *packed,
                           const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, void *scratch)
{
    if (n <= 0)
        return;
    const ptrdiff_t blocks = (m + SPLIT_ROWS - 1) / SPLIT_ROWS;
    for (ptrdiff_t i = 0; i < blocks; i++) {
        const ptrdiff_t row = m * i / blocks, end = m * (i + 1) / blocks;
        fb_epilogue e = *epilogue;
        if (e.residual)
            e.residual += row * e.ldr;
        split_block_of_rows(end - row, n, k, a + row * lda, lda, packed, &e, c + row * ldc, ldc, scratch);
    }
}

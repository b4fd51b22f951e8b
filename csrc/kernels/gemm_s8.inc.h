/* gemm_s8.inc.h: the int8 GEMM, written once over the vectors of simd_*.h.
 *
 * A kernel file includes its simd_*.h, activations.inc.h and epilogue.inc.h, then defines
 *   FB_A_SHIFT                             its products take a - FB_A_SHIFT for a
 *   FB_S8_DEPTH                            steps of k of one column that lie together in packed W
 *   FB_S8_TILES(X), FB_S8_MR, fb_s8_strips register tiles, as in gemm_f32.inc.h
 * and, for the sums of a tile, either
 *   vi_dot(acc, row, w)                    one dot product of four bytes for 16 columns (meaning in simd_scalar.h)
 * or
 *   includes s8_pairs.inc.h                products of bytes that fit 16 bits not quite
 * or
 *   FB_S8_SUMS                             a function (mr, nv, k, a, lda, strip, strip_bytes, ahead, sums): see s8_sums.
 *
 * Packed W: strips of 16 columns of C. A strip is, for every FB_S8_DEPTH steps of k, so many bytes of each column in turn;
 * then the sums of its columns, int32 [16]; then their scales, float32 [16]. With a depth of 4, which is one zmm, two ymm,
 * or one row of an AMX tile:
 *     w0[0..3] w1[0..3] .. w15[0..3] | w0[4..7] .. | .. | sum0 .. sum15 | scale0 .. scale15        K padded with 0
 * With s8_pairs.inc.h each byte is w + 128.
 *
 * A tile runs over the whole of k, its int32 sums in registers, and writes finished float32.
 */
#include "unroll.h"

#ifndef FB_S8_PAIRS
enum { S8_FLIP = 0 };
typedef struct s8_prepared s8_prepared;
#endif

typedef struct fb_s8_tile_args {
    ptrdiff_t k;      /* bytes, a multiple of 32 */
    const uint8_t *a; /* [mr][k], rows lda bytes apart */
    ptrdiff_t lda;
    const float *scale_a;  /* [mr] */
    const int32_t *zero;   /* [mr] */
    const int8_t *strip;   /* first step of the first strip */
    ptrdiff_t strip_bytes; /* from one strip to the next */
    ptrdiff_t ahead;       /* from strip to a strip to be prefetched */
    fb_act act;
    const float *bias, *residual;
    ptrdiff_t ldr;
    ptrdiff_t last_columns; /* of the last strip: 1 .. 16 */
    float *c;
    ptrdiff_t ldc;
    const s8_prepared *prepared; /* with s8_pairs.inc.h: a are rows of it from `row` on */
    ptrdiff_t row;
} fb_s8_tile_args;

/* m rows of one strip from exact sums, rows lds apart, to float32. All is passed by value: a store to c might change what a
 * pointer leads to, which would be loaded again for each row (1.02 to 1.05 of an int8 forward pass on avx512vnni). */
static inline __attribute__((always_inline)) void
s8_finish_strip(const fb_act act, const int add, ptrdiff_t m, const int32_t *sums, ptrdiff_t lds, const float *scale_a,
                const int32_t *zero, vi w_sums, vf w_scales, vf bias, const float *residual, ptrdiff_t ldr,
                ptrdiff_t columns, float *c, ptrdiff_t ldc)
{
    for (ptrdiff_t i = 0; i < m; i++, sums += lds, c += ldc) {
        const vi shift = vi_mul(w_sums, vi_set1(zero[i] - FB_A_SHIFT));
        const vi exact = vi_sub(vi_load(sums), shift);
        vf x = v_fma(vi_to_f32(exact), v_mul(v_set1(scale_a[i]), w_scales), bias);
        x = v_act_s8(act, x);
        if (add)
            x = v_add(load_columns(residual + i * ldr, columns), x);
        store_columns(c, x, columns);
    }
}

/* m rows of a tile from exact sums [m][nv * 16], rows lds apart, to float32, one strip after the other. */
static inline __attribute__((always_inline)) void
s8_finish_as(const fb_act act, ptrdiff_t m, ptrdiff_t nv, const int32_t *sums, ptrdiff_t lds, const fb_s8_tile_args *t)
{
    for (ptrdiff_t j = 0; j < nv; j++) {
        const int8_t *after = t->strip + (j + 1) * t->strip_bytes - 128;
        const vi w_sums = vi_load((const int32_t *)after);
        const vf w_scales = v_load((const float *)(after + 64));
        const ptrdiff_t columns = j == nv - 1 ? t->last_columns : 16;
        const vf bias = t->bias ? load_columns(t->bias + j * 16, columns) : v_set1(0.0f);
        const float *residual = t->residual ? t->residual + j * 16 : NULL;
#define FB_FINISH(add, columns)                                                                                        \
    s8_finish_strip(act, add, m, sums + j * 16, lds, t->scale_a, t->zero, w_sums, w_scales, bias, residual, t->ldr,    \
                    columns, t->c + j * 16, t->ldc)
        if (columns == 16 && !t->residual)
            FB_FINISH(0, 16);
        else if (columns == 16 && act == FB_ACT_NONE)
            FB_FINISH(1, 16);
        else
            FB_FINISH(t->residual != NULL, columns);
#undef FB_FINISH
    }
}

/* One function for all tiles: their code stays small. */
static __attribute__((noinline)) void s8_finish(ptrdiff_t m, ptrdiff_t nv, const int32_t *sums, ptrdiff_t lds,
                                                const fb_s8_tile_args *t)
{
    switch (t->act) { /* a loop of its own for each activation: no branch in it, and constants in registers */
    case FB_ACT_NONE: s8_finish_as(FB_ACT_NONE, m, nv, sums, lds, t); break;
    case FB_ACT_GELU: s8_finish_as(FB_ACT_GELU, m, nv, sums, lds, t); break;
    case FB_ACT_GELU_TANH: s8_finish_as(FB_ACT_GELU_TANH, m, nv, sums, lds, t); break;
    case FB_ACT_RELU: s8_finish_as(FB_ACT_RELU, m, nv, sums, lds, t); break;
    case FB_ACT_SILU: s8_finish_as(FB_ACT_SILU, m, nv, sums, lds, t); break;
    case FB_ACT_TANH: s8_finish_as(FB_ACT_TANH, m, nv, sums, lds, t); break;
    }
}

static inline ptrdiff_t s8_strip_bytes(ptrdiff_t k) { return fb_k8(k) * 16 + 128; }

static size_t FB_ISA_NAME(s8_packed_bytes)(ptrdiff_t n, ptrdiff_t k)
{
    return (size_t)((n + 15) / 16) * (size_t)s8_strip_bytes(k);
}

static void FB_ISA_NAME(s8_pack)(ptrdiff_t n, ptrdiff_t k, const int8_t *w, ptrdiff_t ldw, const float *scale_w,
                                 void *packed)
{
    int8_t *out = packed;
    for (ptrdiff_t s = 0; s < n; s += 16, out += s8_strip_bytes(k)) {
        int32_t *sums = (int32_t *)(out + fb_k8(k) * 16);
        float *scales = (float *)(sums + 16);
        memset(out, 0, (size_t)s8_strip_bytes(k));
        for (ptrdiff_t j = 0; j < 16 && s + j < n; j++) {
            const int8_t *row = w + (s + j) * ldw;
            int8_t *column = out + j * FB_S8_DEPTH;
            ptrdiff_t p = 0;
            for (; p + FB_S8_DEPTH <= k; p += FB_S8_DEPTH, column += 16 * FB_S8_DEPTH)
                memcpy(column, row + p, FB_S8_DEPTH);
            memcpy(column, row + p, (size_t)(k - p));
            int32_t sum = 0;
            for (p = 0; p < k; p++)
                sum += row[p];
            sums[j] = sum;
            scales[j] = scale_w[s + j];
        }
        for (ptrdiff_t p = 0; p < fb_k8(k) * 16; p++)
            out[p] ^= S8_FLIP;
    }
}

/* Sixteen steps of k, four of a column in each lane of w[0 .. 3], to their place in a strip. */
static inline void s8_emit(int8_t *out, const vi w[4])
{
#if FB_S8_DEPTH == 4
    for (int i = 0; i < 4; i++)
        vi_store((int32_t *)out + 16 * i, w[i]);
#else
    vi_store_zipped(out, w, FB_S8_DEPTH / 4);
#endif
}

/* Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold. Of 16 steps of 16 columns [16][16] four neighbours
 * become one int32: bits are added up, shifted by 8 for each step; adding 128 to each byte and taking it off again by xor
 * keeps a negative one from borrowing from the next. Sums of columns are kept with those bits, modulo 2^32. */
static const uint32_t s8_round_bits = 0x4b400000u;
static inline vi s8_quantize(int8_t *out, const float *x, vf inverse, vi sums)
{
    vi w[4];
    FB_UNROLL
    for (int i = 0; i < 4; i++) {
        vi q[4];
        FB_UNROLL
        for (int p = 0; p < 4; p++)
            q[p] = v_bits(v_fma(v_load(x + (4 * i + p) * 16), inverse, v_set1(12582912.0f)));
        sums = vi_add(sums, vi_add(vi_add(q[0], q[1]), vi_add(q[2], q[3])));
        const vi low = vi_add(q[0], vi_shl(q[1], 8)), high = vi_add(vi_shl(q[2], 16), vi_shl(q[3], 24));
        const int32_t bias = (int32_t)(0x80808080u - (s8_round_bits + (s8_round_bits << 8)));
        w[i] = vi_xor(vi_add(vi_add(low, high), vi_set1(bias)), vi_set1((int32_t)((0x80u ^ S8_FLIP) * 0x01010101u)));
    }
    s8_emit(out, w);
    return sums;
}

/* Columns whose scale is NaN: no bits of what was not finite remain. */
static __attribute__((noinline)) void s8_clear_bad(ptrdiff_t k, int8_t *out, int32_t *sums, const float *scales)
{
    for (int j = 0; j < 16; j++)
        if (scales[j] != scales[j]) {
            for (ptrdiff_t p = 0; p < fb_k8(k); p += FB_S8_DEPTH)
                memset(out + p * 16 + j * FB_S8_DEPTH, S8_FLIP, FB_S8_DEPTH);
            sums[j] = 0;
        }
}

/* Steps of a strip that are held as floats at once: 16 KB. */
enum { S8_HELD = 256 };

static void FB_ISA_NAME(s8_pack_f32)(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k,
                                     void *packed)
{
    const vf zero = v_set1(0.0f), least = v_set1(0x1p-120f);
    _Alignas(64) float held[S8_HELD * 16];
    int8_t *out = packed;
    for (ptrdiff_t j = 0; j < n; j += 16, w += 16 * stride_n, out += s8_strip_bytes(k)) {
        const ptrdiff_t columns = n - j < 16 ? n - j : 16;
        vi bits = vi_set1(0); /* of the largest: a NaN or an infinity is beyond all else */
        for (ptrdiff_t p = 0; p < k; p += S8_HELD) {
            const ptrdiff_t steps = k - p < S8_HELD ? k - p : S8_HELD;
            strip_of(columns, steps, w + p * stride_k, stride_n, stride_k, held);
            for (ptrdiff_t i = 0; i < steps; i++)
                bits = vi_max(bits, v_bits(v_abs(v_load(held + i * 16))));
        }
        const vf most = v_of_bits(bits), bad = v_mul(most, zero); /* NaN or 0 */
        const vf step = v_add(v_div(most, v_set1(127.0f)), bad);
        const vf inverse = v_ifgt(least, step, zero, v_div(v_set1(1.0f), step));
        vi sums = vi_set1(0);
        for (ptrdiff_t p = 0; p < k; p += S8_HELD) {
            const ptrdiff_t steps = k - p < S8_HELD ? k - p : S8_HELD;
            if (k > S8_HELD)
                strip_of(columns, steps, w + p * stride_k, stride_n, stride_k, held);
            for (ptrdiff_t i = steps; i % 16 != 0; i++)
                v_store(held + i * 16, zero);
            for (ptrdiff_t i = 0; i < steps; i += 16)
                sums = s8_quantize(out + (p + i) * 16, held + i * 16, inverse, sums);
        }
        const ptrdiff_t added = (k + 15) / 16 * 16;
        int32_t *after = (int32_t *)(out + fb_k8(k) * 16);
        memset(out + added * 16, S8_FLIP, (size_t)(fb_k8(k) - added) * 16);
        vi_store(after, vi_sub(sums, vi_set1((int32_t)((uint32_t)added * s8_round_bits))));
        v_store((float *)(after + 16), v_ifgt(least, step, zero, step));
        if (!(v_sum(bad) == 0.0f))
            s8_clear_bad(k, out, after, (const float *)(after + 16));
    }
}

/* Bytes of a group of strips that stay in an L1 cache of 32 KB while the rows of A pass by; longer ones are fetched for every
 * group of rows. */
enum { S8_STAYS = 24576 };

#ifdef FB_S8_SUMS
#define FB_S8_FETCHES(mr) 0
#define s8_sums(mr, nv, fetch, t, sums)                                                                                \
    ((void)(fetch), FB_S8_SUMS(mr, nv, t->k, t->a, t->lda, t->strip, t->strip_bytes, t->ahead, sums))
#else
#define FB_S8_FETCHES(mr) ((mr) > FB_S8_MR / 2) /* fewer rows have no load to spare */

/* Weights are prefetched as in gemm_f32.inc.h: a line of each strip so many bytes before its use, and one of a strip of the
 * next group. */
enum { S8_AHEAD = 2048 };

/* acc += k steps of mr rows of A by nv strips. */
static inline __attribute__((always_inline)) void s8_steps(const int mr, const int nv, const int fetch, ptrdiff_t k,
                                                           const uint8_t *a, ptrdiff_t lda, const int8_t *strip,
                                                           ptrdiff_t strip_bytes, ptrdiff_t ahead, vi (*acc)[8])
{
    FB_FOUR_A_TURN
    for (ptrdiff_t p = 0; p < k; p += FB_S8_DEPTH) {
        if (fetch) {
            __builtin_prefetch(strip + p * 16 + ahead, 0, 2);
            FB_UNROLL
            for (int j = 0; j < nv; j++)
                __builtin_prefetch(strip + j * strip_bytes + p * 16 + S8_AHEAD);
        }
        vi w[8];
        FB_UNROLL
        for (int j = 0; j < nv; j++)
            w[j] = vi_load((const int32_t *)(strip + j * strip_bytes + p * 16));
        FB_UNROLL
        for (int i = 0; i < mr; i++) {
            const vrow row = vi_row(a + i * lda + p);
            FB_UNROLL
            for (int j = 0; j < nv; j++)
                acc[i][j] = vi_dot(acc[i][j], row, w[j]);
        }
    }
}

/* sums[i][j] = sum_p (a[i][p] - FB_A_SHIFT) * W[j][p] for mr rows and nv strips, rows of sums 8 * 16 apart. */
static inline __attribute__((always_inline)) void s8_sums(const int mr, const int nv, const int fetch,
                                                          const fb_s8_tile_args *t, int32_t *sums)
{
    vi acc[FB_S8_MR][8];
#ifdef FB_S8_PAIRS
    const int32_t *start = t->prepared->start + t->row;
#else
    static const int32_t start[FB_S8_MR];
#endif
    FB_UNROLL
    for (int i = 0; i < mr; i++)
        FB_UNROLL
    for (int j = 0; j < nv; j++)
        acc[i][j] = vi_set1(start[i]);
    s8_steps(mr, nv, fetch, t->k, t->a, t->lda, t->strip, t->strip_bytes, t->ahead, acc);
    FB_UNROLL
    for (int i = 0; i < mr; i++)
        FB_UNROLL
    for (int j = 0; j < nv; j++)
        vi_store(sums + (i * 8 + j) * 16, acc[i][j]);
#ifdef FB_S8_PAIRS
    s8_add_out(t->prepared, t->row, mr, nv, t->strip, t->strip_bytes, sums);
#endif
}
#endif

typedef void fb_s8_tile(const fb_s8_tile_args *t);

static inline __attribute__((always_inline)) void s8_tile_any(const int mr, const int nv, const int fetch,
                                                              const fb_s8_tile_args *t)
{
    _Alignas(64) int32_t sums[FB_S8_MR * 8 * 16];
    ask_for_c(mr, nv, t->c, t->ldc);
    s8_sums(mr, nv, fetch, t, sums);
    s8_finish(mr, nv, sums, 8 * 16, t);
}

#define FB_TILE(mr, nv)                                                                                                \
    static void s8_tile_##mr##x##nv(const fb_s8_tile_args *t) { s8_tile_any(mr, nv, 0, t); }                           \
    static void s8_first_##mr##x##nv(const fb_s8_tile_args *t) { s8_tile_any(mr, nv, 1, t); }
FB_S8_TILES(FB_TILE)
#undef FB_TILE

#define FB_TILE(mr, nv)                                                                                                \
    [mr][nv] = {s8_tile_##mr##x##nv, FB_S8_FETCHES(mr) ? s8_first_##mr##x##nv : s8_tile_##mr##x##nv},
static fb_s8_tile *const s8_tiles[FB_S8_MR + 1][8 + 1][2] = {FB_S8_TILES(FB_TILE)}; /* [rows][strips][fetch] */
#undef FB_TILE

/* As gemm_s8, for m, n >= 1; prepared: these rows, with FB_S8_PAIRS. */
static void s8_rows(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
                    const int32_t *zero, const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc,
                    const s8_prepared *prepared)
{
    const ptrdiff_t row_groups = (m + FB_S8_MR - 1) / FB_S8_MR, strip_bytes = s8_strip_bytes(k);
    const parts of_rows = parts_of(m, row_groups);
    const ptrdiff_t strips = (n + 15) / 16, wide = fb_s8_strips[part_size(of_rows, 0)];
    const ptrdiff_t strip_groups = (strips + wide - 1) / wide;
    const parts of_strips = parts_of(strips, strip_groups);
    fb_s8_tile_args t = {.k = (k + 31) / 32 * 32,
                         .lda = lda,
                         .strip_bytes = strip_bytes,
                         .act = epilogue->act,
                         .ldr = epilogue->ldr,
                         .ldc = ldc,
                         .prepared = prepared};
    for (ptrdiff_t g = 0, s = 0, nv; g < strip_groups; g++, s += nv) {
        nv = part_size(of_strips, g);
        const ptrdiff_t column = s * 16, columns = (s + nv) * 16 <= n ? nv * 16 : n - column;
        const int more = row_groups > 1 && g + 1 < strip_groups, longer = nv * strip_bytes > S8_STAYS;
        const float *residual = epilogue->residual ? epilogue->residual + column : NULL;
        t.strip = (const int8_t *)packed + s * strip_bytes;
        t.bias = epilogue->bias ? epilogue->bias + column : NULL;
        t.last_columns = columns - (nv - 1) * 16;
        for (ptrdiff_t h = 0, i = 0, mr; h < row_groups; h++, i += mr) {
            mr = part_size(of_rows, h);
            t.a = a + i * lda;
            t.scale_a = scale_a + i;
            t.zero = zero + i;
            t.ahead = more && h < nv ? (nv + h) * strip_bytes : 0;
            t.residual = residual ? residual + i * epilogue->ldr : NULL;
            t.c = c + i * ldc + column;
            t.row = i;
            s8_tiles[mr][nv][h < nv || h + 1 == row_groups || longer](&t);
        }
    }
}

static void FB_ISA_NAME(gemm_s8)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda,
                                 const float *scale_a, const int32_t *zero, const void *packed,
                                 const fb_epilogue *epilogue, float *c, ptrdiff_t ldc)
{
    if (m <= 0 || n <= 0)
        return;
#ifdef FB_S8_PAIRS
    s8_prepared prepared;
    const ptrdiff_t blocks = (m + s8_prepared_rows(k) - 1) / s8_prepared_rows(k);
    for (ptrdiff_t b = 0; b < blocks; b++) {
        const ptrdiff_t i = m * b / blocks, rows = m * (b + 1) / blocks - i;
        fb_epilogue e = *epilogue;
        e.residual = e.residual ? e.residual + i * e.ldr : NULL;
        s8_prepare(rows, k, a + i * lda, lda, zero + i, &prepared);
        s8_rows(rows, n, k, (const uint8_t *)prepared.in, (k + 31) / 32 * 32, scale_a + i, prepared.zero, packed, &e,
                c + i * ldc, ldc, &prepared);
    }
#else
    s8_rows(m, n, k, a, lda, scale_a, zero, packed, epilogue, c, ldc, NULL);
#endif
}

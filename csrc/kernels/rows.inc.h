/* rows.inc.h: the row operations, written once over the 16-lane vector of simd_*.h: softmax, also in bytes, LayerNorm, mixing,
 * quantising.
 *
 * A kernel file includes its simd_*.h, activations.inc.h and epilogue.inc.h, defines FB_ISA_NAME(op), and includes this file.
 */
#include "unroll.h"

enum { ROWS_IN_STEP = 4 };

/* In two chains: one would wait for each comparison. */
static inline float row_largest(ptrdiff_t n, const float *x)
{
    const ptrdiff_t body = n - n % 16;
    vf largest = v_set1(-INFINITY), other = largest;
    for (ptrdiff_t j = 0; j < body; j += 32) {
        largest = v_max(largest, v_load(x + j));
        other = v_max(other, v_load(x + (j + 16 < body ? j + 16 : j)));
    }
    if (body < n)
        other = v_max(other, v_load_n(x + body, n - body, -INFINITY));
    return v_largest(v_max(largest, other));
}

static const float lane_numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* m rows in step: a row's largest element, and then its sum, are awaited. */
static inline __attribute__((always_inline)) void softmax_rows(const int m, ptrdiff_t n, vf c, vf low, vf lowest,
                                                               float *x, ptrdiff_t ldx)
{
    const ptrdiff_t body = n - n % 16, tail = n - body;
    float most[ROWS_IN_STEP], inverse[ROWS_IN_STEP];
    vf last[ROWS_IN_STEP]; /* not stored until it is finished: a load after a store of a part of a vector waits long */
    FB_UNROLL
    for (int i = 0; i < m; i++)
        most[i] = row_largest(n, x + i * ldx);
    FB_UNROLL
    for (int i = 0; i < m; i++) {
        float *row = x + i * ldx;
        vf sum = last[i] = v_set1(0.0f);
        for (ptrdiff_t j = 0; j < body; j += 16) {
            const vf e = v_exp2_times(v_max(lowest, v_sub(v_load(row + j), v_set1(most[i]))), c, low);
            v_store(row + j, e);
            sum = v_add(sum, e);
        }
        if (tail) {
            const vf d = v_max(lowest, v_sub(v_load_n(row + body, tail, 0.0f), v_set1(most[i])));
            last[i] = v_ifgt(v_set1((float)tail), v_load(lane_numbers), v_exp2_times(d, c, low), v_set1(0.0f));
            sum = v_add(sum, last[i]);
        }
        inverse[i] = 1.0f / v_sum(sum);
    }
    FB_UNROLL
    for (int i = 0; i < m; i++) {
        float *row = x + i * ldx;
        for (ptrdiff_t j = 0; j < body; j += 16)
            v_store(row + j, v_mul(v_load(row + j), v_set1(inverse[i])));
        if (tail)
            v_store_n(row + body, v_mul(last[i], v_set1(inverse[i])), tail);
    }
}

static void FB_ISA_NAME(softmax_f32)(ptrdiff_t rows, ptrdiff_t n, float scale, float *x, ptrdiff_t ldx)
{
    const double exponent = (double)scale * 1.4426950408889634; /* of 2 */
    const float rounded = (float)exponent;
    const vf c = v_set1(rounded), low = v_set1((float)(exponent - (double)rounded)), lowest = v_set1(-87.3f / scale);
    for (; rows >= ROWS_IN_STEP; rows -= ROWS_IN_STEP, x += ROWS_IN_STEP * ldx)
        softmax_rows(ROWS_IN_STEP, n, c, low, lowest, x, ldx);
    for (; rows > 0; rows--, x += ldx)
        softmax_rows(1, n, c, low, lowest, x, ldx);
}

/* softmax_u8 awaits the largest elements of so many rows at once: 1.1 times as fast as row by row. */
enum { MAXIMA_AT_ONCE = 4 };

/* q of 64 elements, or of the first n where it is fewer, whose sum each lane adds to its own. The sums start at 1.5 * 2^23, where
 * neighbouring float32 are 1 apart: adding e to one rounds e, and what the bits of the sum grow by is q. */
static inline __attribute__((always_inline)) vf exp_u8(ptrdiff_t n, const float *x, vf most, vf sum, uint8_t *q)
{
    vi bytes[FB_K8 / 16];
    FB_UNROLL
    for (ptrdiff_t at = 0; at < FB_K8; at += 16) {
        bytes[at / 16] = vi_set1(0);
        if (at >= n)
            continue;
        const vf v = at + 16 <= n ? v_load(x + at) : v_load_n(x + at, n - at, -INFINITY);
        const vf before = sum;
        sum = v_add(sum, v_exp_255(v_sub(v, most)));
        bytes[at / 16] = vi_sub(v_bits(sum), v_bits(before));
    }
    vi_to_u8x64(q, bytes);
    return sum;
}

static void FB_ISA_NAME(softmax_u8)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, uint8_t *q,
                                    ptrdiff_t ldq, float *scale)
{
    const vf start = v_set1(12582912.0f);
    float largest[MAXIMA_AT_ONCE];
    for (ptrdiff_t i = 0; i < rows; i++, x += ldx, q += ldq) {
        for (ptrdiff_t r = 0; i % MAXIMA_AT_ONCE == 0 && r < MAXIMA_AT_ONCE && i + r < rows; r++)
            largest[r] = row_largest(n, x + r * ldx);
        const vf most = v_set1(largest[i % MAXIMA_AT_ONCE]);
        vf sum = start;
        ptrdiff_t j = 0;
        for (; j + FB_K8 <= n; j += FB_K8)
            sum = exp_u8(FB_K8, x + j, most, sum, q + j);
        if (j < n)
            sum = exp_u8(n - j, x + j, most, sum, q + j);
        const float total = v_sum(v_sub(sum, start)); /* whole numbers below 2^24: exact */
        if (!(total > 0.0f))
            memset(q, 0, (size_t)fb_k8(n));
        scale[i] = 1.0f / total;
    }
}

static inline __attribute__((always_inline)) void layernorm_columns(const int m, ptrdiff_t columns, const float *x,
                                                                    ptrdiff_t ldx, const float *mean, const float *rstd,
                                                                    const float *gamma, const float *beta, float *y,
                                                                    ptrdiff_t ldy)
{
    const vf g = load_columns(gamma, columns), b = load_columns(beta, columns);
    FB_UNROLL
    for (int i = 0; i < m; i++) {
        const vf d = v_mul(v_sub(load_columns(x + i * ldx, columns), v_set1(mean[i])), v_set1(rstd[i]));
        store_columns(y + i * ldy, v_fma(d, g, b), columns);
    }
}

/* m rows in step: a sum is a chain in which each addition waits for the one before. */
static inline __attribute__((always_inline)) void layernorm_rows(const int m, ptrdiff_t n, const float *x,
                                                                 ptrdiff_t ldx, const float *gamma, const float *beta,
                                                                 float eps, float *y, ptrdiff_t ldy)
{
    const ptrdiff_t body = n - n % 16, tail = n - body;
    vf sum[ROWS_IN_STEP], squares[ROWS_IN_STEP];
    float mean[ROWS_IN_STEP], rstd[ROWS_IN_STEP];
    FB_UNROLL
    for (int i = 0; i < m; i++)
        sum[i] = squares[i] = v_set1(0.0f);
    for (ptrdiff_t j = 0; j < body; j += 16)
        FB_UNROLL
    for (int i = 0; i < m; i++)
        sum[i] = v_add(sum[i], v_load(x + i * ldx + j));
    FB_UNROLL
    for (int i = 0; i < m; i++) {
        if (tail)
            sum[i] = v_add(sum[i], v_load_n(x + i * ldx + body, tail, 0.0f));
        mean[i] = v_sum(sum[i]) / (float)n;
    }
    for (ptrdiff_t j = 0; j < body; j += 16)
        FB_UNROLL
    for (int i = 0; i < m; i++) {
        const vf d = v_sub(v_load(x + i * ldx + j), v_set1(mean[i]));
        squares[i] = v_fma(d, d, squares[i]);
    }
    FB_UNROLL
    for (int i = 0; i < m; i++) {
        if (tail) {
            const vf d = v_sub(v_load_n(x + i * ldx + body, tail, mean[i]), v_set1(mean[i]));
            squares[i] = v_fma(d, d, squares[i]);
        }
        rstd[i] = 1.0f / sqrtf(v_sum(squares[i]) / (float)n + eps);
    }
    for (ptrdiff_t j = 0; j < body; j += 16)
        layernorm_columns(m, 16, x + j, ldx, mean, rstd, gamma + j, beta + j, y + j, ldy);
    if (tail)
        layernorm_columns(m, tail, x + body, ldx, mean, rstd, gamma + body, beta + body, y + body, ldy);
}

static void FB_ISA_NAME(layernorm_f32)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, const float *gamma,
                                       const float *beta, float eps, float *y, ptrdiff_t ldy)
{
    for (; rows >= ROWS_IN_STEP; rows -= ROWS_IN_STEP, x += ROWS_IN_STEP * ldx, y += ROWS_IN_STEP * ldy)
        layernorm_rows(ROWS_IN_STEP, n, x, ldx, gamma, beta, eps, y, ldy);
    for (; rows > 0; rows--, x += ldx, y += ldy)
        layernorm_rows(1, n, x, ldx, gamma, beta, eps, y, ldy);
}

/* ---- int8: mixing and quantising ---- */

/* n vectors, n a power of two, through the Hadamard butterfly: strides 1, 2, 4, ... */
static inline __attribute__((always_inline)) void butterfly(vf *r, const int n)
{
    FB_UNROLL
    for (int half = 1; half < n; half *= 2)
        FB_UNROLL
    for (int i = 0; i < n; i++)
        if ((i & half) == 0) {
            const vf a = r[i], b = r[i + half];
            r[i] = v_add(a, b);
            r[i + half] = v_sub(a, b);
        }
}

/* The bits of the largest and the smallest element of a row, lane by lane: as signed integers floats without a sign are in
 * order, as unsigned ones those with one come after all others, the smallest last. A NaN or an infinity is beyond all else. */
typedef struct {
    vi high, low; /* at least 0, at most -0 */
} extremes;

static inline extremes nothing_seen(void) { return (extremes){vi_set1(0), vi_set1(INT32_MIN)}; }
static inline void see(extremes *e, vf v)
{
    e->high = vi_max(e->high, v_bits(v));
    e->low = vi_max_unsigned(e->low, v_bits(v));
}

/* One of the two passes over a row of n: butterflies of `radix` vectors `stride` floats apart; `fold`: of their octets, the
 * halves of a vector first. The last pass reflects, where it is of 3 runs, and sees what it writes. */
static inline __attribute__((always_inline)) void mix_pass(const int radix, const int fold, const int runs,
                                                           const int last, ptrdiff_t n, ptrdiff_t run, ptrdiff_t stride,
                                                           const float *x, float *y, extremes *seen)
{
    extremes e = *seen;
    for (ptrdiff_t j = 0; j < n; j += runs * run)
        for (ptrdiff_t at = j; at < j + stride; at += 16) {
            vf r[3][8];
            FB_UNROLL
            for (int t = 0; t < runs; t++) {
                FB_UNROLL
                for (int i = 0; i < radix; i++) {
                    const vf v = v_load(x + at + t * run + i * stride);
                    r[t][i] = fold ? v_fold(v) : v;
                }
                butterfly(r[t], radix);
            }
            FB_UNROLL
            for (int i = 0; runs == 3 && i < radix; i++) {
                const vf m = v_mul(v_add(v_add(r[0][i], r[1][i]), r[2][i]), v_set1(2.0f / 3.0f));
                FB_UNROLL
                for (int t = 0; t < 3; t++)
                    r[t][i] = v_sub(r[t][i], m);
            }
            FB_UNROLL
            for (int t = 0; t < runs; t++)
                FB_UNROLL
            for (int i = 0; i < radix; i++) {
                v_store(y + at + t * run + i * stride, r[t][i]);
                if (last)
                    see(&e, r[t][i]);
            }
        }
    *seen = e;
}

/* How rows of n are mixed: in runs of so many floats, and a number for their vectors and whether they are reflected. Found
 * once for many rows, for it takes divisions. */
typedef struct {
    ptrdiff_t n, run, kind;
} mixing;

enum { REFLECTED = 10 };
static inline mixing mixing_of(ptrdiff_t n)
{
    const ptrdiff_t run = fb_mix_gain(n) * 8, vectors = run / 16;
    return (mixing){n, run, vectors + (vectors > 0 && n % (3 * run) == 0 ? REFLECTED : 0)};
}

/* y = M x for one row, and what was seen in y. A butterfly of up to 64 vectors is two of up to 8: neighbours first, then
 * vectors 8 apart. */
static inline __attribute__((always_inline)) void mix_row(const mixing *how, const float *x, float *y, extremes *seen)
{
    const ptrdiff_t n = how->n, run = how->run, near = 8 * 16;
    if (run > near)
        mix_pass(8, 1, 1, 0, n, near, 16, x, y, seen);
    switch (how->kind) {
    case 0:
        for (ptrdiff_t j = 0; j < n; j += 16) {
            const ptrdiff_t lanes = n - j < 16 ? n - j : 16;
            const vf v = lanes == 16 ? v_load(x + j) : v_load_n(x + j, lanes, 0.0f);
            see(seen, v);
            if (lanes == 16)
                v_store(y + j, v);
            else
                v_store_n(y + j, v, lanes);
        }
        break;
    case 1: mix_pass(1, 1, 1, 1, n, run, 16, x, y, seen); break;
    case 2: mix_pass(2, 1, 1, 1, n, run, 16, x, y, seen); break;
    case 4: mix_pass(4, 1, 1, 1, n, run, 16, x, y, seen); break;
    case 8: mix_pass(8, 1, 1, 1, n, run, 16, x, y, seen); break;
    case 16: mix_pass(2, 0, 1, 1, n, run, near, y, y, seen); break;
    case 32: mix_pass(4, 0, 1, 1, n, run, near, y, y, seen); break;
    case 64: mix_pass(8, 0, 1, 1, n, run, near, y, y, seen); break;
    case REFLECTED + 1: mix_pass(1, 1, 3, 1, n, run, 16, x, y, seen); break;
    case REFLECTED + 2: mix_pass(2, 1, 3, 1, n, run, 16, x, y, seen); break;
    case REFLECTED + 4: mix_pass(4, 1, 3, 1, n, run, 16, x, y, seen); break;
    case REFLECTED + 8: mix_pass(8, 1, 3, 1, n, run, 16, x, y, seen); break;
    case REFLECTED + 16: mix_pass(2, 0, 3, 1, n, run, near, y, y, seen); break;
    case REFLECTED + 32: mix_pass(4, 0, 3, 1, n, run, near, y, y, seen); break;
    case REFLECTED + 64: mix_pass(8, 0, 3, 1, n, run, near, y, y, seen); break;
    }
}

static void FB_ISA_NAME(mix_f32)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, float *y, ptrdiff_t ldy)
{
    const mixing how = mixing_of(n);
    extremes seen = nothing_seen();
    for (ptrdiff_t i = 0; i < rows; i++)
        mix_row(&how, x + i * ldx, y + i * ldy, &seen);
}

static void see_row(ptrdiff_t k, const float *x, extremes *seen)
{
    const ptrdiff_t body = k - k % 16;
    extremes e = *seen;
    for (ptrdiff_t j = 0; j < body; j += 16)
        see(&e, v_load(x + j));
    if (body < k)
        see(&e, v_load_n(x + body, k - body, 0.0f));
    *seen = e;
}

static inline __attribute__((always_inline)) void quantize_row(ptrdiff_t k, const float *x, float inverse, int32_t zero,
                                                               uint8_t *q)
{
    const vf vinverse = v_set1(inverse);
    vf v[4];
    ptrdiff_t j = 0;
    for (; j + 64 <= k; j += 64) {
        FB_UNROLL
        for (int i = 0; i < 4; i++)
            v[i] = v_mul(v_load(x + j + i * 16), vinverse);
        v_to_u8x4(q + j, v, zero);
    }
    if (j < k) { /* lanes from k on are -infinity, which becomes 0 whatever the zero point */
        FB_UNROLL
        for (int i = 0; i < 4; i++) {
            const float *from = x + j + i * 16;
            const ptrdiff_t left = k - j - i * 16;
            v[i] = left >= 16 ? v_load(from) : left > 0 ? v_load_n(from, left, -INFINITY) : v_set1(-INFINITY);
            v[i] = v_mul(v[i], vinverse);
        }
        v_to_u8x4(q + j, v, zero);
    }
}

/* Rows in step, one for each lane of what is computed from their extremes, or as many as so many floats are, which stay in the
 * L1 cache: divisions take long. While they are awaited, the rows before are quantised. */
enum { ROWS_AT_ONCE = 16, QUANTIZE_FLOATS = 3072 };

/* scale, zero and 1 / scale of `count` rows; y = M x where it is not x. */
static inline __attribute__((always_inline)) void measure_rows(const mixing *how, ptrdiff_t count, ptrdiff_t k,
                                                               const float *x, ptrdiff_t ldx, float *y, ptrdiff_t ldy,
                                                               float *scale, int32_t *zero, float *inverse)
{
    float hi[ROWS_AT_ONCE] = {0}, minus_lo[ROWS_AT_ONCE] = {0};
    int32_t zeros[ROWS_AT_ONCE];
    for (ptrdiff_t i = 0; i < count; i++) {
        extremes e = nothing_seen();
        if (how)
            mix_row(how, x + i * ldx, y + i * ldy, &e);
        else
            see_row(k, x + i * ldx, &e);
        v_largest2(e.high, vi_xor(e.low, vi_set1(INT32_MIN)), hi + i, minus_lo + i);
    }
    const vf none = v_set1(0.0f), most = v_set1(255.0f), magic = v_set1(12582912.0f), below = v_set1(0x1.fffffep-121f);
    const vf bad = v_fma(v_load(hi), none, v_mul(v_load(minus_lo), none)); /* NaN where one is not finite, else 0 */
    const vf step = v_add(v_add(v_div(v_load(hi), most), v_div(v_load(minus_lo), most)), bad);
    const vf vinverse = v_ifgt(step, below, v_div(v_set1(1.0f), step), none);
    v_store_n(scale, v_add(v_ifgt(step, below, step, none), bad), count);
    v_store(inverse, vinverse);
    const vf rounded = v_ifgt(step, below, v_add(v_mul(v_load(minus_lo), vinverse), magic), magic);
    vi_store(zeros, vi_sub(v_bits(rounded), v_bits(magic)));
    memcpy(zero, zeros, (size_t)count * sizeof *zero);
}

/* y is quantised: M x where it is not x. */
static inline __attribute__((always_inline)) void quantize(const int mixed, ptrdiff_t rows, ptrdiff_t k, const float *x,
                                                           ptrdiff_t ldx, float *y, ptrdiff_t ldy, uint8_t *q,
                                                           ptrdiff_t ldq, float *scale, int32_t *zero)
{
    const float *from = mixed ? y : x;
    const ptrdiff_t ld = mixed ? ldy : ldx, fit = QUANTIZE_FLOATS / (k > 0 ? k : 1);
    const ptrdiff_t most = fit < 1 ? 1 : fit < ROWS_AT_ONCE ? fit : ROWS_AT_ONCE;
    const mixing how = mixing_of(k);
    float inverse[2][ROWS_AT_ONCE]; /* of the rows measured now, and of those before */
    ptrdiff_t at = 0, measured = 0;
    for (int turn = 0; at < rows; turn = !turn) {
        const ptrdiff_t count = rows - measured < most ? rows - measured : most;
        if (count > 0)
            measure_rows(mixed ? &how : NULL, count, k, x + measured * ldx, ldx, mixed ? y + measured * ldy : NULL, ldy,
                         scale + measured, zero + measured, inverse[turn]);
        for (ptrdiff_t i = at; i < measured; i++)
            quantize_row(k, from + i * ld, inverse[!turn][i - at], zero[i], q + i * ldq);
        at = measured;
        measured += count;
    }
}

static void FB_ISA_NAME(quantize_u8)(ptrdiff_t rows, ptrdiff_t k, const float *x, ptrdiff_t ldx, uint8_t *q,
                                     ptrdiff_t ldq, float *scale, int32_t *zero)
{
    quantize(0, rows, k, x, ldx, NULL, 0, q, ldq, scale, zero);
}

static void FB_ISA_NAME(mix_quantize_u8)(ptrdiff_t rows, ptrdiff_t k, const float *x, ptrdiff_t ldx, float *y,
                                         ptrdiff_t ldy, uint8_t *q, ptrdiff_t ldq, float *scale, int32_t *zero)
{
    quantize(1, rows, k, x, ldx, y, ldy, q, ldq, scale, zero);
}

/* rows.inc.h: the row operations, written once over the 16-lane vector of simd_*.h: softmax, also in bytes, LayerNorm, mixing,
 * quantising.
 *
 * A kernel file includes its simd_*.h and activations.inc.h, defines FB_ISA_NAME(op), and includes this file.
 */
#include "unroll.h"

static void FB_ISA_NAME(softmax_f32)(ptrdiff_t rows, ptrdiff_t n, float scale, float *x, ptrdiff_t ldx)
{
    const ptrdiff_t body = n - n % 16, tail = n - body;
    const vf vscale = v_set1(scale);
    for (ptrdiff_t i = 0; i < rows; i++, x += ldx) {
        vf largest = v_set1(-INFINITY);
        for (ptrdiff_t j = 0; j < body; j += 16)
            largest = v_max(largest, v_load(x + j));
        if (tail)
            largest = v_max(largest, v_load_n(x + body, tail, -INFINITY));
        const vf most = v_set1(v_largest(largest));
        vf sum = v_set1(0.0f);
        for (ptrdiff_t j = 0; j < body; j += 16) {
            const vf e = v_exp(v_mul(v_sub(v_load(x + j), most), vscale));
            v_store(x + j, e);
            sum = v_add(sum, e);
        }
        if (tail) {
            v_store_n(x + body, v_exp(v_mul(v_sub(v_load_n(x + body, tail, 0.0f), most), vscale)), tail);
            sum = v_add(sum, v_load_n(x + body, tail, 0.0f));
        }
        const vf inverse = v_set1(1.0f / v_sum(sum));
        for (ptrdiff_t j = 0; j < body; j += 16)
            v_store(x + j, v_mul(v_load(x + j), inverse));
        if (tail)
            v_store_n(x + body, v_mul(v_load_n(x + body, tail, 0.0f), inverse), tail);
    }
}

/* The lanes' sums start at 1.5 * 2^23, where neighbouring float32 are 1 apart: adding e to one rounds e, and what the bits
 * of the sum grow by is q. */
static void FB_ISA_NAME(softmax_u8)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, uint8_t *q,
                                    ptrdiff_t ldq, float *scale)
{
    const ptrdiff_t body = n - n % 16, tail = n - body;
    const vf start = v_set1(12582912.0f);
    for (ptrdiff_t i = 0; i < rows; i++, x += ldx, q += ldq) {
        vf largest = v_set1(-INFINITY);
        for (ptrdiff_t j = 0; j < body; j += 16)
            largest = v_max(largest, v_load(x + j));
        if (tail)
            largest = v_max(largest, v_load_n(x + body, tail, -INFINITY));
        const vf most = v_set1(v_largest(largest));
        vf sum = start;
        for (ptrdiff_t j = 0; j < n; j += FB_K8) {
            vi bytes[FB_K8 / 16];
            FB_UNROLL
            for (ptrdiff_t at = 0; at < FB_K8; at += 16) {
                bytes[at / 16] = vi_set1(0);
                if (j + at >= n)
                    continue;
                const vf v = j + at < body ? v_load(x + j + at) : v_load_n(x + body, tail, -INFINITY);
                const vf before = sum;
                sum = v_add(sum, v_exp_255(v_sub(v, most)));
                bytes[at / 16] = vi_sub(v_bits(sum), v_bits(before));
            }
            vi_to_u8x64(q + j, bytes);
        }
        const float total = v_sum(v_sub(sum, start)); /* whole numbers below 2^24: exact */
        if (!(total > 0.0f))
            memset(q, 0, (size_t)fb_k8(n));
        scale[i] = 1.0f / total;
    }
}

static void FB_ISA_NAME(layernorm_f32)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, const float *gamma,
                                       const float *beta, float eps, float *y, ptrdiff_t ldy)
{
    const ptrdiff_t body = n - n % 16, tail = n - body;
    for (ptrdiff_t i = 0; i < rows; i++, x += ldx, y += ldy) {
        vf sum = v_set1(0.0f);
        for (ptrdiff_t j = 0; j < body; j += 16)
            sum = v_add(sum, v_load(x + j));
        if (tail)
            sum = v_add(sum, v_load_n(x + body, tail, 0.0f));
        const float mean = v_sum(sum) / (float)n;
        const vf vmean = v_set1(mean);
        vf squares = v_set1(0.0f);
        for (ptrdiff_t j = 0; j < body; j += 16) {
            const vf d = v_sub(v_load(x + j), vmean);
            squares = v_fma(d, d, squares);
        }
        if (tail) {
            const vf d = v_sub(v_load_n(x + body, tail, mean), vmean);
            squares = v_fma(d, d, squares);
        }
        const vf rstd = v_set1(1.0f / sqrtf(v_sum(squares) / (float)n + eps));
        for (ptrdiff_t j = 0; j < body; j += 16) {
            const vf d = v_mul(v_sub(v_load(x + j), vmean), rstd);
            v_store(y + j, v_fma(d, v_load(gamma + j), v_load(beta + j)));
        }
        if (tail) {
            const vf d = v_mul(v_sub(v_load_n(x + body, tail, 0.0f), vmean), rstd);
            const vf g = v_load_n(gamma + body, tail, 0.0f), b = v_load_n(beta + body, tail, 0.0f);
            v_store_n(y + body, v_fma(d, g, b), tail);
        }
    }
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

/* y[i] = butterfly of x[i] for n vectors `stride` floats apart; `fold`: of their octets, the halves of a vector first. */
static inline __attribute__((always_inline)) void mix_some(const int n, const int fold, const float *x, float *y,
                                                           ptrdiff_t stride)
{
    vf r[8];
    FB_UNROLL
    for (int i = 0; i < n; i++)
        r[i] = fold ? v_fold(v_load(x + i * stride)) : v_load(x + i * stride);
    butterfly(r, n);
    FB_UNROLL
    for (int i = 0; i < n; i++)
        v_store(y + i * stride, r[i]);
}

static inline __attribute__((always_inline)) void mix_by(ptrdiff_t radix, const int fold, const float *x, float *y,
                                                         ptrdiff_t stride)
{
    switch (radix) {
    case 1: mix_some(1, fold, x, y, stride); break;
    case 2: mix_some(2, fold, x, y, stride); break;
    case 4: mix_some(4, fold, x, y, stride); break;
    default: mix_some(8, fold, x, y, stride); break;
    }
}

/* A butterfly of up to 64 vectors is two of up to 8: neighbours first, then vectors 8 apart. */
static void FB_ISA_NAME(mix_f32)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, float *y, ptrdiff_t ldy)
{
    const ptrdiff_t run = (ptrdiff_t)fb_mix_gain(n) * 8, vectors = run / 16, inner = vectors < 8 ? vectors : 8;
    const int threes = n % (3 * run) == 0;
    for (ptrdiff_t i = 0; i < rows; i++, x += ldx, y += ldy) {
        if (vectors == 0) {
            for (ptrdiff_t j = 0; j < n; j++)
                y[j] = x[j];
            continue;
        }
        for (ptrdiff_t j = 0; j < n; j += inner * 16)
            mix_by(inner, 1, x + j, y + j, 16);
        for (ptrdiff_t j = 0; vectors > inner && j < n; j += run)
            for (ptrdiff_t at = 0; at < inner * 16; at += 16)
                mix_by(vectors / inner, 0, y + j + at, y + j + at, inner * 16);
        for (ptrdiff_t j = 0; threes && j < n; j += 3 * run)
            for (float *p = y + j; p < y + j + run; p += 16) {
                const vf a = v_load(p), b = v_load(p + run), c = v_load(p + 2 * run);
                const vf m = v_mul(v_add(v_add(a, b), c), v_set1(2.0f / 3.0f));
                v_store(p, v_sub(a, m));
                v_store(p + run, v_sub(b, m));
                v_store(p + 2 * run, v_sub(c, m));
            }
    }
}

/* ROWS_AT_ONCE rows in step: what becomes of one row while the reductions of another are on their way. */
enum { ROWS_AT_ONCE = 4 };

static void FB_ISA_NAME(quantize_u8)(ptrdiff_t rows, ptrdiff_t k, const float *x, ptrdiff_t ldx, uint8_t *q,
                                     ptrdiff_t ldq, float *scale, int32_t *zero)
{
    const ptrdiff_t body = k - k % 16, tail = k - body;
    for (ptrdiff_t at = 0; at < rows; at += ROWS_AT_ONCE) {
        const ptrdiff_t end = rows - at < ROWS_AT_ONCE ? rows : at + ROWS_AT_ONCE;
        float inverse[ROWS_AT_ONCE];
        for (ptrdiff_t i = at; i < end; i++) {
            vf high = v_set1(0.0f), low = high, bad = high;
            for (ptrdiff_t j = 0; j < k; j += 16) {
                const vf v = j < body ? v_load(x + i * ldx + j) : v_load_n(x + i * ldx + j, tail, 0.0f);
                high = v_max(v, high);
                low = v_min(v, low);
                bad = v_fma(v, v_set1(0.0f), bad); /* NaN where v is not finite */
            }
            const float hi = v_largest(high), minus_lo = v_largest(v_sub(v_set1(0.0f), low)), nan = v_sum(bad);
            const float step = hi / 255.0f + minus_lo / 255.0f;
            const int used = step >= 0x1p-120f && nan == 0.0f;
            inverse[i - at] = used ? 1.0f / step : 0.0f;
            scale[i] = (used ? step : 0.0f) + nan;
            zero[i] = used ? (int32_t)lrintf(minus_lo * inverse[i - at]) : 0;
        }
        for (ptrdiff_t i = at; i < end; i++) {
            const vf vinverse = v_set1(inverse[i - at]);
            const vi vzero = vi_set1(zero[i]);
            for (ptrdiff_t j = 0; j < k; j += 16) {
                const vf v = j < body ? v_load(x + i * ldx + j) : v_load_n(x + i * ldx + j, tail, 0.0f);
                v_to_u8(q + i * ldq + j, v_mul(v, vinverse), vzero, j < body ? 16 : tail);
            }
            for (ptrdiff_t j = k; j < fb_k8(k); j++)
                q[i * ldq + j] = 0;
        }
    }
}

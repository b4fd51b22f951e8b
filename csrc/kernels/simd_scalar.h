/* simd_scalar.h: the 16-lane vector of rows.inc.h and gemm_f32.inc.h in plain C: any CPU, any compiler.
 *
 * The three simd_*.h give the same names with the same results to the last bit:
 *   vf                          16 float32 lanes
 *   v_load_n, v_store_n         the first n lanes, 1 <= n <= 16; absent lanes are loaded as `fill`, memory is not touched
 *   v_max(limit, x), v_min      x when the comparison is unordered: a NaN in x stays
 *   v_fma(a, b, c), v_fnma      a * b + c and c - a * b, rounded once
 *   v_sum                       the tree of kernels.h: lane l + lane l+8, then l+4, l+2, l+1
 *   v_scale2(p, t)              p * 2^i, i = -126 .. 127 the integer that t = x + 1.5 * 2^23 + 127 carries, with 127 added, in its low bits
 *   v_ifgt(a, b, x, y)          a > b ? x : y, lane by lane
 *   v_fold(x)                   lanes l and l + 8: their sum in l, the difference x[l] - x[l + 8] in l + 8
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float l[16];
} vf;

#define FB_LANES for (int i = 0; i < 16; i++)

static inline vf v_set1(float x)
{
    vf r;
    FB_LANES r.l[i] = x;
    return r;
}
static inline vf v_load(const float *p)
{
    vf r;
    memcpy(r.l, p, sizeof r.l);
    return r;
}
static inline vf v_load_n(const float *p, ptrdiff_t n, float fill)
{
    vf r;
    FB_LANES r.l[i] = i < n ? p[i] : fill;
    return r;
}
static inline void v_store(float *p, vf a) { memcpy(p, a.l, sizeof a.l); }
static inline void v_store_n(float *p, vf a, ptrdiff_t n) { memcpy(p, a.l, (size_t)n * sizeof(float)); }

#define FB_LANEWISE(name, expression)                                                                                  \
    static inline vf name(vf a, vf b)                                                                                  \
    {                                                                                                                  \
        FB_LANES a.l[i] = expression;                                                                                  \
        return a;                                                                                                      \
    }
FB_LANEWISE(v_add, a.l[i] + b.l[i])
FB_LANEWISE(v_sub, a.l[i] - b.l[i])
FB_LANEWISE(v_mul, a.l[i] * b.l[i])
FB_LANEWISE(v_div, a.l[i] / b.l[i])
FB_LANEWISE(v_max, a.l[i] > b.l[i] ? a.l[i] : b.l[i])
FB_LANEWISE(v_min, a.l[i] < b.l[i] ? a.l[i] : b.l[i])
FB_LANEWISE(v_copysign, copysignf(a.l[i], b.l[i]))

static inline vf v_fma(vf a, vf b, vf c)
{
    FB_LANES a.l[i] = fmaf(a.l[i], b.l[i], c.l[i]);
    return a;
}
static inline vf v_fnma(vf a, vf b, vf c)
{
    FB_LANES a.l[i] = fmaf(-a.l[i], b.l[i], c.l[i]);
    return a;
}
static inline vf v_abs(vf a)
{
    FB_LANES a.l[i] = fabsf(a.l[i]);
    return a;
}
static inline vf v_ifgt(vf a, vf b, vf x, vf y)
{
    FB_LANES a.l[i] = a.l[i] > b.l[i] ? x.l[i] : y.l[i];
    return a;
}
static inline vf v_scale2(vf p, vf t)
{
    uint32_t bits[16];
    memcpy(bits, t.l, sizeof bits);
    FB_LANES bits[i] <<= 23;
    memcpy(t.l, bits, sizeof bits);
    return v_mul(p, t);
}
static inline vf v_fold(vf a)
{
    for (int i = 0; i < 8; i++) {
        const float lo = a.l[i], hi = a.l[i + 8];
        a.l[i] = lo + hi;
        a.l[i + 8] = lo - hi;
    }
    return a;
}
static inline float v_sum(vf a)
{
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a.l[i] += a.l[i + half];
    return a.l[0];
}
static inline float v_largest(vf a)
{
    float r = a.l[0];
    for (int i = 1; i < 16; i++)
        r = r > a.l[i] ? r : a.l[i];
    return r;
}
/* r[i] lane j <-> r[j] lane i. */
static inline void v_transpose(vf r[16])
{
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            float t = r[i].l[j];
            r[i].l[j] = r[j].l[i];
            r[j].l[i] = t;
        }
}

/* ---- 16 int32 lanes ----
 *   v_to_u8x4   clamp(rint(lanes) + zero, 0, 255) of 64 lanes to as many bytes, ties to even; 0 for -infinity, and for a NaN
 *               with zero 0; other lanes are below 2^14, zero is 0 .. 255
 *   vi_row      four bytes of a row of A for all columns
 *   vi_dot      acc + the four products of each column: r a row's four bytes, w 16 columns by 4 steps of k; r unsigned, w
 *               signed, with s8_pairs.inc.h r signed and w unsigned
 *   v_bits      the bits of the lanes, and v_of_bits the lanes of such bits; vi_add, vi_sub and vi_shl are modulo 2^32
 *   v_largest2  the largest lane of each of two vectors that hold the bits of floats without a sign
 *   vi_to_u8x64 lanes of four vectors, each 0 .. 255, to 64 bytes
 *   vi_store_zipped   `count` vectors at a time, 2 or 4 of the 4: a lane of each in turn; only for FB_S8_DEPTH 8 and 16
 *   FB_A_SHIFT  vi_dot takes a - FB_A_SHIFT for a
 */
typedef struct {
    int32_t l[16];
} vi;

typedef const uint8_t *vrow;
static inline vrow vi_row(const void *p) { return p; }
static inline vi vi_set1(int32_t x)
{
    vi r;
    FB_LANES r.l[i] = x;
    return r;
}
static inline void v_to_u8x4(uint8_t *p, const vf a[4], int32_t zero)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    for (int i = 0; i < 64; i++) {
        const float x = a[i / 16].l[i % 16] + magic - magic + (float)zero;
        p[i] = (uint8_t)(x > 255.0f ? 255.0f : x > 0.0f ? x : 0.0f);
    }
}
static inline vi vi_load(const int32_t *p)
{
    vi r;
    memcpy(r.l, p, sizeof r.l);
    return r;
}
static inline void vi_store(int32_t *p, vi a) { memcpy(p, a.l, sizeof a.l); }
static inline vi v_bits(vf a)
{
    vi r;
    memcpy(r.l, a.l, sizeof r.l);
    return r;
}
static inline vf v_of_bits(vi a)
{
    vf r;
    memcpy(r.l, a.l, sizeof r.l);
    return r;
}
static inline vi vi_add(vi a, vi b)
{
    FB_LANES a.l[i] = (int32_t)((uint32_t)a.l[i] + (uint32_t)b.l[i]);
    return a;
}
static inline vi vi_max(vi a, vi b)
{
    FB_LANES a.l[i] = a.l[i] > b.l[i] ? a.l[i] : b.l[i];
    return a;
}
static inline vi vi_max_unsigned(vi a, vi b)
{
    FB_LANES a.l[i] = (uint32_t)a.l[i] > (uint32_t)b.l[i] ? a.l[i] : b.l[i];
    return a;
}
static inline void v_largest2(vi a, vi b, float *largest_a, float *largest_b)
{
    int32_t bits[2] = {0, 0};
    FB_LANES bits[0] = bits[0] > a.l[i] ? bits[0] : a.l[i];
    FB_LANES bits[1] = bits[1] > b.l[i] ? bits[1] : b.l[i];
    memcpy(largest_a, bits, sizeof *bits);
    memcpy(largest_b, bits + 1, sizeof *bits);
}
static inline vi vi_shl(vi a, int n)
{
    FB_LANES a.l[i] = (int32_t)((uint32_t)a.l[i] << n);
    return a;
}
static inline vi vi_xor(vi a, vi b)
{
    FB_LANES a.l[i] ^= b.l[i];
    return a;
}
static inline void vi_to_u8x64(uint8_t *p, const vi q[4])
{
    for (int j = 0; j < 4; j++)
        FB_LANES p[16 * j + i] = (uint8_t)q[j].l[i];
}
static inline vi vi_sub(vi a, vi b)
{
    FB_LANES a.l[i] = (int32_t)((uint32_t)a.l[i] - (uint32_t)b.l[i]);
    return a;
}
static inline vi vi_mul(vi a, vi b)
{
    FB_LANES a.l[i] *= b.l[i];
    return a;
}
static inline vf vi_to_f32(vi a)
{
    vf r;
    FB_LANES r.l[i] = (float)a.l[i];
    return r;
}

/* activations.inc.h: exp and the activations, written once over the 16-lane vector of simd_*.h.
 *
 * The same operations in the same order on every instruction set give the same bits everywhere.
 * Polynomials: minimax by Remez exchange in 40-digit arithmetic, coefficients rounded to float32.
 */

static inline vf v_horner(vf x, const float *c, int degree) /* c[0] + c[1] x + ... */
{
    vf r = v_set1(c[degree]);
    for (int i = degree - 1; i >= 0; i--)
        r = v_fma(r, x, v_set1(c[i]));
    return r;
}

/* What v_scale2 takes the exponent from: adding it rounds to an integer, which lies in the low bits with 127 added. */
#define FB_EXPONENT (12582912.0f + 127.0f)

/* e^x for x held in [-87.3, 88]; relative error < 2^-22.9. ln 2 is taken off in two parts, the first exact times n. */
static inline vf v_exp(vf x)
{
    static const float p[] = {1.0f, 1.0f, 0.499999911f, 0.166664198f, 0.0416682325f, 0.00837489869f, 0.00138367421f};
    const vf magic = v_set1(FB_EXPONENT);
    x = v_min(v_set1(88.0f), v_max(v_set1(-87.3f), x));
    const vf t = v_fma(x, v_set1(1.44269502f), magic);
    const vf n = v_sub(t, magic);
    vf r = v_fma(n, v_set1(-0.693359375f), x);
    r = v_fma(n, v_set1(2.12194442e-4f), r);
    return v_scale2(v_horner(r, p, 6), t);
}

/* 2^(x (c + low)) for x c in [-126, 0], |low| < 2^-24 c; the products are not rounded. Relative error < 2^-23.1. */
static inline vf v_exp2_times(vf x, vf c, vf low)
{
    static const float p[] = {1.0f,         0.69314724f,   0.24022652f,   0.055503104f,
                              0.009617693f, 0.0013406645f, 0.00015594684f};
    const vf magic = v_set1(FB_EXPONENT);
    const vf t = v_fma(x, c, magic);
    const vf r = v_fma(x, low, v_fma(x, c, v_sub(magic, t)));
    return v_scale2(v_horner(r, p, 6), t);
}

/* 255 e^x for x <= 0 as the eighth power of a cubic, held at x = -6.25 (0.48, which rounds to 0). The cubic is the one whose
 * power has the smallest error on [-6.25, 0], |error| < 0.0119; rounding adds 8 * 4 * 2^-24 of the value, < 0.0005. */
static inline vf v_exp_255(vf x)
{
    static const float p[] = {1.9990102f, 0.24971582f, 0.015329663f, 0.00051042525f};
    vf r = v_horner(v_max(v_set1(-6.25f), x), p, 3);
    r = v_mul(r, r);
    r = v_mul(r, r);
    return v_mul(r, r);
}

/* tanh x: below 0.625 an odd polynomial, above it 1 - 2 / (e^2|x| + 1). */
static inline vf v_tanh(vf x)
{
    static const float p[] = {-0.333332956f, 0.133317262f, -0.0537598617f, 0.0206970423f, -0.00576335844f};
    const vf one = v_set1(1.0f), a = v_abs(x), x2 = v_mul(x, x);
    const vf small = v_fma(v_mul(x2, x), v_horner(x2, p, 4), x);
    const vf e = v_exp(v_add(a, a));
    const vf large = v_sub(one, v_div(v_set1(2.0f), v_add(e, one)));
    return v_ifgt(v_set1(0.625f), a, small, v_copysign(large, x));
}

/* x / (1 + e^-z); 0 with the sign of x where e^z leaves the range of float32. */
static inline vf v_sigmoid_times(vf x, vf z)
{
    const vf e = v_exp(v_sub(v_set1(0.0f), z));
    return v_ifgt(z, v_set1(-87.0f), v_div(x, v_add(v_set1(1.0f), e)), v_mul(x, v_set1(0.0f)));
}

/* x Phi(x) = h - |h| e with h = x / 2, e = erfc(|x| / sqrt 2) - 1. The eighth root of that erfc is nearly a polynomial; it
 * is raised as (1 + e)^2 - 1 = e e + 2 e, which keeps the digits of a small e. Error of the polynomial's part < 5e-9. Held at
 * |h| = 2.85, where e rounds to -1: the result is exactly x or 0 from there on. */
static inline vf v_gelu(vf x)
{
    static const float p[] = {-0.19947094f,  -0.13926433f,   -0.005887312f, 0.026297381f,
                              0.0011423668f, -0.0041714353f, 0.0010328242f, -8.1105136e-05f};
    const vf h = v_mul(x, v_set1(0.5f)), a = v_abs(h), held = v_min(v_set1(2.85f), a);
    vf e = v_mul(held, v_horner(held, p, 7));
    e = v_fma(e, e, v_add(e, e));
    e = v_fma(e, e, v_add(e, e));
    e = v_fma(e, e, v_add(e, e));
    return v_fnma(a, e, h);
}

/* x (1 + tanh(y)) / 2 with y = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^-2y). */
static inline vf v_gelu_tanh(vf x)
{
    const vf x2 = v_mul(x, x);
    const vf y2 = v_mul(x, v_fma(x2, v_set1(2.0f * 0.0356774081f), v_set1(2.0f * 0.797884561f)));
    return v_sigmoid_times(x, y2);
}

static inline __attribute__((always_inline)) vf v_act(fb_act act, vf x)
{
    switch (act) {
    case FB_ACT_GELU: return v_gelu(x);
    case FB_ACT_GELU_TANH: return v_gelu_tanh(x);
    case FB_ACT_RELU: return v_max(v_set1(0.0f), x);
    case FB_ACT_SILU: return v_sigmoid_times(x, x);
    case FB_ACT_TANH: return v_tanh(x);
    case FB_ACT_NONE: break;
    }
    return x;
}

/* ---- for eight bits ---- */

/* max(0, x) - |x| r^4, r = max(0, Q(|x|)), of gemm_s8. r^4 stands for act(-|x|) / -|x|, which falls from 1/2 to 0: its
 * fourth root is nearly a polynomial, and beyond the root of Q the result is exactly x or 0. Q: minimax for
 * |x| (Q^4 - act(-|x|) / -|x|) over all x, the stretch beyond the root included. */
static inline vf v_gate4(vf x, const float *q, int degree)
{
    const vf zero = v_set1(0.0f), a = v_abs(x), r = v_max(zero, v_horner(a, q, degree)), r2 = v_mul(r, r);
    return v_fnma(a, v_mul(r2, r2), v_max(zero, x));
}

static inline __attribute__((always_inline)) vf v_act_s8(fb_act act, vf x)
{
    static const float gelu[] = {0.84062767f,   -0.165751591f,  -0.0546290204f,
                                 0.0085022999f, 0.00284139183f, -0.000491756538f};
    static const float gelu_tanh[] = {0.84064436f,    -0.165688053f,  -0.0553040095f,
                                      0.00992462877f, 0.00207228097f, -0.000390098721f};
    static const float silu[] = {0.840065897f,    -0.100333072f,   -0.0285121668f, 0.0101582017f,
                                 -0.00134988793f, 8.56768893e-05f, -2.1282433e-06f};
    switch (act) {
    case FB_ACT_GELU: return v_gate4(x, gelu, 5);           /* error < 2.51e-5 */
    case FB_ACT_GELU_TANH: return v_gate4(x, gelu_tanh, 5); /* error < 2.16e-5 */
    case FB_ACT_SILU: return v_gate4(x, silu, 6);           /* error < 1.014e-4 */
    default: return v_act(act, x);
    }
}

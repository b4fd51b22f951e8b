/* simd_neon.h: the 16-lane vector of simd_scalar.h (which states the meaning) as four q registers. */
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "unroll.h"

typedef struct {
    float32x4_t q[4];
} vf;

/* r.q[i] = expression for the four quarters i. */
#define FB_QUARTERS(type, expression)                                                                                  \
    type r;                                                                                                            \
    FB_UNROLL                                                                                                          \
    for (int i = 0; i < 4; i++)                                                                                        \
        r.q[i] = expression;                                                                                           \
    return r

static inline vf v_set1(float x) { FB_QUARTERS(vf, vdupq_n_f32(x)); }
static inline vf v_load(const float *p) { FB_QUARTERS(vf, vld1q_f32(p + 4 * i)); }
static inline float32x4_t v_load4_n(const float *p, ptrdiff_t n, float fill)
{
    if (n >= 4)
        return vld1q_f32(p);
    float32x4_t r = vdupq_n_f32(fill);
    r = n > 0 ? vld1q_lane_f32(p, r, 0) : r;
    r = n > 1 ? vld1q_lane_f32(p + 1, r, 1) : r;
    return n > 2 ? vld1q_lane_f32(p + 2, r, 2) : r;
}
static inline vf v_load_n(const float *p, ptrdiff_t n, float fill)
{
    /* no address is formed past the row */
    FB_QUARTERS(vf, v_load4_n(n > 4 * i ? p + 4 * i : p, n - 4 * i, fill));
}
static inline void v_store(float *p, vf a)
{
    FB_UNROLL
    for (int i = 0; i < 4; i++)
        vst1q_f32(p + 4 * i, a.q[i]);
}
static inline void v_store_n(float *p, vf a, ptrdiff_t n)
{
    float all[16];
    v_store(all, a);
    memcpy(p, all, (size_t)n * sizeof(float));
}
static inline vf v_add(vf a, vf b) { FB_QUARTERS(vf, vaddq_f32(a.q[i], b.q[i])); }
static inline vf v_sub(vf a, vf b) { FB_QUARTERS(vf, vsubq_f32(a.q[i], b.q[i])); }
static inline vf v_mul(vf a, vf b) { FB_QUARTERS(vf, vmulq_f32(a.q[i], b.q[i])); }
static inline vf v_div(vf a, vf b) { FB_QUARTERS(vf, vdivq_f32(a.q[i], b.q[i])); }
/* Not FMAX and FMIN: they return a NaN wherever it stands. */
static inline float32x4_t v_max4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline float32x4_t v_min4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline vf v_max(vf a, vf b) { FB_QUARTERS(vf, v_max4(a.q[i], b.q[i])); }
static inline vf v_min(vf a, vf b) { FB_QUARTERS(vf, v_min4(a.q[i], b.q[i])); }
static inline vf v_fma(vf a, vf b, vf c) { FB_QUARTERS(vf, vfmaq_f32(c.q[i], a.q[i], b.q[i])); }
static inline vf v_fnma(vf a, vf b, vf c) { FB_QUARTERS(vf, vfmsq_f32(c.q[i], a.q[i], b.q[i])); }
static inline vf v_copysign(vf a, vf b) { FB_QUARTERS(vf, vbslq_f32(vdupq_n_u32(0x80000000u), b.q[i], a.q[i])); }
static inline vf v_abs(vf a) { FB_QUARTERS(vf, vabsq_f32(a.q[i])); }
static inline vf v_ifgt(vf a, vf b, vf x, vf y)
{
    FB_QUARTERS(vf, vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), x.q[i], y.q[i]));
}
static inline float32x4_t v_scale2_4(float32x4_t p, float32x4_t t)
{
    return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(t), 23)));
}
static inline vf v_scale2(vf p, vf t) { FB_QUARTERS(vf, v_scale2_4(p.q[i], t.q[i])); }
static inline vf v_fold(vf a)
{
    FB_QUARTERS(vf, i < 2 ? vaddq_f32(a.q[i], a.q[i + 2]) : vsubq_f32(a.q[i - 2], a.q[i]));
}
static inline float v_sum(vf a)
{
    const float32x4_t x4 = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
    const float32x2_t x2 = vadd_f32(vget_low_f32(x4), vget_high_f32(x4));
    return vget_lane_f32(x2, 0) + vget_lane_f32(x2, 1);
}
static inline float v_largest(vf a)
{
    const float32x4_t x4 = v_max4(v_max4(a.q[0], a.q[2]), v_max4(a.q[1], a.q[3]));
    const float32x4_t x2 = v_max4(x4, vextq_f32(x4, x4, 2));
    return vgetq_lane_f32(v_max4(x2, vextq_f32(x2, x2, 1)), 0);
}
/* Columns c .. c+3 of rows r .. r+3 for the rows c .. c+3 of the result. */
static inline void v_transpose4(const vf r[4], int c, float32x4_t out[4])
{
    float64x2_t t[4]; /* pairs of columns: rows 0, 1 | rows 2, 3 */
    FB_UNROLL
    for (int i = 0; i < 4; i += 2) {
        t[i] = vreinterpretq_f64_f32(vtrn1q_f32(r[i].q[c], r[i + 1].q[c]));
        t[i + 1] = vreinterpretq_f64_f32(vtrn2q_f32(r[i].q[c], r[i + 1].q[c]));
    }
    FB_UNROLL
    for (int i = 0; i < 2; i++) {
        out[i] = vreinterpretq_f32_f64(vzip1q_f64(t[i], t[i + 2]));
        out[i + 2] = vreinterpretq_f32_f64(vzip2q_f64(t[i], t[i + 2]));
    }
}
static inline void v_transpose(vf r[16])
{
    vf t[16];
    for (int i = 0; i < 4; i++)
        for (int c = 0; c < 4; c++) {
            float32x4_t out[4];
            v_transpose4(r + 4 * i, c, out);
            for (int j = 0; j < 4; j++)
                t[4 * c + j].q[i] = out[j];
        }
    memcpy(r, t, sizeof t);
}

/* A row of A for gemm_f32.inc.h: a multiply-add takes one lane of it for all, so four steps of k are one load. */
#define FB_A_STEPS 4
typedef float32x4_t va;
static inline va va_load(const float *p, int steps) { return steps == 4 ? vld1q_f32(p) : vld1q_dup_f32(p); }
static inline float32x4_t va_fma4(va a, int step, float32x4_t w, float32x4_t acc)
{
    switch (step) { /* a lane is part of the instruction */
    case 0: return vfmaq_laneq_f32(acc, w, a, 0);
    case 1: return vfmaq_laneq_f32(acc, w, a, 1);
    case 2: return vfmaq_laneq_f32(acc, w, a, 2);
    default: return vfmaq_laneq_f32(acc, w, a, 3);
    }
}
static inline vf va_fma(va a, int step, vf w, vf acc) { FB_QUARTERS(vf, va_fma4(a, step, w.q[i], acc.q[i])); }

/* ---- 16 int32 lanes (simd_scalar.h) ---- */
typedef struct {
    int32x4_t q[4];
} vi;

static inline vi vi_set1(int32_t x) { FB_QUARTERS(vi, vdupq_n_s32(x)); }
static inline void v_to_u8x4(uint8_t *p, const vf a[4], int32_t zero)
{
    for (int j = 0; j < 4; j++) {
        uint16x4_t half[4];
        FB_UNROLL
        for (int i = 0; i < 4; i++) /* a NaN gives 0, and its row has zero 0 */
            half[i] = vqmovun_s32(vaddq_s32(vcvtnq_s32_f32(a[j].q[i]), vdupq_n_s32(zero)));
        vst1q_u8(p + 16 * j,
                 vcombine_u8(vqmovn_u16(vcombine_u16(half[0], half[1])), vqmovn_u16(vcombine_u16(half[2], half[3]))));
    }
}
static inline vi vi_load(const int32_t *p) { FB_QUARTERS(vi, vld1q_s32(p + 4 * i)); }
static inline void vi_store(int32_t *p, vi a)
{
    FB_UNROLL
    for (int i = 0; i < 4; i++)
        vst1q_s32(p + 4 * i, a.q[i]);
}
static inline vi v_bits(vf a) { FB_QUARTERS(vi, vreinterpretq_s32_f32(a.q[i])); }
static inline vf v_of_bits(vi a) { FB_QUARTERS(vf, vreinterpretq_f32_s32(a.q[i])); }
static inline vi vi_add(vi a, vi b) { FB_QUARTERS(vi, vaddq_s32(a.q[i], b.q[i])); }
static inline vi vi_max(vi a, vi b) { FB_QUARTERS(vi, vmaxq_s32(a.q[i], b.q[i])); }
static inline vi vi_max_unsigned(vi a, vi b)
{
    FB_QUARTERS(vi, vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(a.q[i]), vreinterpretq_u32_s32(b.q[i]))));
}
static inline void v_largest2(vi a, vi b, float *largest_a, float *largest_b)
{
    const int32_t bits[2] = {
        vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.q[0], a.q[1]), vmaxq_s32(a.q[2], a.q[3]))),
        vmaxvq_s32(vmaxq_s32(vmaxq_s32(b.q[0], b.q[1]), vmaxq_s32(b.q[2], b.q[3]))),
    };
    memcpy(largest_a, bits, sizeof *bits);
    memcpy(largest_b, bits + 1, sizeof *bits);
}
static inline vi vi_shl(vi a, int n) { FB_QUARTERS(vi, vshlq_s32(a.q[i], vdupq_n_s32(n))); }
static inline vi vi_xor(vi a, vi b) { FB_QUARTERS(vi, veorq_s32(a.q[i], b.q[i])); }
static inline void vi_to_u8x64(uint8_t *p, const vi q[4])
{
    FB_UNROLL
    for (int j = 0; j < 4; j++) {
        const int16x8_t low = vcombine_s16(vmovn_s32(q[j].q[0]), vmovn_s32(q[j].q[1]));
        const int16x8_t high = vcombine_s16(vmovn_s32(q[j].q[2]), vmovn_s32(q[j].q[3]));
        vst1q_u8(p + 16 * j, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high))));
    }
}
static inline void vi_store_zipped(int8_t *p, const vi w[4], int count)
{
    FB_UNROLL
    for (int i = 0; i < 4; i++) {
        if (count == 4) {
            const int32x4x4_t all = {{w[0].q[i], w[1].q[i], w[2].q[i], w[3].q[i]}};
            vst4q_s32((int32_t *)p + 16 * i, all);
        } else {
            const int32x4x2_t first = {{w[0].q[i], w[1].q[i]}}, second = {{w[2].q[i], w[3].q[i]}};
            vst2q_s32((int32_t *)p + 8 * i, first);
            vst2q_s32((int32_t *)p + 32 + 8 * i, second);
        }
    }
}
static inline vi vi_sub(vi a, vi b) { FB_QUARTERS(vi, vsubq_s32(a.q[i], b.q[i])); }
static inline vi vi_mul(vi a, vi b) { FB_QUARTERS(vi, vmulq_s32(a.q[i], b.q[i])); }
static inline vf vi_to_f32(vi a) { FB_QUARTERS(vf, vcvtq_f32_s32(a.q[i])); }

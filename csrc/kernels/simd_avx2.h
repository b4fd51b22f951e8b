/* simd_avx2.h: the 16-lane vector of simd_scalar.h (which states the meaning) as two ymm registers. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "unroll.h"

typedef struct {
    __m256 lo, hi;
} vf;

#define FB_BOTH(lo_expression, hi_expression)                                                                          \
    (vf) { lo_expression, hi_expression }

static inline __m256i v_mask8(ptrdiff_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline vf v_set1(float x) { return FB_BOTH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static inline vf v_load(const float *p) { return FB_BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline vf v_load_n(const float *p, ptrdiff_t n, float fill)
{
    const __m256i lo = v_mask8(n), hi = v_mask8(n - 8);
    const __m256 f = _mm256_set1_ps(fill);
    const float *p_hi = n > 8 ? p + 8 : p; /* no address is formed past the row */
    return FB_BOTH(_mm256_blendv_ps(f, _mm256_maskload_ps(p, lo), _mm256_castsi256_ps(lo)),
                   _mm256_blendv_ps(f, _mm256_maskload_ps(p_hi, hi), _mm256_castsi256_ps(hi)));
}
static inline void v_store(float *p, vf a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
static inline void v_store_n(float *p, vf a, ptrdiff_t n)
{
    _mm256_maskstore_ps(p, v_mask8(n), a.lo);
    if (n > 8)
        _mm256_maskstore_ps(p + 8, v_mask8(n - 8), a.hi);
}
static inline vf v_add(vf a, vf b) { return FB_BOTH(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)); }
static inline vf v_sub(vf a, vf b) { return FB_BOTH(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)); }
static inline vf v_mul(vf a, vf b) { return FB_BOTH(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)); }
static inline vf v_div(vf a, vf b) { return FB_BOTH(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)); }
static inline vf v_max(vf a, vf b) { return FB_BOTH(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)); }
static inline vf v_min(vf a, vf b) { return FB_BOTH(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)); }
static inline vf v_fma(vf a, vf b, vf c)
{
    return FB_BOTH(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}
static inline vf v_fnma(vf a, vf b, vf c)
{
    return FB_BOTH(_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi));
}
static inline vf v_copysign(vf a, vf b)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return FB_BOTH(_mm256_or_ps(_mm256_andnot_ps(sign, a.lo), _mm256_and_ps(sign, b.lo)),
                   _mm256_or_ps(_mm256_andnot_ps(sign, a.hi), _mm256_and_ps(sign, b.hi)));
}
static inline vf v_abs(vf a)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return FB_BOTH(_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi));
}
static inline vf v_ifgt(vf a, vf b, vf x, vf y)
{
    return FB_BOTH(_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
                   _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)));
}
static inline __m256 v_scale2_half(__m256 p, __m256 t)
{
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
static inline vf v_scale2(vf p, vf t) { return FB_BOTH(v_scale2_half(p.lo, t.lo), v_scale2_half(p.hi, t.hi)); }
static inline vf v_fold(vf a) { return FB_BOTH(_mm256_add_ps(a.lo, a.hi), _mm256_sub_ps(a.lo, a.hi)); }
static inline float v_sum(vf a)
{
    const __m256 x8 = _mm256_add_ps(a.lo, a.hi);
    const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_add_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}
static inline float v_largest(vf a)
{
    const __m256 x8 = _mm256_max_ps(a.lo, a.hi);
    const __m128 x4 = _mm_max_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_max_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_max_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}
/* One 8x8 quarter: rows r0..r7, three rounds of shuffles (pairs, quads, halves). */
static inline void v_transpose8(__m256 r[8])
{
    __m256 t[8];
    FB_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    FB_UNROLL
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    FB_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    FB_UNROLL
    for (int i = 0; i < 8; i++)
        r[i] = t[i];
}
static inline void v_transpose(vf r[16])
{
    __m256 q[4][8]; /* quarters: top left, top right, bottom left, bottom right */
    FB_UNROLL
    for (int i = 0; i < 8; i++) {
        q[0][i] = r[i].lo;
        q[1][i] = r[i].hi;
        q[2][i] = r[i + 8].lo;
        q[3][i] = r[i + 8].hi;
    }
    FB_UNROLL
    for (int i = 0; i < 4; i++)
        v_transpose8(q[i]);
    FB_UNROLL
    for (int i = 0; i < 8; i++) {
        r[i] = FB_BOTH(q[0][i], q[2][i]);
        r[i + 8] = FB_BOTH(q[1][i], q[3][i]);
    }
}

/* ---- 16 int32 lanes (simd_scalar.h) ---- */
typedef struct {
    __m256i lo, hi;
} vi;

#define FB_BOTH_I(lo_expression, hi_expression)                                                                        \
    (vi) { lo_expression, hi_expression }

static inline void v_to_u8x4(uint8_t *p, const vf a[4], int32_t zero)
{
    const __m256i z = _mm256_set1_epi16((int16_t)zero), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    FB_UNROLL
    for (int i = 0; i < 4; i += 2) {
        const __m256i lo = _mm256_packs_epi32(_mm256_cvtps_epi32(a[i].lo), _mm256_cvtps_epi32(a[i].hi));
        const __m256i hi = _mm256_packs_epi32(_mm256_cvtps_epi32(a[i + 1].lo), _mm256_cvtps_epi32(a[i + 1].hi));
        const __m256i bytes = _mm256_packus_epi16(_mm256_adds_epi16(lo, z), _mm256_adds_epi16(hi, z));
        _mm256_storeu_si256((__m256i *)(p + 16 * i), _mm256_permutevar8x32_epi32(bytes, order));
    }
}
static inline vi vi_set1(int32_t x) { return FB_BOTH_I(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
static inline vi vi_load(const int32_t *p)
{
    return FB_BOTH_I(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
static inline void vi_store(int32_t *p, vi a)
{
    _mm256_storeu_si256((__m256i *)p, a.lo);
    _mm256_storeu_si256((__m256i *)p + 1, a.hi);
}
typedef __m256i vrow;
static inline vrow vi_row(const void *p)
{
    int32_t four_bytes;
    memcpy(&four_bytes, p, sizeof four_bytes);
    return _mm256_set1_epi32(four_bytes);
}
static inline vi v_bits(vf a) { return FB_BOTH_I(_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)); }
static inline vf v_of_bits(vi a) { return FB_BOTH(_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)); }
static inline vi vi_add(vi a, vi b) { return FB_BOTH_I(_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)); }
static inline vi vi_max(vi a, vi b) { return FB_BOTH_I(_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)); }
static inline vi vi_max_unsigned(vi a, vi b)
{
    return FB_BOTH_I(_mm256_max_epu32(a.lo, b.lo), _mm256_max_epu32(a.hi, b.hi));
}
static inline void v_largest2(vi a, vi b, float *largest_a, float *largest_b)
{
    const __m256i a8 = _mm256_max_epi32(a.lo, a.hi), b8 = _mm256_max_epi32(b.lo, b.hi);
    const __m256i low = _mm256_permute2x128_si256(a8, b8, 0x20), high = _mm256_permute2x128_si256(a8, b8, 0x31);
    const __m256i x4 = _mm256_max_epi32(low, high); /* a | b */
    const __m256i x2 = _mm256_max_epi32(x4, _mm256_shuffle_epi32(x4, 0x4e));
    const __m256 x1 = _mm256_castsi256_ps(_mm256_max_epi32(x2, _mm256_shuffle_epi32(x2, 0xb1)));
    *largest_a = _mm256_cvtss_f32(x1);
    *largest_b = _mm_cvtss_f32(_mm256_extractf128_ps(x1, 1));
}
static inline vi vi_shl(vi a, int n) { return FB_BOTH_I(_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)); }
static inline vi vi_xor(vi a, vi b) { return FB_BOTH_I(_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)); }
static inline void vi_to_u8x64(uint8_t *p, const vi q[4])
{
    /* the packs work within 128 bits: quarter i of a q[j] ends up as 32-bit element (i & 1) * 4 + (j & 1) * 2 + i / 2 */
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    FB_UNROLL
    for (int j = 0; j < 4; j += 2) {
        const __m256i words = _mm256_packs_epi32(q[j].lo, q[j].hi);
        const __m256i bytes = _mm256_packus_epi16(words, _mm256_packs_epi32(q[j + 1].lo, q[j + 1].hi));
        _mm256_storeu_si256((__m256i *)(p + 16 * j), _mm256_permutevar8x32_epi32(bytes, order));
    }
}
static inline vi vi_sub(vi a, vi b) { return FB_BOTH_I(_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)); }
static inline vi vi_mul(vi a, vi b)
{
    return FB_BOTH_I(_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi));
}
static inline vf vi_to_f32(vi a) { return FB_BOTH(_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)); }

/* simd_avx512.h: the 16-lane vector of simd_scalar.h (which states the meaning) as one zmm register. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "unroll.h"

typedef __m512 vf;

static inline __mmask16 v_mask(ptrdiff_t n) { return (__mmask16)((1u << n) - 1u); }

static inline vf v_set1(float x) { return _mm512_set1_ps(x); }
static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf v_load_n(const float *p, ptrdiff_t n, float fill)
{
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), v_mask(n), p);
}
static inline void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline void v_store_n(float *p, vf a, ptrdiff_t n) { _mm512_mask_storeu_ps(p, v_mask(n), a); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
static inline vf v_copysign(vf a, vf b)
{
    const __m512 sign = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b));
}
static inline vf v_abs(vf a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
static inline vf v_ifgt(vf a, vf b, vf x, vf y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
static inline vf v_scale2(vf p, vf t)
{
    return _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
static inline vf v_fold(vf a) /* swapped + a below, swapped - a above: no product is rounded */
{
    const __m512 signs = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);
    return _mm512_fmadd_ps(a, signs, _mm512_shuffle_f32x4(a, a, 0x4e));
}
static inline float v_sum(vf a)
{
    const __m256 x8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_add_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}
static inline float v_largest(vf a)
{
    const __m256 x8 = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 x4 = _mm_max_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_max_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_max_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}
/* Four rounds of shuffles: 32-bit pairs, 64-bit pairs, then 128-bit quarters twice. */
static inline void v_transpose(vf r[16])
{
    __m512 t[16];
    FB_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    FB_UNROLL
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    FB_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    FB_UNROLL
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* ---- 16 int32 lanes (simd_scalar.h) ---- */
typedef __m512i vi;

static inline void v_to_u8x4(uint8_t *p, const vf a[4], int32_t zero)
{
    const __m512i z = _mm512_set1_epi16((int16_t)zero),
                  order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i lo = _mm512_packs_epi32(_mm512_cvtps_epi32(a[0]), _mm512_cvtps_epi32(a[1]));
    const __m512i hi = _mm512_packs_epi32(_mm512_cvtps_epi32(a[2]), _mm512_cvtps_epi32(a[3]));
    const __m512i bytes = _mm512_packus_epi16(_mm512_adds_epi16(lo, z), _mm512_adds_epi16(hi, z));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}
static inline vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
static inline void vi_store(int32_t *p, vi a) { _mm512_storeu_si512(p, a); }
typedef __m512i vrow;
static inline vrow vi_row(const void *p)
{
    int32_t four_bytes;
    memcpy(&four_bytes, p, sizeof four_bytes);
    return _mm512_set1_epi32(four_bytes);
}
static inline vi v_bits(vf a) { return _mm512_castps_si512(a); }
static inline vf v_of_bits(vi a) { return _mm512_castsi512_ps(a); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
static inline vi vi_max_unsigned(vi a, vi b) { return _mm512_max_epu32(a, b); }
static inline void v_largest2(vi a, vi b, float *largest_a, float *largest_b)
{
    const __m512i x8 = vi_max(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee)); /* a | b */
    const __m512i x4 = vi_max(x8, _mm512_shuffle_i32x4(x8, x8, 0xb1));
    const __m512i x2 = vi_max(x4, _mm512_shuffle_epi32(x4, 0x4e));
    const __m512 x1 = _mm512_castsi512_ps(vi_max(x2, _mm512_shuffle_epi32(x2, 0xb1)));
    *largest_a = _mm512_cvtss_f32(x1);
    *largest_b = _mm_cvtss_f32(_mm512_extractf32x4_ps(x1, 2));
}
static inline vi vi_shl(vi a, unsigned n) { return _mm512_slli_epi32(a, n); }
static inline vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static inline void vi_to_u8x64(uint8_t *p, const vi q[4])
{
    /* the packs work within 128 bits: quarter i of q[j] ends up as 32-bit element 4 i + j */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
static inline vf vi_to_f32(vi a) { return _mm512_cvtepi32_ps(a); }

/* Tiles of up to 24 accumulators that the GEMMs of avx512*.c use: X(rows, strips). */
#define FB_TILES_3(X, mr) X(mr, 1) X(mr, 2) X(mr, 3)
#define FB_TILES_4(X, mr) FB_TILES_3(X, mr) X(mr, 4)
#define FB_TILES_8(X, mr) FB_TILES_4(X, mr) X(mr, 5) X(mr, 6) X(mr, 7) X(mr, 8)
/* clang-format off */
#define FB_TILES_8X48(X) \
    FB_TILES_8(X, 1) FB_TILES_8(X, 2) FB_TILES_8(X, 3) FB_TILES_4(X, 4) \
    FB_TILES_4(X, 5) FB_TILES_4(X, 6) FB_TILES_3(X, 7) FB_TILES_3(X, 8)
/* clang-format on */

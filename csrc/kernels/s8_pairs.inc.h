/* s8_pairs.inc.h: exact products of bytes on x86 without VNNI, for gemm_s8.inc.h. A kernel file that includes it defines
 * FB_S8_MR before, and after it or before
 *   vi_dot(acc, row, w)    as gemm_s8.inc.h has it, but with signed row and unsigned w, in pairs that fit 16 bits
 *
 * vpmaddubsw multiplies unsigned by signed bytes and adds two products in 16 bits, which saturate. The unsigned ones are
 * w + 128, which is how these sets pack W, the signed ones b = a - centre, the mean of the row held in 64 .. 192. That is
 * exact where two of b add up to -128 .. 128. What does not fit is taken out before the products: of a b below -128 or above
 * 127 the rest, at most 64, so that two rests fit; and of a pair that adds up to more, 6 % of the pairs of normal activations
 * at k = 128 and 2 % at k = 1536, the second. Its group of 4 steps of k is multiplied once more for what was taken out. Any
 * row is exact; one full of such pairs takes twice as long, and with rests in every group too three times.
 */
#define FB_S8_PAIRS
enum {
    S8_FLIP = 0x80,         /* w ^ S8_FLIP is packed */
    S8_PREPARED = 32768,    /* bytes of A that are prepared at once: at least a row */
    S8_PREPARED_ROWS = 256, /* of these, a multiple of FB_S8_MR, at most */
    S8_CENTRE_LEAST = 64,   /* of 0 .. 255: what b has beyond a byte is then at most 64 on either side */
    S8_CENTRE_MOST = 192,
    S8_ENTRIES = S8_PREPARED / 4 + S8_PREPARED_ROWS /* enough for one of each four steps, and one for each row */
};

/* Rows of A ready for the products. */
typedef struct s8_prepared {
    _Alignas(64) int8_t in[S8_PREPARED]; /* [rows][k to 32]: a - centre, without what was taken out */
    /* What was taken out, row after row, from `first` of a row on: four bytes, and which group of steps they belong to. Zeros
     * after the last of a row make their number even; a few more are written to but not used. */
    int32_t out[S8_ENTRIES + 8];
    uint16_t group[S8_ENTRIES + 8];
    uint16_t first[S8_PREPARED_ROWS + 1];
    /* Of each row: what its sums start from, which takes the 128 off w + 128; its zero point less its centre. */
    int32_t start[S8_PREPARED_ROWS], zero[S8_PREPARED_ROWS];
} s8_prepared;

/* Rows to prepare at once: whole tiles where there is room for more than one. */
static inline ptrdiff_t s8_prepared_rows(ptrdiff_t k)
{
    const ptrdiff_t most = S8_PREPARED_ROWS, rows = k * most <= S8_PREPARED ? most : S8_PREPARED / ((k + 31) / 32 * 32);
    return rows < FB_S8_MR ? rows : rows / FB_S8_MR * FB_S8_MR;
}

/* s8_lanes[mask]: the lanes that the eight bits of a mask name, in a byte each, ascending. */
#define FB_BITS(m)                                                                                                     \
    (((m) & 1) + ((m) >> 1 & 1) + ((m) >> 2 & 1) + ((m) >> 3 & 1) + ((m) >> 4 & 1) + ((m) >> 5 & 1) + ((m) >> 6 & 1))
#define FB_LANE(m, i) ((uint64_t)((m) >> (i) & 1) * (i) << 8 * FB_BITS((m) & ((1 << (i)) - 1)))
#define FB_LANES(m)                                                                                                    \
    FB_LANE(m, 1) + FB_LANE(m, 2) + FB_LANE(m, 3) + FB_LANE(m, 4) + FB_LANE(m, 5) + FB_LANE(m, 6) + FB_LANE(m, 7)
#define FB_LANES_4(m) FB_LANES(m), FB_LANES(m + 1), FB_LANES(m + 2), FB_LANES(m + 3)
#define FB_LANES_16(m) FB_LANES_4(m), FB_LANES_4(m + 4), FB_LANES_4(m + 8), FB_LANES_4(m + 12)
#define FB_LANES_64(m) FB_LANES_16(m), FB_LANES_16(m + 16), FB_LANES_16(m + 32), FB_LANES_16(m + 48)
static const uint64_t s8_lanes[256] = {FB_LANES_64(0), FB_LANES_64(64), FB_LANES_64(128), FB_LANES_64(192)};
#undef FB_BITS
#undef FB_LANE
#undef FB_LANES
#undef FB_LANES_4
#undef FB_LANES_16
#undef FB_LANES_64

/* Appends those of eight groups from `group` on that are not all zeros to the entries from `end` on; returns their new end. */
static inline ptrdiff_t s8_take(s8_prepared *r, ptrdiff_t end, ptrdiff_t group, __m256i taken)
{
    const __m256i whole = _mm256_cmpeq_epi32(taken, _mm256_setzero_si256());
    const unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(whole)) ^ 0xff;
    const __m128i lanes = _mm_loadl_epi64((const __m128i *)(s8_lanes + mask));
    const __m256i bytes = _mm256_permutevar8x32_epi32(taken, _mm256_cvtepu8_epi32(lanes));
    const __m128i groups = _mm_add_epi16(_mm_cvtepu8_epi16(lanes), _mm_set1_epi16((int16_t)group));
    _mm256_storeu_si256((__m256i *)(r->out + end), bytes);
    _mm_storeu_si128((__m128i *)(r->group + end), groups);
    return end + _mm_popcnt_u32(mask);
}

/* The sum of k bytes, k a multiple of 32. */
static inline int32_t s8_sum_bytes(ptrdiff_t k, const uint8_t *a)
{
    __m256i sum = _mm256_setzero_si256();
    for (ptrdiff_t p = 0; p < k; p += 32) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(a + p));
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return _mm_cvtsi128_si32(_mm_add_epi64(half, _mm_unpackhi_epi64(half, half)));
}

/* Prepares m rows. */
static __attribute__((noinline)) void s8_prepare(ptrdiff_t m, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda,
                                                 const int32_t *zero, s8_prepared *r)
{
    const ptrdiff_t ldk = (k + 31) / 32 * 32;
    const __m256i ones = _mm256_set1_epi8(1), second = _mm256_set1_epi16(-256);
    ptrdiff_t end = 0;
    for (ptrdiff_t i = 0; i < m; i++, a += lda) {
        const int32_t sum = s8_sum_bytes(ldk, a), mean = k > 0 ? sum / (int32_t)k : 0;
        /* A row may take two entries for each four steps, but not the room of those after it; from 128 it takes one. */
        const int room = end + (m - i + 1) * (ldk / 4 + 1) <= S8_ENTRIES;
        const int32_t held = mean < S8_CENTRE_LEAST ? S8_CENTRE_LEAST : mean > S8_CENTRE_MOST ? S8_CENTRE_MOST : mean;
        const int32_t centre = room ? held : 128;
        const __m256i down = _mm256_set1_epi8((int8_t)(128 - centre));
        int8_t *in = r->in + i * ldk;
        r->first[i] = (uint16_t)end;
        for (ptrdiff_t p = 0; p < ldk; p += 32) {
            const __m256i x = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(a + p)), _mm256_set1_epi8(-128));
            const __m256i b = _mm256_adds_epi8(x, down), beyond = _mm256_sub_epi8(_mm256_add_epi8(x, down), b);
            const __m256i sums = _mm256_abs_epi16(_mm256_maddubs_epi16(ones, b));
            const __m256i large = _mm256_cmpgt_epi16(sums, _mm256_set1_epi16(128));
            const __m256i taken = _mm256_and_si256(_mm256_and_si256(large, second), b);
            _mm256_storeu_si256((__m256i *)(in + p), _mm256_xor_si256(b, taken));
            end = s8_take(r, end, p / 4, taken);
            end = s8_take(r, end, p / 4, beyond);
        }
        r->out[end] = 0;
        r->group[end] = 0;
        end += (end - r->first[i]) & 1;
        r->start[i] = -128 * (sum - centre * (int32_t)ldk);
        r->zero[i] = zero[i] - centre;
    }
    r->first[m] = (uint16_t)end;
}

/* sums of mr prepared rows from `row` on without what was taken out, 8 * 16 apart, become those of whole rows. Two entries a
 * turn: how often the loop turns is a guess that costs more than an entry does, but four a turn are no faster. */
static inline __attribute__((always_inline)) void s8_add_out_of(const s8_prepared *r, ptrdiff_t row, ptrdiff_t mr,
                                                                const int nv, const int8_t *strip,
                                                                ptrdiff_t strip_bytes, int32_t *sums)
{
    for (ptrdiff_t i = row; i < row + mr; i++, sums += 8 * 16) {
        const ptrdiff_t end = r->first[i + 1];
        vi acc[8];
        FB_UNROLL
        for (int j = 0; j < nv; j++)
            acc[j] = vi_load(sums + j * 16);
        for (ptrdiff_t e = r->first[i]; e < end; e += 2)
            FB_UNROLL
        for (int g = 0; g < 2; g++) {
            const vrow bytes = vi_row(r->out + e + g);
            const int8_t *const w = strip + (ptrdiff_t)r->group[e + g] * 64;
            FB_UNROLL
            for (int j = 0; j < nv; j++)
                acc[j] = vi_dot(acc[j], bytes, vi_load((const int32_t *)(w + j * strip_bytes)));
        }
        FB_UNROLL
        for (int j = 0; j < nv; j++)
            vi_store(sums + j * 16, acc[j]);
    }
}
/* Not inlined: a tile would spill its addresses. */
static __attribute__((noinline)) void s8_add_out(const s8_prepared *r, ptrdiff_t row, ptrdiff_t mr, int nv,
                                                 const int8_t *strip, ptrdiff_t strip_bytes, int32_t *sums)
{
    switch (nv) {
#define FB_CASE(nv)                                                                                                    \
    case nv: s8_add_out_of(r, row, mr, nv, strip, strip_bytes, sums); break;
        FB_CASE(1)
        FB_CASE(2)
        FB_CASE(3)
        FB_CASE(4)
        FB_CASE(5)
        FB_CASE(6)
        FB_CASE(7)
        FB_CASE(8)
#undef FB_CASE
    }
}

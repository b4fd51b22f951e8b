/* s8_pairs.inc.h: exact products of bytes on x86 without VNNI, for gemm_s8.inc.h. A kernel file that includes it defines
 * FB_S8_MR before, and after it or before
 *   vi_dot(acc, row, w)            as gemm_s8.inc.h has it, in pairs that fit 16 bits
 *   vi_dot_centred(acc, row, w)    the same with signed row and unsigned w
 *
 * vpmaddubsw multiplies unsigned by signed bytes and adds two products in 16 bits, which saturate. It is exact for
 *   w + 128 (unsigned, which is how these sets pack W) and a - 128    where two a - 128 add up to -128 .. 128,
 *   a (unsigned) and w                                                where two a add up to at most 258.
 * The first, `centred`, suits activations around a zero point in the middle, the second probabilities, whose zero is 0. Of a
 * pair that adds up to more, 8 % of the pairs of normal activations at k = 128 and 2 % at k = 1536, the second byte is taken
 * out before the products, and its group of 4 steps of k is multiplied once more for what was taken out. Any row is exact
 * either way; one full of such pairs takes twice as long.
 */
#define FB_S8_PAIRS
enum {
    S8_FLIP = 0x80,          /* w ^ S8_FLIP is packed */
    S8_PREPARED = 32768,     /* bytes of A that are prepared at once: at least a row */
    S8_PREPARED_ROWS = 256,  /* of these, a multiple of FB_S8_MR, at most */
    S8_PREPARED_CENTRED = 64 /* the smallest zero point for which rows are centred */
};

/* Rows of A ready for the products. */
typedef struct s8_prepared {
    int centred;
    /* [rows][k to 32]: the bytes that are left in; a - 128 where centred */
    _Alignas(64) uint8_t in[S8_PREPARED];
    /* [rows][k to 32, and 32]: those taken out, 0 in between and after */
    uint8_t out[S8_PREPARED + 32 * S8_PREPARED_ROWS];
    /* Groups with bytes in `out`, row after row, from `first` of a row on; one after k makes their number even. */
    uint16_t groups[S8_PREPARED / 4 + S8_PREPARED_ROWS + 4], first[S8_PREPARED_ROWS + 1];
    /* Of each row: what its sums start from, which takes the 128 off w + 128; its zero point, less 128 where centred. */
    int32_t start[S8_PREPARED_ROWS], zero[S8_PREPARED_ROWS];
} s8_prepared;

/* Rows to prepare at once: whole tiles where there is room for more than one. */
static inline ptrdiff_t s8_prepared_rows(ptrdiff_t k)
{
    const ptrdiff_t most = S8_PREPARED_ROWS, rows = k * most <= S8_PREPARED ? most : S8_PREPARED / ((k + 31) / 32 * 32);
    return rows < FB_S8_MR ? rows : rows / FB_S8_MR * FB_S8_MR;
}

/* Appends to a list those 16-bit lanes of `groups` that the four bits of a mask name; returns its new end. */
static inline uint16_t *s8_list(uint16_t *end, uint32_t mask, uint64_t groups)
{
    static const struct {
        uint64_t lanes, count; /* lanes: their numbers, in their new places */
    } named[16] = {{0x0, 0},     {0x0, 1},         {0x1, 1},         {0x10000, 2},
                   {0x2, 1},     {0x20000, 2},     {0x20001, 2},     {0x200010000, 3},
                   {0x3, 1},     {0x30000, 2},     {0x30001, 2},     {0x300010000, 3},
                   {0x30002, 2}, {0x300020000, 3}, {0x300020001, 3}, {0x3000200010000, 4}};
    const uint64_t listed = groups + named[mask].lanes;
    memcpy(end, &listed, sizeof listed);
    return end + named[mask].count;
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

static inline __attribute__((always_inline)) void s8_prepare_as(const int centred, ptrdiff_t m, ptrdiff_t k,
                                                                const uint8_t *a, ptrdiff_t lda, const int32_t *zero,
                                                                s8_prepared *r)
{
    const ptrdiff_t ldk = (k + 31) / 32 * 32;
    const uint64_t each = 0x1000100010001u; /* 1 in four lanes */
    const __m256i ones = _mm256_set1_epi8(1), second = _mm256_set1_epi16(-256), nothing = _mm256_setzero_si256();
    uint16_t *end = r->groups;
    r->centred = centred;
    for (ptrdiff_t i = 0; i < m; i++, a += lda) {
        uint8_t *in = r->in + i * ldk, *out = r->out + i * (ldk + 32);
        uint64_t groups = 0;
        r->first[i] = (uint16_t)(end - r->groups);
        for (ptrdiff_t p = 0; p < ldk; p += 32, groups += 8 * each) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(a + p)), large;
            if (centred) {
                x = _mm256_xor_si256(x, _mm256_set1_epi8(-128));
                large = _mm256_cmpgt_epi16(_mm256_abs_epi16(_mm256_maddubs_epi16(ones, x)), _mm256_set1_epi16(128));
            } else {
                large = _mm256_cmpgt_epi16(_mm256_maddubs_epi16(x, ones), _mm256_set1_epi16(258));
            }
            const __m256i taken = _mm256_and_si256(_mm256_and_si256(large, second), x);
            _mm256_storeu_si256((__m256i *)(in + p), _mm256_xor_si256(x, taken));
            _mm256_storeu_si256((__m256i *)(out + p), taken);
            const __m256 whole = _mm256_castsi256_ps(_mm256_cmpeq_epi32(taken, nothing));
            const uint32_t mask = (uint32_t)_mm256_movemask_ps(whole) ^ 0xff;
            end = s8_list(end, mask & 15, groups);
            end = s8_list(end, mask >> 4, groups + 4 * each);
        }
        _mm256_storeu_si256((__m256i *)(out + ldk), nothing);
        *end = (uint16_t)(ldk / 4);
        end += (end - r->groups) & 1;
        r->start[i] = centred ? -128 * (s8_sum_bytes(ldk, a) - 128 * (int32_t)ldk) : 0;
        r->zero[i] = zero[i] - (centred ? 128 : 0);
    }
    r->first[m] = (uint16_t)(end - r->groups);
}

/* Prepares m rows. */
static __attribute__((noinline)) void s8_prepare(ptrdiff_t m, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda,
                                                 const int32_t *zero, s8_prepared *r)
{
    int centred = 0;
    for (ptrdiff_t i = 0; i < m; i++)
        centred |= zero[i] >= S8_PREPARED_CENTRED;
    if (centred)
        s8_prepare_as(1, m, k, a, lda, zero, r);
    else
        s8_prepare_as(0, m, k, a, lda, zero, r);
}

static inline vi s8_weights(const int centred, const int8_t *p)
{
    const vi w = vi_load((const int32_t *)p);
    return centred ? w : vi_xor(w, vi_set1((int32_t)0x80808080u));
}
static inline vi s8_dot(const int centred, vi acc, vrow row, vi w)
{
    return centred ? vi_dot_centred(acc, row, w) : vi_dot(acc, row, w);
}

/* sums of mr prepared rows from `row` on without the bytes taken out, 8 * 16 apart, become those of whole rows. Two groups
 * a turn: how often the loop turns is a guess that costs more than a group does, but four a turn are no faster. */
static inline __attribute__((always_inline)) void s8_add_out_as(const int centred, const s8_prepared *r, ptrdiff_t row,
                                                                ptrdiff_t mr, const int nv, ptrdiff_t k,
                                                                const int8_t *strip, ptrdiff_t strip_bytes,
                                                                int32_t *sums)
{
    const uint8_t *out = r->out + row * (k + 32);
    for (ptrdiff_t i = row; i < row + mr; i++, out += k + 32, sums += 8 * 16) {
        const uint16_t *group = r->groups + r->first[i], *end = r->groups + r->first[i + 1];
        vi acc[8];
        FB_UNROLL
        for (int j = 0; j < nv; j++)
            acc[j] = vi_load(sums + j * 16);
        for (; group < end; group += 2)
            FB_UNROLL
        for (int g = 0; g < 2; g++) {
            const size_t at = group[g];
            const vrow bytes = vi_row(out + at * 4);
            FB_UNROLL
            for (int j = 0; j < nv; j++)
                acc[j] = s8_dot(centred, acc[j], bytes, s8_weights(centred, strip + j * strip_bytes + at * 64));
        }
        FB_UNROLL
        for (int j = 0; j < nv; j++)
            vi_store(sums + j * 16, acc[j]);
    }
}
/* Not inlined: a tile would spill its addresses. */
static __attribute__((noinline)) void s8_add_out(const s8_prepared *r, ptrdiff_t row, ptrdiff_t mr, int nv, ptrdiff_t k,
                                                 const int8_t *strip, ptrdiff_t strip_bytes, int32_t *sums)
{
    switch (r->centred ? nv : -nv) {
#define FB_CASE(nv)                                                                                                    \
    case nv: s8_add_out_as(1, r, row, mr, nv, k, strip, strip_bytes, sums); break;                                     \
    case -nv: s8_add_out_as(0, r, row, mr, nv, k, strip, strip_bytes, sums); break;
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

/* peak.c: what one core can do: independent chains of multiply-adds that never leave the registers; reading of memory.
 *
 * Compiled by bench/kernels.py with the flags of one row of csrc/isa.def and -ffp-contract=fast, which makes one
 * instruction of x * a + b. Twelve chains cover the latency (4 or 5 cycles) of two multiply-adds a cycle.
 *
 * Each function runs `steps` multiply-adds in every lane of every chain, from the given start values, which keep the
 * compiler from seeing that chains are alike, and returns the operations done; 0 where the flags have no such instruction.
 */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { BYTES = 32 };
#elif defined(__ARM_FEATURE_FMA)
enum { BYTES = 16 };
#else
enum { BYTES = 0 };
#endif
enum { CHAINS = 12 };

/* float32 multiply-adds. */
double peak_f32(long steps, float chains[CHAINS])
{
    if (BYTES == 0)
        return 0;
    typedef float vector __attribute__((vector_size(BYTES ? BYTES : 16)));
    vector x[CHAINS];
    for (int c = 0; c < CHAINS; c++)
        x[c] = chains[c] - (vector){0};
    for (long i = 0; i < steps; i++)
        for (int c = 0; c < CHAINS; c++)
            x[c] = x[c] * 0.5f + 0.25f; /* tends to 1/2: no overflow, no denormal */
    for (int c = 0; c < CHAINS; c++)
        chains[c] = x[c][0];
    return 2.0 * CHAINS * (BYTES / 4) * (double)steps;
}

/* Dot products of four unsigned and four signed bytes, added to an int32: vpdpbusd. */
double peak_s8(long steps, int chains[CHAINS])
{
#if defined(__AVX512VNNI__)
    __m512i x[CHAINS];
    for (int c = 0; c < CHAINS; c++)
        x[c] = _mm512_set1_epi32(chains[c]);
    const __m512i a = x[1], w = x[2];
    for (long i = 0; i < steps; i++)
        for (int c = 0; c < CHAINS; c++)
            x[c] = _mm512_dpbusd_epi32(x[c], a, w);
    for (int c = 0; c < CHAINS; c++)
        chains[c] = _mm_cvtsi128_si32(_mm512_castsi512_si128(x[c]));
    return 2.0 * CHAINS * BYTES * (double)steps;
#elif defined(__AVXVNNI__)
    __m256i x[CHAINS];
    for (int c = 0; c < CHAINS; c++)
        x[c] = _mm256_set1_epi32(chains[c]);
    const __m256i a = x[1], w = x[2];
    for (long i = 0; i < steps; i++)
        for (int c = 0; c < CHAINS; c++)
            x[c] = _mm256_dpbusd_avx_epi32(x[c], a, w);
    for (int c = 0; c < CHAINS; c++)
        chains[c] = _mm_cvtsi128_si32(_mm256_castsi256_si128(x[c]));
    return 2.0 * CHAINS * BYTES * (double)steps;
#else
    (void)steps, (void)chains;
    return 0;
#endif
}

/* Reads `bytes` (a multiple of 8 vectors is read, the rest left) from start to end, `steps` times; gives the bytes read. */
double peak_read(long steps, const char *start, long bytes, int sum[16])
{
    typedef int vector __attribute__((vector_size(BYTES ? BYTES : 16), aligned(4)));
    enum { VECTORS = 8 };
    const long blocks = bytes / (long)(VECTORS * sizeof(vector));
    vector x[VECTORS] = {0};
    for (long i = 0; i < steps; i++) {
        const vector *from = (const vector *)start;
        for (long block = 0; block < blocks; block++, from += VECTORS)
            for (int v = 0; v < VECTORS; v++)
                x[v] ^= from[v];
    }
    for (int v = 0; v < VECTORS; v++)
        for (int lane = 0; lane < (int)(sizeof(vector) / sizeof(int)); lane++)
            sum[lane] ^= x[v][lane];
    return (double)steps * blocks * VECTORS * sizeof(vector);
}

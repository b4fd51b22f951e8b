/* peak.c: what one core can do: independent chains of multiply-adds that never leave the registers.
 *
 * Compiled by bench/kernels.py with the flags of one row of csrc/isa.def and -ffp-contract=fast, which makes one
 * instruction of x * a + b. Twelve chains cover the latency (4 or 5 cycles) of two multiply-adds a cycle.
 *
 * Each function runs `steps` multiply-adds in every lane of every chain, from the given start values, which keep the
 * compiler from seeing that chains are alike, and returns the operations done; 0 where the flags have no such instruction.
 */
#ifdef __AMXINT8__ /* Clang 14 */
#define __AMX_INT8__ 1
#endif
#if defined(__AMX_INT8__) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
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

/* Dot products of four unsigned and four signed bytes, added to an int32: vpdpbusd, or on tiles tdpbusd, whose four chains
 * cover its latency (52 cycles, one every 16). The process must have been permitted tiles (csrc/cpu.c). */
double peak_s8(long steps, int chains[CHAINS])
{
#if defined(__AMX_INT8__)
    static const struct {
        unsigned char palette, start_row, reserved[14];
        unsigned short row_bytes[16];
        unsigned char rows[16];
    } shapes = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16}};
    (void)chains;
    _tile_loadconfig(&shapes);
    for (long i = 0; i < steps; i++) {
        _tile_dpbusd(0, 4, 5);
        _tile_dpbusd(1, 4, 5);
        _tile_dpbusd(2, 4, 5);
        _tile_dpbusd(3, 4, 5);
    }
    _tile_release();
    return 2.0 * 4 * 16 * 16 * 64 * (double)steps;
#elif defined(__AVX512VNNI__)
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

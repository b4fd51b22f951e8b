/* peak.c: what one core can do: independent chains of multiply-adds that never leave the registers.
 *
 * Compiled by bench/kernels.py with the flags of one row of csrc/isa.def and -ffp-contract=fast, which makes one
 * instruction of x * a + b. Twelve chains cover the latency (4 or 5 cycles) of two multiply-adds a cycle.
 *
 * Each function runs `steps` multiply-adds in every lane of every chain, from the given start values, which keep the
 * compiler from seeing that chains are alike, and returns the operations done; 0 where the flags have no such instruction.
 */
#include "../csrc/kernels/unroll.h"

#if defined(__AVX512VNNI__)
#define DPBUSD "vpdpbusd"
#elif defined(__AVXVNNI__)
#define DPBUSD "%{vex%} vpdpbusd"
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

/* Dot products of four unsigned and four signed bytes, added to an int32: vpdpbusd. Written out, because GCC 12 copies the
 * chains of the intrinsic from register to register in every step. */
double peak_s8(long steps, int chains[CHAINS])
{
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    typedef int vector __attribute__((vector_size(BYTES)));
    vector x[CHAINS];
    FB_UNROLL
    for (int c = 0; c < CHAINS; c++)
        x[c] = chains[c] - (vector){0};
    const vector a = x[1], w = x[2];
    for (long i = 0; i < steps; i++)
        FB_UNROLL
    for (int c = 0; c < CHAINS; c++)
        __asm__ volatile(DPBUSD " %2, %1, %0" : "+v"(x[c]) : "v"(a), "v"(w));
    FB_UNROLL
    for (int c = 0; c < CHAINS; c++)
        chains[c] = x[c][0];
    return 2.0 * CHAINS * BYTES * (double)steps;
#else
    (void)steps, (void)chains;
    return 0;
#endif
}

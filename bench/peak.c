/* peak.c: what one core can do: independent chains of fused multiply-adds that never leave the registers.
 *
 * Compiled by bench/kernels.py with the flags of one row of csrc/isa.def and -ffp-contract=fast, which makes one
 * instruction of x * a + b. Twelve chains cover the latency (4 or 5 cycles) of two multiply-adds a cycle.
 */
#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { BYTES = 32 };
#elif defined(__ARM_FEATURE_FMA)
enum { BYTES = 16 };
#else
#error "peak.c: these flags have no vector multiply-add"
#endif
enum { CHAINS = 12 };

typedef float vector __attribute__((vector_size(BYTES)));

/* Runs `steps` multiply-adds in every lane of every chain, from the given start values; returns the floating-point
 * operations done. The start values keep the compiler from seeing that chains are alike. */
double peak(long steps, float chains[CHAINS])
{
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

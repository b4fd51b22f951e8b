/* peak.c: what one core can do: independent chains of multiply-adds that never leave the registers; reading of memory.
 *
 * Compiled by bench/kernels.py with the flags of one row of csrc/isa.def and -ffp-contract=fast, which makes one
 * instruction of x * a + b. Twelve chains cover the latency (4 or 5 cycles) of two multiply-adds a cycle.
 *
 * Each function runs `steps` multiply-adds in every lane of every chain, from the given start values, which keep the
 * compiler from seeing that chains are alike, and returns the operations done; 0 where the flags have no such instruction.
 */
#include "../csrc/kernels/unroll.h"

#ifdef __AMXINT8__ /* Clang 14 */
#define __AMX_INT8__ 1
#endif
#if defined(__AMX_INT8__)
#include <immintrin.h>
#elif defined(__AVX512VNNI__)
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

#if defined(__AMX_INT8__) || defined(__AMX_BF16__) || defined(__AMXBF16__)
/* Tiles 0 to 3 of zeros for sums, 4 and 5 of bfloat16 of either sign from 1 to 2, or any bytes: products of zeros, which
 * take less power, would be timed at a higher clock (csrc/README.md). The process must have been permitted tiles
 * (csrc/cpu.c). */
static void set_up_tiles(void)
{
    static const struct {
        unsigned char palette, start_row, reserved[14];
        unsigned short row_bytes[16];
        unsigned char rows[16];
    } shapes = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16}};
    unsigned short operands[16 * 32];
    unsigned random = 1;
    for (int i = 0; i < 16 * 32; i++) {
        random = random * 1664525 + 1013904223;
        operands[i] = (unsigned short)(0x3f80 | (random >> 16 & 0x807f));
    }
    /* GCC 12 does not tell its optimiser that a tile is loaded from them. */
    __asm__ volatile("" : : "r"(operands) : "memory");
    _tile_loadconfig(&shapes);
    _tile_loadd(4, operands, 64);
    _tile_loadd(5, operands, 64);
}
#endif

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

/* Dot products of four unsigned and four signed bytes, added to an int32: vpdpbusd, written out, because GCC 12 copies the
 * chains of the intrinsic from register to register in every step; or on tiles tdpbusd, whose four chains cover its latency
 * (52 cycles, one every 16). */
double peak_s8(long steps, int chains[CHAINS])
{
#if defined(__AMX_INT8__)
    (void)chains;
    set_up_tiles();
    for (long i = 0; i < steps; i++) {
        _tile_dpbusd(0, 4, 5);
        _tile_dpbusd(1, 4, 5);
        _tile_dpbusd(2, 4, 5);
        _tile_dpbusd(3, 4, 5);
    }
    _tile_release();
    return 2.0 * 4 * 16 * 16 * 64 * (double)steps;
#elif defined(DPBUSD)
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

/* What gemm_split can do at most: a sixth of the multiply-adds of bfloat16 on tiles. */
double peak_split(long steps, int chains[CHAINS])
{
    (void)chains;
#if defined(__AMX_BF16__) || defined(__AMXBF16__)
    set_up_tiles();
    for (long i = 0; i < steps; i++) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_release();
    return 2.0 * 4 * 16 * 16 * 32 / 6 * (double)steps;
#else
    (void)steps;
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

/* cpu.h: what this CPU has and this OS allows, as bits. Vector sets count only when the OS saves their registers.
 * FB_CPU_NEAR_L3 is no instruction set: it decides how work is cut. */
#ifndef FB_CPU_H
#define FB_CPU_H

#include <stdint.h>

enum {
    FB_CPU_AVX2 = 1 << 0,
    FB_CPU_FMA = 1 << 1,
    FB_CPU_F16C = 1 << 2,
    FB_CPU_AVX512F = 1 << 3,
    FB_CPU_AVX512BW = 1 << 4,
    FB_CPU_AVX512DQ = 1 << 5,
    FB_CPU_AVX512VL = 1 << 6,
    FB_CPU_AVX512VNNI = 1 << 7,
    FB_CPU_AVXVNNI = 1 << 8,
    FB_CPU_AMXTILE = 1 << 9,
    FB_CPU_AMXINT8 = 1 << 10,
    FB_CPU_AMXBF16 = 1 << 11,
    FB_CPU_NEAR_L3 = 1 << 12, /* AMD: what leaves the L2 cache is soon back */
    /* ARM64: from the top down, so that both families grow without meeting */
    FB_CPU_NEON = 1 << 30,
    FB_CPU_DOTPROD = 1 << 29,
    FB_CPU_I8MM = 1 << 28
};

/* Where the CPU has AMX, this asks the OS to let the process use it. */
uint32_t fb_cpu_features(void);

#endif

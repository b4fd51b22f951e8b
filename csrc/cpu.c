#define _GNU_SOURCE /* syscall */
#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef _MSC_VER
#include <intrin.h>
static void cpuid(uint32_t leaf, uint32_t sub, uint32_t r[4]) { __cpuidex((int *)r, (int)leaf, (int)sub); }
static uint64_t xgetbv0(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(uint32_t leaf, uint32_t sub, uint32_t r[4]) { __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]); }
static uint64_t xgetbv0(void)
{
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}
#endif

/* Bit numbers: Intel SDM volume 2A, CPUID leaves 1, 7.0, 7.1 and 1D.1. */
enum { EAX, EBX, ECX, EDX };
enum { LEAF_1, LEAF_7, LEAF_7_1, LEAF_1D_1, LEAVES };
/* Registers that the OS must save: bits of XCR0, Intel SDM volume 1, 13.3. */
enum { YMM = 0x06, ZMM = 0xe6, TILES = 0x60000 };
static const struct {
    uint8_t leaf, reg, bit;
    uint32_t saved;
    uint32_t feature;
} table[] = {
    {LEAF_1, ECX, 12, YMM, FB_CPU_FMA},       {LEAF_1, ECX, 29, YMM, FB_CPU_F16C},
    {LEAF_7, EBX, 5, YMM, FB_CPU_AVX2},       {LEAF_7, EBX, 16, ZMM, FB_CPU_AVX512F},
    {LEAF_7, EBX, 17, ZMM, FB_CPU_AVX512DQ},  {LEAF_7, EBX, 30, ZMM, FB_CPU_AVX512BW},
    {LEAF_7, EBX, 31, ZMM, FB_CPU_AVX512VL},  {LEAF_7, ECX, 11, ZMM, FB_CPU_AVX512VNNI},
    {LEAF_7_1, EAX, 4, YMM, FB_CPU_AVXVNNI},  {LEAF_7, EDX, 24, TILES, FB_CPU_AMXTILE},
    {LEAF_7, EDX, 25, TILES, FB_CPU_AMXINT8}, {LEAF_7, EDX, 22, TILES, FB_CPU_AMXBF16},
};
static const uint32_t amx = FB_CPU_AMXTILE | FB_CPU_AMXINT8 | FB_CPU_AMXBF16;

/* What the CPU lists and the OS saves. Tiles count as 8 of 16 rows of 64 bytes, palette 1, which is all there is so far. */
static uint32_t listed(uint32_t leaves[LEAVES][4], uint64_t saved)
{
    uint32_t features = 0;
    for (unsigned i = 0; i < sizeof table / sizeof table[0]; i++)
        if ((leaves[table[i].leaf][table[i].reg] >> table[i].bit & 1) && (saved & table[i].saved) == table[i].saved)
            features |= table[i].feature;
    const uint32_t *palette = leaves[LEAF_1D_1];
    if (palette[EAX] != (1024 << 16 | 8192) || palette[EBX] != (8 << 16 | 64) || (palette[ECX] & 0xffff) != 16)
        features &= ~amx;
    return features;
}

/* Linux (5.16 and later) faults a process that touches a tile before it has asked for them. The permission belongs to the
 * process: it covers threads started before and after, is inherited by fork and lost in exec; asking again changes
 * nothing, so no state is kept here. Refused by older kernels, by some sandboxes, and where a thread has an alternate
 * signal stack too small for a frame with tiles. A filter of system calls may feign success, so the result is read back.
 * Source: Documentation/arch/x86/xstate.rst of Linux. Other systems: not known to us, so no. */
static int tiles_permitted(void)
{
#if defined(__linux__) && defined(__x86_64__)
    enum { GET_XCOMP_PERM = 0x1022, REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 }; /* asm/prctl.h, less ARCH_ */
    uint64_t permitted = 0;
    return syscall(SYS_arch_prctl, REQ_XCOMP_PERM, XTILEDATA) == 0 &&
           syscall(SYS_arch_prctl, GET_XCOMP_PERM, &permitted) == 0 && (permitted >> XTILEDATA & 1);
#else
    return 0;
#endif
}

uint32_t fb_cpu_features(void)
{
    uint32_t leaf0[4], leaves[LEAVES][4] = {{0}};
    cpuid(0, 0, leaf0);
    cpuid(1, 0, leaves[LEAF_1]);
    if (leaf0[EAX] >= 7) {
        cpuid(7, 0, leaves[LEAF_7]);
        if (leaves[LEAF_7][EAX] >= 1) /* the highest sub-leaf */
            cpuid(7, 1, leaves[LEAF_7_1]);
    }
    if (leaf0[EAX] >= 0x1d)
        cpuid(0x1d, 1, leaves[LEAF_1D_1]);
    const uint32_t osxsave = leaves[LEAF_1][ECX] >> 27 & 1;
    const int amd = leaf0[EBX] == 0x68747541 && leaf0[EDX] == 0x69746e65 && leaf0[ECX] == 0x444d4163; /* AuthenticAMD */
    const uint32_t features = listed(leaves, osxsave ? xgetbv0() : 0) | (amd ? FB_CPU_NEAR_L3 : 0);
    return features & amx && !tiles_permitted() ? features & ~amx : features;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

/* NEON is part of every ARMv8-A; what else there is only the OS can say. */

#if defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>
static uint32_t asked(const char *name, uint32_t feature) /* sysctl names: Apple, "Determining instruction set ..." */
{
    int value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(name, &value, &bytes, NULL, 0) == 0 && value ? feature : 0;
}
static uint32_t optional_features(void)
{
    return asked("hw.optional.arm.FEAT_DotProd", FB_CPU_DOTPROD) | asked("hw.optional.arm.FEAT_I8MM", FB_CPU_I8MM);
}

#elif defined(_WIN32)
#include <windows.h>
/* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE and PF_ARM_SVE_I8MM.. precede many SDKs: by number. */
static uint32_t optional_features(void)
{
    return (IsProcessorFeaturePresent(43) ? FB_CPU_DOTPROD : 0) | (IsProcessorFeaturePresent(66) ? FB_CPU_I8MM : 0);
}

#elif defined(__linux__)
#include <sys/auxv.h>
/* From the kernel at process start, without /proc or /sys. Bits: Linux, arch/arm64/include/uapi/asm/hwcap.h. */
static uint32_t optional_features(void)
{
    return (getauxval(AT_HWCAP) >> 20 & 1 ? FB_CPU_DOTPROD : 0) | (getauxval(AT_HWCAP2) >> 13 & 1 ? FB_CPU_I8MM : 0);
}

#else
static uint32_t optional_features(void) { return 0; }
#endif

uint32_t fb_cpu_features(void) { return FB_CPU_NEON | optional_features(); }

#else

uint32_t fb_cpu_features(void) { return 0; }

#endif

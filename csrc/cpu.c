#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)

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

/* Bit numbers: Intel SDM volume 2A, CPUID leaves 1, 7.0 and 7.1; volume 1, 13.3 (XCR0). */
enum { EAX, EBX, ECX, EDX };
enum { LEAF_1, LEAF_7, LEAF_7_1, LEAVES };
static const struct {
    uint8_t leaf, reg, bit;
    uint8_t zmm; /* needs the OS to save opmask and zmm registers */
    uint32_t feature;
} table[] = {
    {LEAF_1, ECX, 12, 0, FB_CPU_FMA},      {LEAF_1, ECX, 29, 0, FB_CPU_F16C},
    {LEAF_7, EBX, 5, 0, FB_CPU_AVX2},      {LEAF_7, EBX, 16, 1, FB_CPU_AVX512F},
    {LEAF_7, EBX, 17, 1, FB_CPU_AVX512DQ}, {LEAF_7, EBX, 30, 1, FB_CPU_AVX512BW},
    {LEAF_7, EBX, 31, 1, FB_CPU_AVX512VL}, {LEAF_7, ECX, 11, 1, FB_CPU_AVX512VNNI},
    {LEAF_7_1, EAX, 4, 0, FB_CPU_AVXVNNI},
};

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
    const uint32_t osxsave = leaves[LEAF_1][ECX] >> 27 & 1;
    const uint64_t saved = osxsave ? xgetbv0() : 0;
    const int ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
    uint32_t features = 0;
    for (unsigned i = 0; i < sizeof table / sizeof table[0]; i++)
        if ((leaves[table[i].leaf][table[i].reg] >> table[i].bit & 1) && (table[i].zmm ? zmm : ymm))
            features |= table[i].feature;
    return features;
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

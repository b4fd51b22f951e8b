/* unroll.h: FB_UNROLL before a loop of constant count, so that an array of vectors becomes registers; FB_FOUR_A_TURN before
 * one of any count. */
#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed" /* a loop that became memcpy or memset before it could be unrolled */
#define FB_UNROLL _Pragma("clang loop unroll(full)")
#define FB_FOUR_A_TURN _Pragma("clang loop unroll_count(4)")
#else
#define FB_UNROLL _Pragma("GCC unroll 16")
#define FB_FOUR_A_TURN _Pragma("GCC unroll 4")
#endif

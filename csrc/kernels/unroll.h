/* unroll.h: FB_UNROLL before a loop of constant count, so that an array of vectors becomes registers. */
#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed" /* a loop that became memcpy or memset before it could be unrolled */
#define FB_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FB_UNROLL _Pragma("GCC unroll 16")
#endif

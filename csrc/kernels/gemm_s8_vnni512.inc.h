/* gemm_s8_vnni512.inc.h: gemm_s8.inc.h over vpdpbusd of 512 bits, which multiplies four unsigned bytes by four signed ones and
 * adds them to an int32, exactly. An 8x48 tile, as in the float32 GEMM of avx512.c. For avx512vnni.c, and the few rows of
 * amx.c. Included after simd_avx512.h, activations.inc.h and epilogue.inc.h.
 */
static inline vi vi_dot(vi acc, vrow row, vi w) { return _mm512_dpbusd_epi32(acc, row, w); }
#define FB_S8_DEPTH 4
#define FB_A_SHIFT 0
#define FB_S8_MR 8
#define FB_S8_TILES FB_TILES_8X48
static const int fb_s8_strips[FB_S8_MR + 1] = {0, 8, 8, 8, 4, 4, 4, 3, 3};
#include "gemm_s8.inc.h"

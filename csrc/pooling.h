/* pooling.h: from the token rows of one sequence to one vector, and its length. */
#ifndef FB_POOLING_H
#define FB_POOLING_H

#include "fastbert.h"

/* Writes the modes of `pooling` (FB_POOL_*) one after the other: out [modes * hidden].
 * x [tokens][hidden], rows ldx apart, tokens >= 1. Sums run over ascending tokens, in float32. */
void fb_pool(int pooling, ptrdiff_t tokens, ptrdiff_t hidden, const float *x, ptrdiff_t ldx, float *out);

/* x / max(|x|, 1e-12) in place; |x| is summed in float64. */
void fb_normalize(ptrdiff_t n, float *x);

#endif

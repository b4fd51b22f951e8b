/* pooling.c: the pooling modes of sentence-transformers (Reimers & Gurevych, arXiv:1908.10084).
 *
 * Only additions, multiplications, divisions and square roots in a fixed order: the same bits on every CPU.
 */
#include "pooling.h"

#include <math.h>
#include <string.h>

static void add_up(ptrdiff_t tokens, ptrdiff_t hidden, const float *x, ptrdiff_t ldx, int weighted, float divisor,
                   float *out)
{
    memset(out, 0, (size_t)hidden * sizeof *out);
    for (ptrdiff_t t = 0; t < tokens; t++, x += ldx) {
        const float weight = weighted ? (float)(t + 1) : 1.0f;
        for (ptrdiff_t j = 0; j < hidden; j++)
            out[j] += weight * x[j];
    }
    for (ptrdiff_t j = 0; j < hidden; j++)
        out[j] /= divisor;
}

static void largest(ptrdiff_t tokens, ptrdiff_t hidden, const float *x, ptrdiff_t ldx, float *out)
{
    memcpy(out, x, (size_t)hidden * sizeof *out);
    for (ptrdiff_t t = 1; t < tokens; t++) {
        x += ldx;
        for (ptrdiff_t j = 0; j < hidden; j++)
            out[j] = out[j] > x[j] ? out[j] : x[j];
    }
}

void fb_pool(int pooling, ptrdiff_t tokens, ptrdiff_t hidden, const float *x, ptrdiff_t ldx, float *out)
{
    const float n = (float)tokens;
    for (int mode = 1; mode < FB_POOL_ALL; mode <<= 1) {
        switch (pooling & mode) {
        case FB_POOL_CLS: memcpy(out, x, (size_t)hidden * sizeof *out); break;
        case FB_POOL_MAX: largest(tokens, hidden, x, ldx, out); break;
        case FB_POOL_MEAN: add_up(tokens, hidden, x, ldx, 0, n, out); break;
        case FB_POOL_MEAN_SQRT_LEN: add_up(tokens, hidden, x, ldx, 0, sqrtf(n), out); break;
        case FB_POOL_WEIGHTED_MEAN: add_up(tokens, hidden, x, ldx, 1, n * (n + 1) / 2, out); break;
        case FB_POOL_LAST: memcpy(out, x + (tokens - 1) * ldx, (size_t)hidden * sizeof *out); break;
        default: continue;
        }
        out += hidden;
    }
}

void fb_normalize(ptrdiff_t n, float *x)
{
    double squares[4] = {0, 0, 0, 0}; /* four chains hide the latency of the addition */
    for (ptrdiff_t j = 0; j < n; j++)
        squares[j & 3] += (double)x[j] * x[j];
    const double length = sqrt((squares[0] + squares[2]) + (squares[1] + squares[3]));
    const float divisor = (float)(length > 1e-12 ? length : 1e-12);
    for (ptrdiff_t j = 0; j < n; j++)
        x[j] /= divisor;
}

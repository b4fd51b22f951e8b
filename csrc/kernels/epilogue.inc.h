/* epilogue.inc.h: the ends of a GEMM tile that all types share. Included after activations.inc.h. */

static inline vf load_columns(const float *p, ptrdiff_t columns)
{
    return columns == 16 ? v_load(p) : v_load_n(p, columns, 0.0f);
}
static inline void store_columns(float *p, vf x, ptrdiff_t columns)
{
    if (columns == 16)
        v_store(p, x);
    else
        v_store_n(p, x, columns);
}

/* C = residual + act(C) for a finished tile of m rows and n columns, while it is in the L1 cache. */
static void activate(fb_act act, ptrdiff_t m, ptrdiff_t n, const float *residual, ptrdiff_t ldr, float *c,
                     ptrdiff_t ldc)
{
    for (ptrdiff_t i = 0; i < m; i++)
        for (ptrdiff_t j = 0; j < n; j += 16) {
            const ptrdiff_t columns = n - j < 16 ? n - j : 16;
            vf x = v_act(act, load_columns(c + i * ldc + j, columns));
            if (residual)
                x = v_add(load_columns(residual + i * ldr + j, columns), x);
            store_columns(c + i * ldc + j, x, columns);
        }
}

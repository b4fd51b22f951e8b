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

/* epilogue.inc.h: what the GEMMs of all types share: how rows and strips are divided, how a strip of W is read, and the ends of
 * a tile. Included after activations.inc.h. */

/* Parts as even as can be, the longer ones first: 13 = 7 + 6. One division for all of them. */
typedef struct {
    ptrdiff_t each, left;
} parts;
static inline parts parts_of(ptrdiff_t whole, ptrdiff_t count) { return (parts){whole / count, whole % count}; }
static inline ptrdiff_t part_size(parts p, ptrdiff_t i) { return p.each + (i < p.left); }
static inline ptrdiff_t part_start(parts p, ptrdiff_t i) { return i * p.each + (i < p.left ? i : p.left); }

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

/* Asks for the lines of C at the start of a tile. Stores that wait for memory would hold up all stores after them, the first
 * of the next tile included: without this, int8 with N = 1536 ran a quarter slower than with N = 384 on avx2 (K = 384, 2026-11);
 * and the float32 activation, which reads what a tile stored, took 2 times as long where other programs share the core. */
static inline __attribute__((always_inline)) void ask_for_c(const int mr, const int nv, const float *c, ptrdiff_t ldc)
{
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++)
            __builtin_prefetch(c + i * ldc + j * 16, 1);
}

/* `columns` rows of W, element [j][p] at w[j * stride_n + p * stride_k], as k steps of 16 floats; absent columns are 0. */
static void strip_of(ptrdiff_t columns, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k, float *out)
{
    ptrdiff_t p = 0;
    if (stride_n == 1)
        for (; p < k; p++, out += 16)
            v_store(out, load_columns(w + p * stride_k, columns));
    for (; p < k; p += 16) {
        const ptrdiff_t depth = k - p < 16 ? k - p : 16;
        vf r[16];
        for (ptrdiff_t i = 0; i < 16; i++)
            r[i] = i < columns ? load_columns(w + i * stride_n + p, depth) : v_set1(0.0f);
        v_transpose(r);
        for (ptrdiff_t i = 0; i < depth; i++, out += 16)
            v_store(out, r[i]);
    }
}

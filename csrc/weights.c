/* weights.c: one walk over the model's tensors, run twice: first it adds up sizes, then it packs into the block.
 */
#define _DEFAULT_SOURCE /* madvise */
#include "weights.h"

#include "error.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <malloc.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

/* Large blocks ask for huge pages: a forward pass walks through all weights, and 4 KB pages cost a walk of the page
 * table each. */
void *fb_aligned_alloc(size_t bytes)
{
    if (bytes > SIZE_MAX - 63)
        return NULL;
    bytes = (bytes + 63) / 64 * 64;
#ifdef _WIN32
    void *memory = _aligned_malloc(bytes, 64);
#else
    const size_t huge_page = 2u << 20, alignment = bytes >= 2 * huge_page ? huge_page : 64;
    void *memory = NULL;
    if (posix_memalign(&memory, alignment, bytes ? bytes : 64) != 0)
        memory = NULL;
#ifdef MADV_HUGEPAGE
    if (memory != NULL && alignment == huge_page)
        (void)madvise(memory, bytes / huge_page * huge_page, MADV_HUGEPAGE);
#endif
#endif
    return memory;
}

void fb_aligned_free(void *memory)
{
#ifdef _WIN32
    _aligned_free(memory);
#else
    free(memory);
#endif
}

/* ---- element types ---- */

static float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Masks instead of branches, so that a compiler turns loops of it into vectors: 2.5 times as fast. Subnormals are
 * fraction * 2^-24, exact; normal numbers get 112 onto their exponent, infinities and NaN twice that. */
static float from_f16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h & 0x7c00, fraction = h & 0x3ff;
    const uint32_t is_normal = -(uint32_t)(exponent != 0), is_special = -(uint32_t)(exponent == 0x7c00);
    const float subnormal = (float)(int32_t)fraction * 0x1p-24f;
    uint32_t bits;
    memcpy(&bits, &subnormal, sizeof bits);
    return from_bits(sign | (~is_normal & bits) |
                     (is_normal & (((uint32_t)(h & 0x7fff) << 13) + 0x38000000u + (is_special & 0x38000000u))));
}

/* count elements of an unaligned little-endian array, stride apart, to float32. */
static inline void convert_row(fb_dtype dtype, const unsigned char *in, int64_t stride, int64_t count, float *out)
{
    uint16_t h;
    double d;
    switch (dtype) {
    case FB_F32:
        for (int64_t i = 0; i < count; i++)
            memcpy(out + i, in + 4 * i * stride, sizeof *out);
        break;
    case FB_F16:
        for (int64_t i = 0; i < count; i++) {
            memcpy(&h, in + 2 * i * stride, sizeof h);
            out[i] = from_f16(h);
        }
        break;
    case FB_BF16:
        for (int64_t i = 0; i < count; i++) {
            memcpy(&h, in + 2 * i * stride, sizeof h);
            out[i] = from_bits((uint32_t)h << 16);
        }
        break;
    case FB_F64:
        for (int64_t i = 0; i < count; i++) {
            memcpy(&d, in + 8 * i * stride, sizeof d);
            out[i] = (float)d;
        }
        break;
    }
}

void fb_tensor_to_f32(const fb_tensor *t, int64_t first, int64_t rows, int64_t columns, float *out)
{
    const int64_t item = t->dtype == FB_F64 ? 8 : t->dtype == FB_F32 ? 4 : 2;
    const int64_t row = t->strides == NULL ? columns : t->strides[0];
    const int64_t column = t->strides == NULL ? 1 : t->strides[t->rank - 1];
    const unsigned char *in = (const unsigned char *)t->data + first * row * item;
    if (column == 1 && row == columns)
        convert_row(t->dtype, in, 1, rows * columns, out);
    else if (column == 1)
        for (int64_t i = 0; i < rows; i++)
            convert_row(t->dtype, in + i * row * item, 1, columns, out + i * columns);
    else /* a transposed matrix: in blocks of 16 columns, whose cache lines stay for the next rows */
        for (int64_t j = 0; j < columns; j += 16)
            for (int64_t i = 0; i < rows; i++)
                convert_row(t->dtype, in + (i * row + j * column) * item, column, columns - j < 16 ? columns - j : 16,
                            out + i * columns + j);
}

/* Lets the pages of a mapped tensor go, so that file and packed weights are not both in memory. */
static void let_go(const fb_tensor *t)
{
#if defined(__linux__) || defined(__APPLE__)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), data = (uintptr_t)t->data;
    uintptr_t bytes = t->dtype == FB_F64 ? 8 : t->dtype == FB_F32 ? 4 : 2;
    for (int i = 0; i < t->rank; i++)
        bytes *= (uintptr_t)t->shape[i];
    const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
    if (t->mapped && begin < end)
        madvise((void *)begin, end - begin, MADV_DONTNEED);
#else
    (void)t;
#endif
}

/* ---- the walk ---- */

typedef struct walk {
    const fb_tensor *tensors;
    size_t num_tensors;
    const fb_kernels *kernels;
    char *block;    /* NULL in the first run */
    size_t used;    /* bytes of the block so far */
    float *staging; /* one linear layer, row-major, before packing */
    size_t staging_bytes;
    int8_t *staging_s8; /* the same, quantised: staging_bytes / 4 */
    float *scales;      /* of its rows: scales_bytes */
    size_t scales_bytes;
    fb_error *err;
    fb_status status; /* the first failure; later steps do nothing */
} walk;

static void *take(walk *w, size_t bytes)
{
    const size_t at = w->used, end = at + bytes;
    w->used = (end + 63) / 64 * 64;
    if (w->block == NULL)
        return NULL;
    memset(w->block + end, 0, w->used - end);
    return w->block + at;
}

static const fb_tensor *find(const walk *w, const char *name)
{
    for (size_t i = 0; i < w->num_tensors; i++)
        if (strcmp(w->tensors[i].name, name) == 0)
            return &w->tensors[i];
    return NULL;
}

static void describe(char *text, size_t size, const int64_t *shape, int rank)
{
    size_t used = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (used < size)
        snprintf(text + used, size - used, "]");
}

/* The tensor `name` with the shape [rows, columns], or [columns] when rows is 0; NULL after a failure. */
static const fb_tensor *expect(walk *w, const char *name, ptrdiff_t rows, ptrdiff_t columns)
{
    const int64_t wanted[2] = {rows ? rows : columns, columns};
    const int rank = rows ? 2 : 1;
    char expected[64], got[128];
    if (w->status != FB_OK)
        return NULL;
    const fb_tensor *t = find(w, name);
    describe(expected, sizeof expected, wanted, rank);
    if (t == NULL) {
        w->status =
            fb_fail(w->err, FB_EINVAL, "%s: expected %s, but the checkpoint has no such tensor", name, expected);
        return NULL;
    }
    if (t->rank != rank || t->shape[0] != wanted[0] || (rank == 2 && t->shape[1] != wanted[1])) {
        describe(got, sizeof got, t->shape, t->rank);
        w->status = fb_fail(w->err, FB_EINVAL, "%s: expected %s, got %s", name, expected, got);
        return NULL;
    }
    return t;
}

/* A vector or table as it is. */
static const float *table(walk *w, const char *name, ptrdiff_t rows, ptrdiff_t columns)
{
    const fb_tensor *t = expect(w, name, rows, columns);
    const ptrdiff_t count = (rows ? rows : 1) * columns;
    float *out = take(w, (size_t)count * sizeof *out);
    if (t != NULL && out != NULL) {
        fb_tensor_to_f32(t, 0, rows ? rows : 1, columns, out);
        let_go(t);
    }
    return out;
}

/* q[j] = x[j] / scale to the nearest of -127 .. 127, ties to even. Returns scale: 0 for a row of zeros, NaN with all q 0
 * for a row that is not finite, so that what is made from it is NaN. */
static float quantize_row(ptrdiff_t n, const float *x, int8_t *q)
{
    /* Sixteen lanes, which a compiler turns into vectors of any width: a maximum has no order, and a sum of zeros neither. */
    float lanes[16] = {0}, bad_lanes[16] = {0}, largest = 0.0f, bad = 0.0f;
    ptrdiff_t j = 0;
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) {
            const float size = fabsf(x[j + l]);
            lanes[l] = size > lanes[l] ? size : lanes[l];
            bad_lanes[l] += x[j + l] * 0.0f;
        }
    for (; j < n; j++) {
        lanes[0] = fabsf(x[j]) > lanes[0] ? fabsf(x[j]) : lanes[0];
        bad_lanes[0] += x[j] * 0.0f;
    }
    for (int l = 0; l < 16; l++) {
        largest = lanes[l] > largest ? lanes[l] : largest;
        bad += bad_lanes[l];
    }
    const float scale = largest / 127.0f, inverse = scale >= 0x1p-120f && bad == 0.0f ? 1.0f / scale : 0.0f;
    if (inverse == 0.0f) {
        memset(q, 0, (size_t)n);
        return bad;
    }
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    for (j = 0; j < n; j++) {
        float rounded = x[j] * inverse + magic - magic;
        rounded = rounded > 127.0f ? 127.0f : rounded;
        rounded = rounded < -127.0f ? -127.0f : rounded;
        q[j] = (int8_t)(int32_t)rounded;
    }
    return scale;
}

/* A table in int8, a scale per row; converted a row at a time. */
static void quantized_table(walk *w, const char *name, ptrdiff_t rows, ptrdiff_t columns, const int8_t **table,
                            const float **scales)
{
    const fb_tensor *t = expect(w, name, rows, columns);
    int8_t *q = take(w, (size_t)rows * (size_t)columns);
    float *s = take(w, (size_t)rows * sizeof *s);
    if ((size_t)columns * sizeof(float) > w->staging_bytes)
        w->staging_bytes = (size_t)columns * sizeof(float);
    *table = q;
    *scales = s;
    for (ptrdiff_t i = 0; t != NULL && q != NULL && i < rows; i++) {
        fb_tensor_to_f32(t, i, 1, columns, w->staging);
        s[i] = quantize_row(columns, w->staging, q + i * columns);
    }
    if (t != NULL && q != NULL)
        let_go(t);
}

static fb_norm norm(walk *w, const char *prefix, ptrdiff_t n)
{
    char name[160];
    fb_norm r;
    snprintf(name, sizeof name, "%s.weight", prefix);
    r.gamma = table(w, name, 0, n);
    snprintf(name, sizeof name, "%s.bias", prefix);
    r.beta = table(w, name, 0, n);
    return r;
}

/* `parts` linear layers of [out][in] as one of [parts * out][in], `run` rows of each in turn; in int8 `mixed` or not. A
 * missing bias is an error unless optional. */
static fb_linear linear(walk *w, const char *prefix, const char *const *names, int parts, ptrdiff_t out, ptrdiff_t run,
                        ptrdiff_t in, fb_format format, int mixed, int bias_optional)
{
    char name[160];
    const ptrdiff_t n = parts * out;
    const size_t staging = (size_t)n * (size_t)in * sizeof(float);
    const fb_kernels *kernels = w->kernels;
    fb_linear r = {n, in, format, take(w, fb_packed_bytes(kernels, format, n, in)), NULL};
    float *bias = NULL;
    if (staging > w->staging_bytes)
        w->staging_bytes = staging;
    if ((size_t)n * sizeof(float) > w->scales_bytes)
        w->scales_bytes = (size_t)n * sizeof(float);
    for (int part = 0; part < parts; part++) {
        snprintf(name, sizeof name, "%s%s.weight", prefix, names[part]);
        const fb_tensor *t = expect(w, name, out, in);
        if (t != NULL && w->block != NULL) {
            for (ptrdiff_t j = 0; j < out; j += run)
                fb_tensor_to_f32(t, j, run, in, w->staging + (j * parts + part * run) * in);
            let_go(t);
        }
        snprintf(name, sizeof name, "%s%s.bias", prefix, names[part]);
        if (bias_optional && find(w, name) == NULL)
            continue;
        t = expect(w, name, 0, out);
        if (part == 0)
            r.bias = bias = take(w, (size_t)n * sizeof *bias);
        if (t != NULL && w->block != NULL)
            for (ptrdiff_t j = 0; j < out; j += run)
                fb_tensor_to_f32(t, j, run, 1, bias + j * parts + part * run);
    }
    if (w->status != FB_OK || w->block == NULL)
        return r;
    if (format != FB_FORMAT_S8) {
        fb_pack_f32(kernels, format, n, in, w->staging, in, 1, (void *)r.packed);
        return r;
    }
    const float gain = mixed ? (float)fb_mix_gain(in) : 1.0f;
    if (mixed)
        kernels->mix_f32(n, in, w->staging, in, w->staging, in);
    for (ptrdiff_t j = 0; j < n; j++)
        w->scales[j] = quantize_row(in, w->staging + j * in, w->staging_s8 + j * in) / gain;
    kernels->gemm_s8->pack(n, in, w->staging_s8, in, w->scales, (void *)r.packed);
    return r;
}

size_t fb_packed_bytes(const fb_kernels *kernels, fb_format format, ptrdiff_t n, ptrdiff_t k)
{
    return format == FB_FORMAT_S8      ? kernels->gemm_s8->packed_bytes(n, k)
           : format == FB_FORMAT_SPLIT ? kernels->gemm_split->packed_bytes(n, k)
                                       : kernels->gemm_f32->packed_bytes(n, k);
}

void fb_pack_f32(const fb_kernels *kernels, fb_format format, ptrdiff_t n, ptrdiff_t k, const float *w,
                 ptrdiff_t stride_n, ptrdiff_t stride_k, void *packed)
{
    (format == FB_FORMAT_SPLIT ? kernels->gemm_split->pack : kernels->gemm_f32->pack)(n, k, w, stride_n, stride_k,
                                                                                      packed);
}

fb_format fb_encoder_format(const fb_config *config, const fb_kernels *kernels)
{
    if (config->precision == FB_INT8)
        return FB_FORMAT_S8;
    return kernels->gemm_split != NULL && config->relaxed ? FB_FORMAT_SPLIT : FB_FORMAT_F32;
}

static void walk_model(walk *w, const fb_config *c, ptrdiff_t pooled_dim, fb_weights *out)
{
    static const char *const qkv[] = {"query", "key", "value"}, *const itself[] = {""};
    const ptrdiff_t hidden = c->hidden_size, head_dim = hidden / c->num_attention_heads, inner = c->intermediate_size;
    const fb_format format = fb_encoder_format(c, w->kernels);
    char prefix[128];

    w->used = 0;
    if (c->precision == FB_FP32)
        out->word = table(w, "embeddings.word_embeddings.weight", c->vocab_size, hidden);
    else
        quantized_table(w, "embeddings.word_embeddings.weight", c->vocab_size, hidden, &out->word_s8,
                        &out->word_scales);
    out->position = table(w, "embeddings.position_embeddings.weight", c->max_position_embeddings, hidden);
    out->type = table(w, "embeddings.token_type_embeddings.weight", c->type_vocab_size, hidden);
    out->embeddings_norm = norm(w, "embeddings.LayerNorm", hidden);
    for (int i = 0; i < c->num_hidden_layers && w->status == FB_OK; i++) {
        fb_layer *layer = &out->layers[i];
#define FB_PREFIX(rest) (snprintf(prefix, sizeof prefix, "encoder.layer.%d." rest, i), prefix)
        layer->qkv = linear(w, FB_PREFIX("attention.self."), qkv, 3, hidden, head_dim, hidden, format, 1, 0);
        layer->attention_output =
            linear(w, FB_PREFIX("attention.output.dense"), itself, 1, hidden, hidden, hidden, format, 0, 0);
        layer->attention_norm = norm(w, FB_PREFIX("attention.output.LayerNorm"), hidden);
        layer->intermediate = linear(w, FB_PREFIX("intermediate.dense"), itself, 1, inner, inner, hidden, format, 1, 0);
        layer->output = linear(w, FB_PREFIX("output.dense"), itself, 1, hidden, hidden, inner, format, 1, 0);
        layer->output_norm = norm(w, FB_PREFIX("output.LayerNorm"), hidden);
#undef FB_PREFIX
    }
    memset(&out->pooler, 0, sizeof out->pooler);
    if (find(w, "pooler.dense.weight") != NULL)
        out->pooler = linear(w, "pooler.dense", itself, 1, hidden, hidden, hidden, FB_FORMAT_F32, 0, 0);
    for (int i = 0; i < c->num_dense && w->status == FB_OK; i++) {
        snprintf(prefix, sizeof prefix, "dense.%d.weight", i);
        const fb_tensor *t = find(w, prefix);
        const ptrdiff_t dim = t != NULL && t->rank == 2 && t->shape[0] > 0 ? (ptrdiff_t)t->shape[0] : 1;
        snprintf(prefix, sizeof prefix, "dense.%d", i);
        out->dense[i] = linear(w, prefix, itself, 1, dim, dim, pooled_dim, FB_FORMAT_F32, 0, 1);
        pooled_dim = dim;
    }
}

fb_status fb_weights_load(fb_weights *weights, const fb_config *config, ptrdiff_t pooled_dim, const fb_kernels *kernels,
                          const fb_tensor *tensors, size_t num_tensors, fb_error *err)
{
    walk w = {.tensors = tensors, .num_tensors = num_tensors, .kernels = kernels, .err = err};
    memset(weights, 0, sizeof *weights);
    weights->layers = calloc((size_t)config->num_hidden_layers, sizeof *weights->layers);
    if (weights->layers == NULL)
        return fb_fail(err, FB_ENOMEM, "%td layers: out of memory", config->num_hidden_layers);
    walk_model(&w, config, pooled_dim, weights);
    if (w.status == FB_OK) {
        weights->bytes = w.used;
        weights->block = w.block = fb_aligned_alloc(w.used);
        w.staging = malloc(w.staging_bytes);
        w.staging_s8 = malloc(w.staging_bytes / sizeof(float));
        w.scales = malloc(w.scales_bytes);
        if (w.block == NULL || w.staging == NULL || w.staging_s8 == NULL || w.scales == NULL)
            w.status = fb_fail(err, FB_ENOMEM, "packed weights of %zu bytes: out of memory", w.used + w.staging_bytes);
        else
            walk_model(&w, config, pooled_dim, weights);
    }
    free(w.staging);
    free(w.staging_s8);
    free(w.scales);
    if (w.status != FB_OK)
        fb_weights_free(weights);
    return w.status;
}

void fb_weights_free(fb_weights *weights)
{
    fb_aligned_free(weights->block);
    free(weights->layers);
    memset(weights, 0, sizeof *weights);
}

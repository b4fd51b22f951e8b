/* fastbert.h: the public C interface: load a BERT encoder, run it over a ragged batch, free it.
 *
 *     fb_model *model;
 *     fb_error err;
 *     if (fb_load(&config, tensors, n_tensors, NULL, &model, &err) != FB_OK)
 *         puts(err.text);
 *     fb_batch batch = {ids, NULL, offsets, 2};
 *     fb_outputs out = {.vectors = vectors};
 *     fb_forward(model, &batch, &out, NULL, &err);
 *     fb_free(model);
 *
 * Every function that can fail returns an fb_status and, unless that is FB_OK, leaves a sentence in *err.
 * The library never prints, aborts or keeps mutable global state but the thread pool (threads.h).
 * Counts are elements; only names that end in _bytes count bytes.
 */
#ifndef FASTBERT_H
#define FASTBERT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fb_status {
    FB_OK = 0,
    FB_EINVAL,   /* an argument, tensor or name is wrong */
    FB_ENOMEM,   /* memory ran out; nothing is half made */
    FB_ECANCELED /* fb_run_options.canceled said so; the outputs are unspecified */
} fb_status;

typedef struct fb_error {
    fb_status status;
    char text[512]; /* one UTF-8 sentence, NUL-terminated */
} fb_error;

/* Element types that a checkpoint tensor may have; each is converted to float32 once, while packing. */
typedef enum fb_dtype { FB_F32, FB_F16, FB_BF16, FB_F64 } fb_dtype;

/* Activation functions. */
typedef enum fb_act {
    FB_ACT_NONE,
    FB_ACT_GELU,      /* x Phi(x), the erf form of Hugging Face's "gelu" (Hendrycks & Gimpel, arXiv:1606.08415) */
    FB_ACT_GELU_TANH, /* the tanh form: "gelu_new", "gelu_pytorch_tanh", "gelu_fast" */
    FB_ACT_RELU,
    FB_ACT_SILU, /* x / (1 + exp(-x)) */
    FB_ACT_TANH
} fb_act;

/* Pooling modes, a bit each; several are concatenated in ascending order (as sentence-transformers does). */
enum {
    FB_POOL_CLS = 1 << 0,           /* the first token */
    FB_POOL_MAX = 1 << 1,           /* largest value of each feature */
    FB_POOL_MEAN = 1 << 2,          /* sum over tokens / tokens */
    FB_POOL_MEAN_SQRT_LEN = 1 << 3, /* sum over tokens / sqrt(tokens) */
    FB_POOL_WEIGHTED_MEAN = 1 << 4, /* token t (from 1) weighs t */
    FB_POOL_LAST = 1 << 5,          /* the last token */
    FB_POOL_ALL = (1 << 6) - 1
};

enum { FB_MAX_DENSE = 8 };

/* Number format of the encoder's linear layers, word embeddings and, for sequences of some length, attention. Pooler, dense
 * modules and all other row operations are float32 in both. */
typedef enum fb_precision {
    FB_FP32,
    FB_INT8 /* weights per output feature, activations per token; made while loading, from any fb_dtype */
} fb_precision;

/* The shape of the model; names as in config.json. */
typedef struct fb_config {
    ptrdiff_t vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size;
    ptrdiff_t max_position_embeddings, type_vocab_size;
    fb_precision precision;
    int relaxed; /* FB_FP32: gemm_split (kernels.h) where the CPU has it; the bits are then those of that unit alone */
    float layer_norm_eps;
    fb_act hidden_act;
    int pooling;   /* FB_POOL_* bits; 0: no sentence vectors */
    int num_dense; /* Dense modules after pooling, tensors dense.<i>.weight [out, in], dense.<i>.bias */
    fb_act dense_act[FB_MAX_DENSE];
    int normalize; /* sentence vectors are scaled to unit length */
} fb_config;

/* A checkpoint tensor: borrowed, little-endian, any alignment. Names are those of Hugging Face's BertModel without a
 * prefix: embeddings.word_embeddings.weight, encoder.layer.0.attention.self.query.weight, ... */
typedef struct fb_tensor {
    const char *name;
    const void *data;
    fb_dtype dtype;
    int rank;
    int64_t shape[4];
    const int64_t *strides; /* [rank] elements from an index to the next; NULL: C order */
    int mapped; /* data lies in a read-only mapping of a file: fb_load lets its pages go once they are read */
} fb_tensor;

typedef struct fb_model fb_model;

/* Packs the tensors for the kernel set `isa` (NULL: environment FASTBERT_ISA, else the best this CPU has).
 * Tensors that the model does not need are ignored; pooler.dense.* is optional. The tensors may be freed
 * afterwards. The model is read-only from then on and may be used from many threads at once. */
fb_status fb_load(const fb_config *config, const fb_tensor *tensors, size_t num_tensors, const char *isa,
                  fb_model **model, fb_error *err);
void fb_free(fb_model *model);

typedef struct fb_info {
    const char *isa;      /* the kernel set that leads: "avx512" */
    const char *gemm;     /* the GEMM of the linear layers: "gemm_f32_8x48_avx512" */
    size_t weights_bytes; /* packed weights and tables in memory */
    ptrdiff_t vector_dim; /* length of a sentence vector; 0 without pooling */
    int has_pooler;       /* pooler.dense.* was in the checkpoint */
} fb_info;
void fb_get_info(const fb_model *model, fb_info *info);

/* A ragged batch: all tokens of all sequences in one row, no padding. */
typedef struct fb_batch {
    const int32_t *ids;      /* [tokens], 0 <= id < vocab_size */
    const int32_t *type_ids; /* [tokens], 0 <= id < type_vocab_size; NULL: all 0 */
    const int64_t *offsets;  /* [size + 1], from 0 to tokens; every sequence has 1 .. max_position_embeddings tokens */
    ptrdiff_t size;          /* sequences */
} fb_batch;

/* What to compute: a NULL pointer skips it. All rows are dense, C order. */
typedef struct fb_outputs {
    float *hidden;  /* last_hidden_state [tokens][hidden_size] */
    float *pooler;  /* pooler_output [size][hidden_size] */
    float *vectors; /* sentence vectors [size][vector_dim] */
} fb_outputs;

typedef struct fb_run_options {
    int threads; /* 0: fb_usable_threads(0) */
    /* Called by the calling thread between micro-batches, where it may do other work while threads run; non-zero stops the
     * run. May be NULL. */
    int (*canceled)(void *canceled_arg);
    void *canceled_arg;
} fb_run_options;

/* Runs the encoder. A sequence's outputs have the same bits whatever else is in the batch, whatever its place, and for
 * any number of threads. options may be NULL. */
fb_status fb_forward(const fb_model *model, const fb_batch *batch, const fb_outputs *out, const fb_run_options *options,
                     fb_error *err);

/* Bytes of scratch that fb_forward holds at most for this model and number of threads. */
size_t fb_scratch_bytes(const fb_model *model, int threads);

/* One layer of a task head, float32 whatever the encoder is: y = act(x W^T + bias), then LayerNorm where gamma is given.
 * Borrowed while fb_head_load runs. Errors name the tensors by fb_tensor.name. */
typedef struct fb_head_config {
    const fb_tensor *weight; /* [out][in] */
    const fb_tensor *bias;   /* [out]; NULL: none */
    fb_act act;
    const fb_tensor *gamma, *beta; /* [out] each; both NULL: no LayerNorm */
    float layer_norm_eps;
} fb_head_config;

typedef struct fb_head fb_head;

/* Packs the layer for the kernel set `isa`, as fb_load does; read-only and free for many threads from then on. */
fb_status fb_head_load(const fb_head_config *config, const char *isa, fb_head **head, fb_error *err);
void fb_head_free(fb_head *head);

/* y [rows][out] of x [rows][in], dense, not overlapping. A row's result has the same bits whatever the other rows are,
 * and for any number of threads. threads: as in fb_run_options. */
void fb_head_run(const fb_head *head, ptrdiff_t rows, const float *x, float *y, int threads);

/* Each row of x [rows][n] becomes exp(x) / sum(exp(x)), in place, with the same bits on every kernel set. */
fb_status fb_softmax(ptrdiff_t rows, ptrdiff_t n, float *x, fb_error *err);

/* The process-wide default for fb_run_options.threads: what was set here, else FASTBERT_NUM_THREADS, else
 * OMP_NUM_THREADS, else min(affinity mask, cgroup quota, physical cores). fb_set_num_threads(0) unsets. */
int fb_get_num_threads(void);
void fb_set_num_threads(int threads);

/* `threads` (0: fb_get_num_threads()), but no more than CPUs are allowed by affinity mask and cgroup quota: members of
 * a larger team would wait for one another. fb_forward and fb_head_run take a number other than 0 as it is. */
int fb_usable_threads(int threads);

#ifdef __cplusplus
}
#endif

#endif

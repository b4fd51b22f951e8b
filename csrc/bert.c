/* bert.c: the forward pass, in the order of the paper (Devlin et al., arXiv:1810.04805), over a ragged batch.
 *
 *   fb_forward
 *     plan         sequences, longest first, are cut into micro-batches of about BUDGET tokens, or fewer for each thread some
 *     fb_parallel  each thread runs whole ones, alone, no barriers; or where these would leave threads idle, the team runs
 *                  each together, splitting rows or columns of every operation
 *       run_micro_batch
 *         embed    word + position + type, LayerNorm
 *         layer    QKV | attention | output + residual, LayerNorm | FFN up, act | FFN down + residual, LayerNorm;
 *                  in the last one from attention on only the first token of each sequence, where no more is asked for
 *         finish   hidden rows, pooler and sentence vectors into the caller's arrays
 *
 * No step's result for a sequence depends on how work is split, so bits do not depend on batch, order or threads.
 * The model is read-only; all scratch lies in a workspace, which a call borrows from the model's rack.
 */
#include "dispatch.h"
#include "error.h"
#include "fastbert.h"
#include "pooling.h"
#include "threads.h"
#include "weights.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    BUDGET = 256,     /* tokens of a micro-batch: weights are read once for so many rows, activations still fit L2 */
    BUDGET_MIN = 64,  /* cut finer to give every thread some, but not below this or a thread's share */
    SMALL_S8 = 65536, /* weights in FFN-up: int8 layers with more go uncut, for it takes longer to read them again */
    QUERY_BLOCK = 64, /* rows of scores held at once: 64 x 512 floats are 128 KB; */
    QUERY_BLOCK_SPLIT = 256, /* more where attention is split: products end with a block finished alone */
    SEQ_S8 = 64, /* int8 models: from so many tokens on attention is integer; below, quantising costs what that saves */
    SEQ_SPLIT = 128,   /* FB_FORMAT_SPLIT: from so many tokens on attention is split; below, splitting costs as much */
    SEQ_BY_HEADS = 64, /* from so many tokens on (by_heads) */
    RACK = 16          /* idle workspaces that a model keeps */
};
/* Rows a thread needs before reading all weights itself beats sharing the columns with barriers between operations. */
static const ptrdiff_t ROWS_PER_THREAD = 24;

typedef struct workspace {
    size_t bytes;
    float *x, *y;    /* [tokens][ld_hidden]: the residual stream, and the next one being made */
    float *qkv;      /* [tokens][ld_qkv]: of each head its query, key and value; or by_heads, members' own */
    float *context;  /* [tokens][ld_hidden] */
    float *up;       /* [tokens][ld_intermediate], or where layers are cut a block of rows (rows_at_once) per member */
    uint8_t *q;      /* int8 models: [tokens][ld_q], the input of a linear layer, quantised; */
    float *q_scale;  /* [tokens] */
    int32_t *q_zero; /* [tokens] */
    float *rows[2];  /* [sequences][dim_max]: pooled vectors on their way through pooler or dense modules */
    char *attention; /* one attention scratch per member of the team */
    char *split;     /* where layers are FB_FORMAT_SPLIT: FB_SPLIT_SCRATCH bytes per member */
} workspace;

struct fb_model {
    fb_config config;
    fb_kernels kernels;
    fb_weights weights;
    ptrdiff_t pooled_dim, vector_dim, dim_max;
    ptrdiff_t ld_hidden, ld_qkv, ld_intermediate, ld_q; /* ld_q in bytes; 0 in float32 models */
    _Atomic(workspace *) rack[RACK];
};

/* ---- load ---- */

/* Rows a multiple of 4 KB apart would all fall into one set of the L1 cache; a line more spreads them. */
static ptrdiff_t leading(ptrdiff_t n)
{
    const ptrdiff_t ld = (n + 15) / 16 * 16;
    return ld % 256 == 0 ? ld + 16 : ld;
}

static fb_status check_config(const fb_config *c, fb_error *err)
{
    const struct {
        const char *name;
        ptrdiff_t value, most;
    } sizes[] = {
        {"vocab_size", c->vocab_size, 1 << 24},
        {"hidden_size", c->hidden_size, 1 << 14},
        {"num_hidden_layers", c->num_hidden_layers, 1 << 10},
        {"num_attention_heads", c->num_attention_heads, 1 << 14},
        {"intermediate_size", c->intermediate_size, 1 << 15},
        {"max_position_embeddings", c->max_position_embeddings, 1 << 16},
        {"type_vocab_size", c->type_vocab_size, 1 << 16},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            return fb_fail(err, FB_EINVAL, "%s: expected 1 to %td, got %td", sizes[i].name, sizes[i].most,
                           sizes[i].value);
    if (c->hidden_size % c->num_attention_heads != 0)
        return fb_fail(err, FB_EINVAL, "num_attention_heads: expected a divisor of hidden_size %td, got %td",
                       c->hidden_size, c->num_attention_heads);
    if (!(c->layer_norm_eps >= 0 && c->layer_norm_eps < 1))
        return fb_fail(err, FB_EINVAL, "layer_norm_eps: expected 0 to 1, got %g", (double)c->layer_norm_eps);
    if (c->pooling < 0 || c->pooling > FB_POOL_ALL)
        return fb_fail(err, FB_EINVAL, "pooling: expected FB_POOL_* bits, got %d", c->pooling);
    if (c->num_dense < 0 || c->num_dense > FB_MAX_DENSE || (c->num_dense > 0 && c->pooling == 0))
        return fb_fail(err, FB_EINVAL, "num_dense: expected 0 to %d after a pooling, got %d", FB_MAX_DENSE,
                       c->num_dense);
    return FB_OK;
}

fb_status fb_load(const fb_config *config, const fb_tensor *tensors, size_t num_tensors, const char *isa,
                  fb_model **model, fb_error *err)
{
    fb_status status = check_config(config, err);
    *model = NULL;
    if (status != FB_OK)
        return status;
    fb_model *m = calloc(1, sizeof *m);
    if (m == NULL)
        return fb_fail(err, FB_ENOMEM, "model: out of memory");
    m->config = *config;
    for (int mode = 1; mode < FB_POOL_ALL; mode <<= 1)
        m->pooled_dim += config->pooling & mode ? config->hidden_size : 0;
    status = fb_select_kernels(isa, &m->kernels, err);
    if (status == FB_OK)
        status = fb_weights_load(&m->weights, config, m->pooled_dim, &m->kernels, tensors, num_tensors, err);
    if (status != FB_OK) {
        free(m);
        return status;
    }
    m->vector_dim = config->num_dense ? m->weights.dense[config->num_dense - 1].out : m->pooled_dim;
    m->dim_max = m->pooled_dim > config->hidden_size ? m->pooled_dim : config->hidden_size;
    for (int i = 0; i < config->num_dense; i++)
        m->dim_max = m->weights.dense[i].out > m->dim_max ? m->weights.dense[i].out : m->dim_max;
    m->ld_hidden = leading(config->hidden_size);
    m->ld_qkv = leading(3 * config->hidden_size);
    m->ld_intermediate = leading(config->intermediate_size);
    if (config->precision == FB_INT8)
        m->ld_q =
            fb_k8(config->intermediate_size > config->hidden_size ? config->intermediate_size : config->hidden_size) +
            64;
    *model = m;
    return FB_OK;
}

void fb_free(fb_model *model)
{
    if (model == NULL)
        return;
    for (int i = 0; i < RACK; i++)
        fb_aligned_free(atomic_load(&model->rack[i]));
    fb_weights_free(&model->weights);
    free(model);
}

void fb_get_info(const fb_model *model, fb_info *info)
{
    info->isa = model->kernels.isa;
    const fb_format format = fb_encoder_format(&model->config, &model->kernels);
    info->gemm = format == FB_FORMAT_S8      ? model->kernels.gemm_s8->name
                 : format == FB_FORMAT_SPLIT ? model->kernels.gemm_split->name
                                             : model->kernels.gemm_f32->name;
    info->weights_bytes = model->weights.bytes;
    info->vector_dim = model->vector_dim;
    info->has_pooler = model->weights.pooler.packed != NULL;
}

/* ---- workspace ---- */

/* How a sequence of so many tokens is attended: a matter of the sequence alone, for its bits may not depend on its batch, and
 * in int8 models not of the kernel set. */
static fb_format attention_format(const fb_model *m, ptrdiff_t seq)
{
    const fb_format format = fb_encoder_format(&m->config, &m->kernels);
    return seq < (format == FB_FORMAT_S8 ? SEQ_S8 : SEQ_SPLIT) ? FB_FORMAT_F32 : format;
}

/* What one head of a sequence needs at a time. */
typedef struct head_scratch {
    fb_format format;
    char *keys, *values; /* packed */
    float *scores;       /* [block][ld_scores] */
    uint8_t *bytes;  /* integer attention: [block][ld_bytes], a block of queries, then its probabilities, quantised; */
    float *scale;    /* [block] */
    int32_t *zero;   /* [block] */
    ptrdiff_t block; /* queries at once */
    ptrdiff_t ld_scores, ld_bytes;
    size_t size; /* bytes */
} head_scratch;

/* Lays it out at `at`, for a sequence of so many tokens; all parts are whole lines. NULL: its size alone. */
static head_scratch head_scratch_at(const fb_model *m, ptrdiff_t seq, char *at)
{
    const ptrdiff_t head_dim = m->config.hidden_size / m->config.num_attention_heads;
    const fb_format format = attention_format(m, seq);
    const int int8 = format == FB_FORMAT_S8;
    const ptrdiff_t most = format == FB_FORMAT_SPLIT ? QUERY_BLOCK_SPLIT : QUERY_BLOCK;
    head_scratch s = {.format = format,
                      .block = seq < most ? seq : most,
                      .ld_scores = leading(seq),
                      .ld_bytes = fb_k8(seq > head_dim ? seq : head_dim) + 64};
    const size_t block = (size_t)s.block, lines = (block * sizeof(float) + 63) / 64 * 64;
    const size_t values = fb_packed_bytes(&m->kernels, format, seq, head_dim);
    const size_t scores = values + fb_packed_bytes(&m->kernels, format, head_dim, seq);
    const size_t bytes = scores + block * (size_t)s.ld_scores * sizeof(float);
    const size_t scale = bytes + (int8 ? block * (size_t)s.ld_bytes : 0), zero = scale + (int8 ? lines : 0);
    s.size = zero + (int8 ? lines : 0);
    if (at != NULL) {
        s.keys = at;
        s.values = at + values;
        s.scores = (float *)(at + scores);
        s.bytes = (uint8_t *)at + bytes;
        s.scale = (float *)(at + scale);
        s.zero = (int32_t *)(at + zero);
    }
    return s;
}

/* For sequences of up to so many tokens: in int8 models the longest that is attended in float32 may need more than a longer
 * one. */
static size_t attention_bytes(const fb_model *m, ptrdiff_t tokens)
{
    const size_t size = head_scratch_at(m, tokens, NULL).size;
    const size_t other = tokens >= SEQ_S8 ? head_scratch_at(m, SEQ_S8 - 1, NULL).size : 0;
    return size > other ? size : other;
}

/* Of so many rows those that go through a layer together, from the output of attention on, at most. */
static ptrdiff_t rows_at_once(const fb_model *m, ptrdiff_t rows)
{
    const fb_linear *l = &m->weights.layers[0].intermediate;
    const int cut = l->format == FB_FORMAT_F32 || (l->format == FB_FORMAT_S8 && l->out * l->in <= SMALL_S8);
    return cut && m->kernels.row_block < rows ? m->kernels.row_block : rows;
}

/* Lays a workspace out for so many tokens; with ws == NULL it only adds up. */
static size_t lay_out(const fb_model *m, ptrdiff_t tokens, ptrdiff_t longest, int team, workspace *ws)
{
    const size_t row = sizeof(float) * (size_t)tokens;
    const ptrdiff_t block_rows = rows_at_once(m, tokens) * team;
    const ptrdiff_t up_rows = block_rows < tokens ? block_rows : tokens;
    const int split = fb_encoder_format(&m->config, &m->kernels) == FB_FORMAT_SPLIT;
    const struct {
        size_t offset_of;
        size_t bytes;
    } parts[] = {
        {offsetof(workspace, x), row * (size_t)m->ld_hidden},
        {offsetof(workspace, y), row * (size_t)m->ld_hidden},
        {offsetof(workspace, qkv), row * (size_t)m->ld_qkv},
        {offsetof(workspace, context), row * (size_t)m->ld_hidden},
        {offsetof(workspace, up), sizeof(float) * (size_t)(up_rows * m->ld_intermediate)},
        {offsetof(workspace, q), (size_t)(tokens * m->ld_q)},
        {offsetof(workspace, q_scale), m->ld_q ? row : 0},
        {offsetof(workspace, q_zero), m->ld_q ? row : 0},
        {offsetof(workspace, rows[0]), row * (size_t)m->dim_max},
        {offsetof(workspace, rows[1]), row * (size_t)m->dim_max},
        {offsetof(workspace, attention), attention_bytes(m, longest) * (size_t)team},
        {offsetof(workspace, split), split ? (size_t)FB_SPLIT_SCRATCH * (size_t)team : 0},
    };
    size_t used = (sizeof(workspace) + 63) / 64 * 64;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (ws != NULL) {
            void *at = (char *)ws + used;
            memcpy((char *)ws + parts[i].offset_of, &at, sizeof at);
        }
        used += (parts[i].bytes + 63) / 64 * 64;
    }
    return used;
}

/* A workspace for so many tokens: one from the rack if it is large enough, else a new one. NULL: out of memory. */
static workspace *borrow(const fb_model *model, ptrdiff_t tokens, ptrdiff_t longest, int team)
{
    fb_model *m = (fb_model *)model; /* the rack is the one part of a model that changes */
    const size_t bytes = lay_out(m, tokens, longest, team, NULL);
    workspace *ws = NULL;
    for (int i = 0; i < RACK && ws == NULL; i++) {
        ws = atomic_exchange(&m->rack[i], NULL);
        if (ws != NULL && ws->bytes < bytes) {
            fb_aligned_free(ws);
            ws = NULL;
        }
    }
    if (ws == NULL) {
        ws = fb_aligned_alloc(bytes);
        if (ws == NULL)
            return NULL;
        ws->bytes = bytes;
    }
    lay_out(m, tokens, longest, team, ws);
    return ws;
}

static void give_back(const fb_model *model, workspace *ws)
{
    fb_model *m = (fb_model *)model;
    for (int i = 0; i < RACK && ws != NULL; i++) {
        workspace *empty = NULL;
        if (atomic_compare_exchange_strong(&m->rack[i], &empty, ws))
            ws = NULL;
    }
    fb_aligned_free(ws);
}

size_t fb_scratch_bytes(const fb_model *model, int threads)
{
    const ptrdiff_t longest = model->config.max_position_embeddings;
    const ptrdiff_t tokens = longest > BUDGET ? longest : BUDGET;
    if (threads < 1)
        threads = fb_usable_threads(0);
    return lay_out(model, tokens, longest, threads, NULL) * (size_t)threads;
}

/* ---- plan ---- */

typedef struct place {
    ptrdiff_t length, index; /* tokens, and which sequence of the caller's batch */
} place;

typedef struct plan {
    place *order;    /* [size] sequences, longest first */
    ptrdiff_t *cuts; /* [count + 1] micro-batch i is order[cuts[i]] .. order[cuts[i + 1] - 1] */
    ptrdiff_t count;
    ptrdiff_t tokens_most; /* of any micro-batch */
} plan;

static int longest_first(const void *a, const void *b)
{
    const place *p = a, *q = b;
    if (p->length != q->length)
        return p->length > q->length ? -1 : 1;
    return p->index < q->index ? -1 : 1;
}

static void put_in_order(const fb_batch *batch, plan *p)
{
    for (ptrdiff_t i = 0; i < batch->size; i++)
        p->order[i] = (place){(ptrdiff_t)(batch->offsets[i + 1] - batch->offsets[i]), i};
    if (batch->size > 1)
        qsort(p->order, (size_t)batch->size, sizeof *p->order, longest_first);
}

/* A longer sequence than `budget` tokens is a micro-batch of its own. */
static void cut(ptrdiff_t size, ptrdiff_t budget, plan *p)
{
    p->count = p->tokens_most = 0;
    p->cuts[0] = 0;
    for (ptrdiff_t i = 0, tokens = 0; i < size; i++) {
        tokens += p->order[i].length;
        p->tokens_most = tokens > p->tokens_most ? tokens : p->tokens_most;
        if (i + 1 == size || tokens + p->order[i + 1].length > budget) {
            p->cuts[++p->count] = i + 1;
            tokens = 0;
        }
    }
}

/* Tokens of a micro-batch where so many threads run whole ones: a quarter of a thread's share, within bounds. */
static ptrdiff_t budget_apart(ptrdiff_t tokens, int threads)
{
    const ptrdiff_t share = (tokens + threads - 1) / threads, least = share < BUDGET_MIN ? share : BUDGET_MIN;
    const ptrdiff_t budget = share / 4 < least ? least : share / 4;
    return threads == 1 || budget > BUDGET ? BUDGET : budget;
}

/* Whether threads that run whole micro-batches are idle for less than a fifth of the time: then they need no barriers and
 * share no activations, whose way from core to core may be long. */
static int busy_apart(const plan *p, ptrdiff_t tokens, int threads)
{
    const ptrdiff_t rounds = (p->count + threads - 1) / threads;
    return p->count >= 2 * threads || 4 * rounds * p->tokens_most * threads <= 5 * tokens;
}

/* ---- the forward pass of one micro-batch ---- */

typedef struct micro_batch {
    const fb_model *model;
    const fb_batch *batch;
    const fb_outputs *out;
    const place *order; /* its sequences */
    ptrdiff_t size;
    workspace *ws;
    const fb_team *team;
    int narrow;              /* rows are the first tokens of the sequences; else all tokens */
    ptrdiff_t tokens;        /* rows */
    int by_rows;             /* members own rows throughout and meet only for attention; else they own columns */
    ptrdiff_t row, rows_end; /* the rows of row-wise operations of this member */
} micro_batch;

/* Sets the number of rows, and how the members share them. */
static void share(micro_batch *b, ptrdiff_t tokens)
{
    b->tokens = tokens;
    b->by_rows = tokens >= ROWS_PER_THREAD * b->team->size;
    fb_split(b->team, tokens, 1, &b->row, &b->rows_end);
}

static ptrdiff_t rows_of(const micro_batch *b, ptrdiff_t sequence) { return b->narrow ? 1 : b->order[sequence].length; }

static void meet_if_columns(const micro_batch *b)
{
    if (!b->by_rows)
        fb_barrier(b->team);
}

/* Int8 models: this member's rows of x [tokens][k] quantised into the workspace, mixed before that where `spare`, which
 * then holds the mixed rows, is not NULL; it may be x. */
static void quantize(const micro_batch *b, const float *x, ptrdiff_t k, ptrdiff_t ldx, float *spare)
{
    const fb_kernels *kernels = &b->model->kernels;
    const workspace *ws = b->ws;
    const ptrdiff_t ldq = b->model->ld_q, row = b->row, rows = b->rows_end - row;
    if (spare != NULL)
        kernels->mix_quantize_u8(rows, k, x + row * ldx, ldx, spare + row * ldx, ldx, ws->q + row * ldq, ldq,
                                 ws->q_scale + row, ws->q_zero + row);
    else
        kernels->quantize_u8(rows, k, x + row * ldx, ldx, ws->q + row * ldq, ldq, ws->q_scale + row, ws->q_zero + row);
    meet_if_columns(b);
}

/* gemm_f32, or where format says so gemm_split. */
static void multiply_f32(const micro_batch *b, fb_format format, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a,
                         ptrdiff_t lda, const void *packed, const fb_epilogue *epilogue, float *c, ptrdiff_t ldc)
{
    const fb_kernels *kernels = &b->model->kernels;
    if (format == FB_FORMAT_SPLIT)
        kernels->gemm_split->run(m, n, k, a, lda, packed, epilogue, c, ldc,
                                 b->ws->split + (size_t)FB_SPLIT_SCRATCH * (size_t)b->team->rank);
    else
        kernels->gemm_f32->run(m, n, k, a, lda, packed, epilogue, c, ldc);
}

/* out = act(x W^T + bias) and residual, as the epilogue has it, of some rows and columns. x points to the first of the
 * rows; int8 layers take what quantize made of them. */
static void multiply(const micro_batch *b, const fb_linear *layer, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t column,
                     ptrdiff_t columns, const float *x, ptrdiff_t ldx, const fb_epilogue *epilogue, float *out,
                     ptrdiff_t ldo)
{
    const fb_kernels *kernels = &b->model->kernels;
    const workspace *ws = b->ws;
    const fb_format format = layer->format;
    const ptrdiff_t k = layer->in, ldq = b->model->ld_q;
    const char *packed = (const char *)layer->packed + fb_packed_bytes(kernels, format, column, k);
    if (format == FB_FORMAT_S8)
        kernels->gemm_s8->run(rows, columns, k, ws->q + row * ldq, ldq, ws->q_scale + row, ws->q_zero + row, packed,
                              epilogue, out, ldo);
    else
        multiply_f32(b, format, rows, columns, k, x, ldx, packed, epilogue, out, ldo);
}

/* out = residual + act(x W^T + bias), this member's share. spare: see quantize. */
static void linear(const micro_batch *b, const fb_linear *layer, const float *x, ptrdiff_t ldx, float *spare,
                   fb_act act, const float *residual, ptrdiff_t ldr, float *out, ptrdiff_t ldo)
{
    ptrdiff_t row = 0, rows_end = b->tokens, column = 0, columns_end = layer->out;
    if (b->by_rows) {
        row = b->row;
        rows_end = b->rows_end;
    } else {
        fb_split(b->team, layer->out, FB_STRIP, &column, &columns_end);
    }
    const fb_epilogue epilogue = {layer->bias ? layer->bias + column : NULL, act,
                                  residual ? residual + row * ldr + column : NULL, ldr};
    if (layer->format == FB_FORMAT_S8)
        quantize(b, x, layer->in, ldx, spare);
    multiply(b, layer, row, rows_end - row, column, columns_end - column, x + row * ldx, ldx, &epilogue,
             out + row * ldo + column, ldo);
}

static void layernorm(const micro_batch *b, const fb_norm *norm, const float *x, float *y)
{
    const fb_model *m = b->model;
    const ptrdiff_t at = b->row * m->ld_hidden;
    m->kernels.layernorm_f32(b->rows_end - b->row, m->config.hidden_size, x + at, m->ld_hidden, norm->gamma, norm->beta,
                             m->config.layer_norm_eps, y + at, m->ld_hidden);
}

/* x [tokens][hidden] = LayerNorm(word[id] + type[type_id] + position[t]). */
static void embed(const micro_batch *b)
{
    const fb_model *m = b->model;
    const fb_weights *w = &m->weights;
    const ptrdiff_t hidden = m->config.hidden_size;
    ptrdiff_t row = 0;
    for (ptrdiff_t s = 0; s < b->size; s++) {
        const int64_t first = b->batch->offsets[b->order[s].index];
        for (ptrdiff_t t = 0; t < b->order[s].length; t++, row++) {
            if (row < b->row || row >= b->rows_end)
                continue;
            const ptrdiff_t id = b->batch->ids[first + t];
            const float *type = w->type + (b->batch->type_ids ? b->batch->type_ids[first + t] : 0) * hidden;
            const float *position = w->position + t * hidden;
            float *x = b->ws->y + row * m->ld_hidden;
            if (w->word != NULL)
                for (ptrdiff_t j = 0; j < hidden; j++)
                    x[j] = (w->word[id * hidden + j] + type[j]) + position[j];
            else
                for (ptrdiff_t j = 0; j < hidden; j++)
                    x[j] = (w->word_scales[id] * (float)w->word_s8[id * hidden + j] + type[j]) + position[j];
        }
    }
    layernorm(b, &w->embeddings_norm, b->ws->y, b->ws->x);
}

/* context [queries][head_dim] = softmax(q k^T / sqrt(head_dim)) v for one head of a sequence; a row of q is followed by
 * its k and v. */
static void attend_f32(const micro_batch *b, ptrdiff_t seq, ptrdiff_t queries, const float *q, ptrdiff_t ldq,
                       const head_scratch *s, float *context)
{
    const fb_model *m = b->model;
    const fb_epilogue plain = {NULL, FB_ACT_NONE, NULL, 0};
    const ptrdiff_t hidden = m->config.hidden_size, head_dim = hidden / m->config.num_attention_heads;
    const ptrdiff_t block = s->block;
    fb_pack_f32(&m->kernels, s->format, seq, head_dim, q + head_dim, ldq, 1, s->keys);
    fb_pack_f32(&m->kernels, s->format, head_dim, seq, q + 2 * head_dim, 1, ldq, s->values);
    for (ptrdiff_t i = 0; i < queries; i += block) {
        const ptrdiff_t rows = queries - i < block ? queries - i : block;
        multiply_f32(b, s->format, rows, seq, head_dim, q + i * ldq, ldq, s->keys, &plain, s->scores, s->ld_scores);
        m->kernels.softmax_f32(rows, seq, 1.0f / sqrtf((float)head_dim), s->scores, s->ld_scores);
        multiply_f32(b, s->format, rows, head_dim, seq, s->scores, s->ld_scores, s->values, &plain,
                     context + i * m->ld_hidden, m->ld_hidden);
    }
}

/* The same in integers: queries and keys have a scale per token, probabilities one per query, values one per channel. */
static void attend_s8(const micro_batch *b, ptrdiff_t seq, ptrdiff_t queries, const float *q, ptrdiff_t ldq,
                      const head_scratch *s, float *context)
{
    const fb_model *m = b->model;
    const fb_gemm_s8 *gemm = m->kernels.gemm_s8;
    const fb_epilogue plain = {NULL, FB_ACT_NONE, NULL, 0};
    const ptrdiff_t hidden = m->config.hidden_size, head_dim = hidden / m->config.num_attention_heads;
    const ptrdiff_t block = s->block;
    gemm->pack_f32(seq, head_dim, q + head_dim, ldq, 1, s->keys);
    gemm->pack_f32(head_dim, seq, q + 2 * head_dim, 1, ldq, s->values);
    for (ptrdiff_t i = 0; i < queries; i += block) {
        const ptrdiff_t rows = queries - i < block ? queries - i : block;
        m->kernels.quantize_u8(rows, head_dim, q + i * ldq, ldq, s->bytes, s->ld_bytes, s->scale, s->zero);
        for (ptrdiff_t r = 0; r < rows; r++)
            s->scale[r] *= 1.0f / sqrtf((float)head_dim);
        gemm->run(rows, seq, head_dim, s->bytes, s->ld_bytes, s->scale, s->zero, s->keys, &plain, s->scores,
                  s->ld_scores);
        m->kernels.softmax_u8(rows, seq, s->scores, s->ld_scores, s->bytes, s->ld_bytes, s->scale);
        memset(s->zero, 0, (size_t)rows * sizeof *s->zero);
        gemm->run(rows, head_dim, seq, s->bytes, s->ld_bytes, s->scale, s->zero, s->values, &plain,
                  context + i * m->ld_hidden, m->ld_hidden);
    }
}

/* Whether the queries, keys and values of a head are made right before it is attended, so that they never leave the
 * caches: where sequences are long enough for weights to be read once for each, and a buffer for each member, of the
 * longest sequence, fits in ws->qkv. Not in a narrow layer, which overwrites x meanwhile. */
static int by_heads(const micro_batch *b, const fb_linear *qkv, int narrow)
{
    const ptrdiff_t hidden = b->model->config.hidden_size, head_dim = hidden / b->model->config.num_attention_heads;
    const int prepares =
        qkv->format == FB_FORMAT_SPLIT || (qkv->format == FB_FORMAT_S8 && b->model->kernels.gemm_s8->prepares);
    return !narrow && !prepares && b->order[b->size - 1].length >= SEQ_BY_HEADS && 3 * head_dim % FB_STRIP == 0 &&
           b->team->size * b->order[0].length * head_dim <= b->tokens * hidden;
}

/* context [tokens][hidden], one sequence and head at a time; in a narrow micro-batch [sequences][hidden], and x is
 * reduced to the same rows. qkv: the layer that is left to do here, by_heads, or NULL. */
static void attention(const micro_batch *b, const fb_linear *qkv)
{
    const fb_model *m = b->model;
    const workspace *ws = b->ws;
    const ptrdiff_t hidden = m->config.hidden_size, heads = m->config.num_attention_heads, head_dim = hidden / heads;
    const ptrdiff_t longest = b->order[0].length, width = 3 * head_dim, ldq = qkv ? width : m->ld_qkv;
    char *scratch = ws->attention + attention_bytes(m, longest) * (size_t)b->team->rank;
    float *own = ws->qkv + b->team->rank * longest * width;
    ptrdiff_t unit = 0, first = 0, out = 0;
    for (ptrdiff_t s = 0; s < b->size; s++) {
        const ptrdiff_t seq = b->order[s].length, queries = rows_of(b, s);
        const head_scratch parts = head_scratch_at(m, seq, scratch);
        for (ptrdiff_t head = 0; head < heads; head++) {
            if (unit++ % b->team->size != b->team->rank)
                continue;
            float *q = qkv ? own : ws->qkv + first * ldq + head * width;
            if (qkv) {
                const fb_epilogue epilogue = {qkv->bias + head * width, FB_ACT_NONE, NULL, 0};
                multiply(b, qkv, first, seq, head * width, width, ws->x + first * m->ld_hidden, m->ld_hidden, &epilogue,
                         q, ldq);
            }
            float *context = ws->context + out * m->ld_hidden + head * head_dim;
            (parts.format == FB_FORMAT_S8 ? attend_s8 : attend_f32)(b, seq, queries, q, ldq, &parts, context);
        }
        if (b->narrow && b->team->rank == 0)
            memmove(ws->x + out * m->ld_hidden, ws->x + first * m->ld_hidden, (size_t)hidden * sizeof(float));
        first += seq;
        out += queries;
    }
}

/* All of a layer that looks at a token alone: context and x to the next x. */
static void feed_forward(const micro_batch *b, const fb_layer *l)
{
    const fb_model *m = b->model;
    const workspace *ws = b->ws;
    const ptrdiff_t ldh = m->ld_hidden, ldi = m->ld_intermediate;
    linear(b, &l->attention_output, ws->context, ldh, NULL, FB_ACT_NONE, ws->x, ldh, ws->y, ldh);
    meet_if_columns(b);
    layernorm(b, &l->attention_norm, ws->y, ws->x);
    meet_if_columns(b);
    linear(b, &l->intermediate, ws->x, ldh, ws->y, m->config.hidden_act, NULL, 0, ws->up, ldi);
    meet_if_columns(b);
    linear(b, &l->output, ws->up, ldi, ws->up, FB_ACT_NONE, ws->x, ldh, ws->y, ldh);
    meet_if_columns(b);
    layernorm(b, &l->output_norm, ws->y, ws->x);
    meet_if_columns(b);
}

/* The same of this member's rows, a block of them after the other: each is a micro-batch with its own rows of x and context
 * and the member's first ones of all else, which stay in the L2 cache. */
static void in_blocks(const micro_batch *b, const fb_layer *l)
{
    const fb_model *m = b->model;
    const ptrdiff_t rows = b->rows_end - b->row, most = rows_at_once(m, b->tokens), parts = (rows + most - 1) / most;
    const ptrdiff_t before = most * b->team->rank; /* rows of the members before: a block of each, or all if fewer */
    workspace ws = *b->ws;
    micro_batch part = *b;
    part.ws = &ws;
    part.row = 0;
    ws.y += b->row * m->ld_hidden;
    ws.up += (before < b->row ? before : b->row) * m->ld_intermediate;
    ws.q += b->row * m->ld_q;
    ws.q_scale += b->row;
    ws.q_zero += b->row;
    for (ptrdiff_t i = 0; i < parts; i++) {
        const ptrdiff_t row = b->row + rows * i / parts;
        ws.x = b->ws->x + row * m->ld_hidden;
        ws.context = b->ws->context + row * m->ld_hidden;
        part.rows_end = b->row + rows * (i + 1) / parts - row;
        feed_forward(&part, l);
    }
}

/* narrow: no one asks for more than the first tokens of this layer's result. */
static void layer(micro_batch *b, const fb_layer *l, int narrow)
{
    const fb_model *m = b->model;
    const workspace *ws = b->ws;
    const int later = by_heads(b, &l->qkv, narrow);
    if (!later)
        linear(b, &l->qkv, ws->x, m->ld_hidden, ws->y, FB_ACT_NONE, NULL, 0, ws->qkv, m->ld_qkv);
    else if (l->qkv.format == FB_FORMAT_S8)
        quantize(b, ws->x, m->config.hidden_size, m->ld_hidden, ws->y);
    fb_barrier(b->team);
    b->narrow = narrow;
    attention(b, later ? &l->qkv : NULL);
    fb_barrier(b->team);
    if (narrow)
        share(b, b->size);
    if (b->by_rows)
        in_blocks(b, l);
    else
        feed_forward(b, l);
}

/* rows [count][in] through a small dense layer, in place of a swap: returns where the result lies. */
static float *small_linear(const micro_batch *b, const fb_linear *l, fb_act act, float *const rows[2], int from,
                           ptrdiff_t count)
{
    const fb_epilogue epilogue = {l->bias, act, NULL, 0};
    const ptrdiff_t ld = b->model->dim_max;
    b->model->kernels.gemm_f32->run(count, l->out, l->in, rows[from], ld, l->packed, &epilogue, rows[!from], ld);
    return rows[!from];
}

/* Results of this member's share of the sequences into the caller's arrays, at the sequences' own places. */
static void finish(const micro_batch *b)
{
    const fb_model *m = b->model;
    const fb_config *c = &m->config;
    const ptrdiff_t hidden = c->hidden_size, ld = m->dim_max;
    ptrdiff_t begin, end, row = 0;
    fb_split(b->team, b->size, 1, &begin, &end);
    float *rows[2] = {b->ws->rows[0] + begin * ld, b->ws->rows[1] + begin * ld};
    for (ptrdiff_t s = 0; s < begin; s++)
        row += rows_of(b, s);
    const float *x = b->ws->x + row * m->ld_hidden;
    const ptrdiff_t count = end - begin;
    const place *order = b->order + begin;

    if (b->out->hidden != NULL) {
        const float *from = x;
        for (ptrdiff_t s = 0; s < count; s++)
            for (ptrdiff_t t = 0; t < order[s].length; t++, from += m->ld_hidden)
                memcpy(b->out->hidden + (b->batch->offsets[order[s].index] + t) * hidden, from,
                       (size_t)hidden * sizeof *from);
    }
    if (b->out->pooler != NULL && count > 0) {
        const float *from = x;
        for (ptrdiff_t s = 0; s < count; from += rows_of(b, begin + s++) * m->ld_hidden)
            memcpy(rows[0] + s * ld, from, (size_t)hidden * sizeof *from);
        const float *pooled = small_linear(b, &m->weights.pooler, FB_ACT_TANH, rows, 0, count);
        for (ptrdiff_t s = 0; s < count; s++)
            memcpy(b->out->pooler + order[s].index * hidden, pooled + s * ld, (size_t)hidden * sizeof *pooled);
    }
    if (b->out->vectors != NULL && count > 0) {
        const float *from = x;
        float *vectors = rows[0];
        for (ptrdiff_t s = 0; s < count; from += rows_of(b, begin + s++) * m->ld_hidden)
            fb_pool(c->pooling, rows_of(b, begin + s), hidden, from, m->ld_hidden, vectors + s * ld);
        for (int i = 0; i < c->num_dense; i++)
            vectors = small_linear(b, &m->weights.dense[i], c->dense_act[i], rows, vectors == rows[1], count);
        for (ptrdiff_t s = 0; s < count; s++) {
            if (c->normalize)
                fb_normalize(m->vector_dim, vectors + s * ld);
            memcpy(b->out->vectors + order[s].index * m->vector_dim, vectors + s * ld,
                   (size_t)m->vector_dim * sizeof *vectors);
        }
    }
}

static void run_micro_batch(const fb_team *team, const fb_model *model, const fb_batch *batch, const fb_outputs *out,
                            const place *order, ptrdiff_t size, workspace *ws)
{
    const ptrdiff_t layers = model->config.num_hidden_layers;
    const int first_tokens = out->hidden == NULL && (out->vectors == NULL || model->config.pooling == FB_POOL_CLS);
    micro_batch b = {.model = model, .batch = batch, .out = out, .order = order, .size = size, .ws = ws, .team = team};
    ptrdiff_t tokens = 0;
    for (ptrdiff_t s = 0; s < size; s++)
        tokens += order[s].length;
    share(&b, tokens);
    embed(&b);
    meet_if_columns(&b);
    for (ptrdiff_t i = 0; i < layers; i++)
        layer(&b, &model->weights.layers[i], first_tokens && i == layers - 1);
    fb_barrier(team);
    finish(&b);
    fb_barrier(team); /* the workspace is free for the next micro-batch */
}

/* ---- fb_forward ---- */

typedef struct run {
    const fb_model *model;
    const fb_batch *batch;
    const fb_outputs *out;
    const fb_run_options *options;
    const plan *plan;
    int together;           /* the team runs each micro-batch together */
    workspace *const *ws;   /* [threads], or one when together */
    _Atomic ptrdiff_t next; /* micro-batch to hand out */
    _Atomic int stop;
} run;

static void run_member(const fb_team *team, void *arg)
{
    static const fb_team alone = {0, 1, NULL};
    run *r = arg;
    const plan *p = r->plan;
    for (ptrdiff_t turn = 0;; turn++) {
        if (team->rank == 0 && turn > 0 && r->options->canceled != NULL &&
            r->options->canceled(r->options->canceled_arg))
            atomic_store(&r->stop, 1);
        if (r->together)
            fb_barrier(team);
        const ptrdiff_t i = r->together ? turn : atomic_fetch_add(&r->next, 1);
        if (i >= p->count || atomic_load(&r->stop))
            return;
        run_micro_batch(r->together ? team : &alone, r->model, r->batch, r->out, p->order + p->cuts[i],
                        p->cuts[i + 1] - p->cuts[i], r->ws[r->together ? 0 : team->rank]);
    }
}

static fb_status check_batch(const fb_model *model, const fb_batch *batch, fb_error *err)
{
    const fb_config *c = &model->config;
    if (batch->size < 0 || batch->offsets[0] != 0)
        return fb_fail(err, FB_EINVAL, "offsets: expected size + 1 values from 0, got a first value of %lld",
                       (long long)(batch->size < 0 ? -1 : batch->offsets[0]));
    for (ptrdiff_t s = 0; s < batch->size; s++) {
        const int64_t length = batch->offsets[s + 1] - batch->offsets[s];
        if (length < 1 || length > c->max_position_embeddings)
            return fb_fail(err, FB_EINVAL, "sequence %td: expected 1 to %td tokens, got %lld", s,
                           c->max_position_embeddings, (long long)length);
        for (int64_t t = batch->offsets[s]; t < batch->offsets[s + 1]; t++) {
            if (batch->ids[t] < 0 || batch->ids[t] >= c->vocab_size)
                return fb_fail(err, FB_EINVAL, "sequence %td, token %lld: expected an id from 0 to %td, got %ld", s,
                               (long long)(t - batch->offsets[s]), c->vocab_size - 1, (long)batch->ids[t]);
            if (batch->type_ids && (batch->type_ids[t] < 0 || batch->type_ids[t] >= c->type_vocab_size))
                return fb_fail(err, FB_EINVAL, "sequence %td, token %lld: expected a type id from 0 to %td, got %ld", s,
                               (long long)(t - batch->offsets[s]), c->type_vocab_size - 1, (long)batch->type_ids[t]);
        }
    }
    return FB_OK;
}

/* Multiply-adds of a token in the linear layers; attention is small beside them up to 512 tokens. */
static double token_work(const fb_config *c)
{
    return (double)c->num_hidden_layers * c->hidden_size * (4.0 * c->hidden_size + 2.0 * c->intermediate_size);
}

fb_status fb_forward(const fb_model *model, const fb_batch *batch, const fb_outputs *out, const fb_run_options *options,
                     fb_error *err)
{
    static const fb_run_options defaults;
    fb_status status = check_batch(model, batch, err);
    if (status != FB_OK || batch->size == 0)
        return status;
    if (out->pooler != NULL && model->weights.pooler.packed == NULL)
        return fb_fail(err, FB_EINVAL, "pooler.dense.weight: the checkpoint has none, so there is no pooler output");
    if (out->vectors != NULL && model->vector_dim == 0)
        return fb_fail(err, FB_EINVAL, "pooling: the model was loaded without one, so there are no sentence vectors");
    if (options == NULL)
        options = &defaults;
    const ptrdiff_t tokens = (ptrdiff_t)batch->offsets[batch->size];
    int threads = options->threads > 0 ? options->threads : fb_usable_threads(0);
    const double small_work = model->config.precision == FB_INT8 ? model->kernels.gemm_s8->small_work : FB_SMALL_WORK;
    if ((double)tokens * token_work(&model->config) < small_work)
        threads = 1;
    plan p = {0};
    p.order = malloc((size_t)batch->size * sizeof *p.order);
    p.cuts = malloc((size_t)(batch->size + 1) * sizeof *p.cuts);
    int together = 0;
    if (p.order != NULL && p.cuts != NULL) {
        put_in_order(batch, &p);
        cut(batch->size, budget_apart(tokens, threads), &p);
        together = threads > 1 && !busy_apart(&p, tokens, threads);
        if (together)
            cut(batch->size, BUDGET, &p);
    }
    const int spaces = together ? 1 : threads;
    workspace **ws = calloc((size_t)spaces, sizeof *ws);
    int made = 0;
    while (ws != NULL && p.order != NULL && p.cuts != NULL && made < spaces &&
           (ws[made] = borrow(model, p.tokens_most, p.order[0].length, together ? threads : 1)) != NULL)
        made++;
    if (made < spaces) {
        status = fb_fail(err, FB_ENOMEM, "scratch for %td tokens: out of memory", p.tokens_most);
    } else {
        run r = {model, batch, out, options, &p, together, ws, 0, 0};
        fb_parallel(threads, run_member, &r);
        if (atomic_load(&r.stop))
            status = fb_fail(err, FB_ECANCELED, "canceled");
    }
    while (made > 0)
        give_back(model, ws[--made]);
    free(ws);
    free(p.order);
    free(p.cuts);
    return status;
}

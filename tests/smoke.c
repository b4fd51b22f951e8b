/* smoke.c: the C library without Python: loads a small model, runs a ragged batch, prints one line for each kernel set that
 * this CPU has and each precision: the name and a hash of all outputs. Lines of one precision agree, on every architecture:
 * .ci/arm compares them between x86-64 and the targets that it can emulate but has no Python for.
 *
 *     smoke [SET PRECISION PASSES]     this one alone, so many forward passes, on one thread: for bench/instructions.py
 */
#include "dispatch.h"
#include "fastbert.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef SHAPE
#define SHAPE LAYERS = 2, HIDDEN = 96, HEADS = 3, INTERMEDIATE = 200
#endif
enum { SHAPE, VOCAB = 50, POSITIONS = 72, TYPES = 2, TENSORS = 80 };

static fb_tensor tensors[TENSORS];
static size_t num_tensors;
static uint32_t state = 1;

static uint32_t draw(void) { return state = state * 1664525u + 1013904223u; } /* Knuth, TAOCP volume 2, 3.3.4 */

/* mean plus uniform numbers of the given width; made from whole numbers by one exact product, so that they are the same
 * everywhere. */
static void tensor(const char *name, float mean, float width, int64_t rows, int64_t columns)
{
    const int64_t n = rows * (columns ? columns : 1);
    float *values = malloc((size_t)n * sizeof *values);
    char *copy = malloc(strlen(name) + 1);
    if (values == NULL || copy == NULL || num_tensors == TENSORS)
        exit(2);
    strcpy(copy, name);
    for (int64_t i = 0; i < n; i++)
        values[i] = mean + (float)((int32_t)(draw() >> 16) - 32768) * (width / 32768.0f);
    tensors[num_tensors++] =
        (fb_tensor){.name = copy, .data = values, .dtype = FB_F32, .rank = columns ? 2 : 1, .shape = {rows, columns}};
}

static void linear(const char *prefix, int64_t out, int64_t in)
{
    char name[128];
    snprintf(name, sizeof name, "%s.weight", prefix);
    tensor(name, 0.0f, 0.25f, out, in);
    snprintf(name, sizeof name, "%s.bias", prefix);
    tensor(name, 0.0f, 0.125f, out, 0);
}

static void layernorm(const char *prefix)
{
    char name[128];
    snprintf(name, sizeof name, "%s.LayerNorm.weight", prefix);
    tensor(name, 1.0f, 0.25f, HIDDEN, 0);
    snprintf(name, sizeof name, "%s.LayerNorm.bias", prefix);
    tensor(name, 0.0f, 0.125f, HIDDEN, 0);
}

static void make_tensors(void)
{
    tensor("embeddings.word_embeddings.weight", 0.0f, 1.0f, VOCAB, HIDDEN);
    tensor("embeddings.position_embeddings.weight", 0.0f, 0.5f, POSITIONS, HIDDEN);
    tensor("embeddings.token_type_embeddings.weight", 0.0f, 0.5f, TYPES, HIDDEN);
    layernorm("embeddings");
    for (int i = 0; i < LAYERS; i++) {
        static const struct {
            const char *name;
            int out, in, norm;
        } layers[] = {{"attention.self.query", HIDDEN, HIDDEN, 0},     {"attention.self.key", HIDDEN, HIDDEN, 0},
                      {"attention.self.value", HIDDEN, HIDDEN, 0},     {"attention.output", HIDDEN, HIDDEN, 1},
                      {"intermediate.dense", INTERMEDIATE, HIDDEN, 0}, {"output", HIDDEN, INTERMEDIATE, 1}};
        for (size_t j = 0; j < sizeof layers / sizeof layers[0]; j++) {
            char prefix[64], dense[96];
            snprintf(prefix, sizeof prefix, "encoder.layer.%d.%s", i, layers[j].name);
            snprintf(dense, sizeof dense, layers[j].norm ? "%s.dense" : "%s", prefix);
            linear(dense, layers[j].out, layers[j].in);
            if (layers[j].norm)
                layernorm(prefix);
        }
    }
    linear("pooler.dense", HIDDEN, HIDDEN);
}

/* FNV-1a over the bits of x. */
static uint64_t hash(uint64_t h, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        for (int byte = 0; byte < 4; byte++)
            h = (h ^ (bits >> 8 * byte & 0xff)) * 0x100000001b3u;
    }
    return h;
}

enum { SEQUENCES = 4, TOKENS = 96 }; /* the last has 72: attention in integers */

int main(int argc, char **argv)
{
    const int chosen = argc == 4, passes = chosen ? atoi(argv[3]) : 1;
    int ran = 0;
    const fb_run_options options = {.threads = chosen};
    static const int64_t offsets[SEQUENCES + 1] = {0, 1, 8, 24, TOKENS};
    static float hidden[TOKENS * HIDDEN], pooler[SEQUENCES * HIDDEN], vectors[SEQUENCES * HIDDEN];
    static int32_t ids[TOKENS];
    make_tensors();
    for (int i = 0; i < TOKENS; i++)
        ids[i] = (int32_t)(draw() >> 16) % VOCAB;
    for (int precision = FB_FP32; precision <= FB_INT8; precision++)
        for (int i = 0; i < fb_isa_count(); i++) {
            const fb_isa_row row = fb_isa_at(i);
            const fb_config config = {.vocab_size = VOCAB,
                                      .hidden_size = HIDDEN,
                                      .num_hidden_layers = LAYERS,
                                      .num_attention_heads = HEADS,
                                      .intermediate_size = INTERMEDIATE,
                                      .max_position_embeddings = POSITIONS,
                                      .type_vocab_size = TYPES,
                                      .precision = (fb_precision)precision,
                                      .layer_norm_eps = 1e-12f,
                                      .hidden_act = FB_ACT_GELU,
                                      .pooling = FB_POOL_MEAN,
                                      .normalize = 1};
            const fb_batch batch = {ids, NULL, offsets, SEQUENCES};
            const fb_outputs out = {hidden, pooler, vectors};
            fb_model *model;
            fb_error err;
            const char *name = precision == FB_INT8 ? "int8" : "fp32";
            if (!row.supported || (chosen && (strcmp(argv[1], row.kernels->isa) != 0 || strcmp(argv[2], name) != 0)))
                continue;
            fb_status status = fb_load(&config, tensors, num_tensors, row.kernels->isa, &model, &err);
            for (int pass = 0; status == FB_OK && pass < passes; pass++)
                status = fb_forward(model, &batch, &out, &options, &err);
            if (status != FB_OK) {
                fprintf(stderr, "%s: %s\n", row.kernels->isa, err.text);
                return 1;
            }
            fb_free(model);
            ran++;
            uint64_t h = hash(0xcbf29ce484222325u, hidden, TOKENS * HIDDEN);
            h = hash(hash(h, pooler, SEQUENCES * HIDDEN), vectors, SEQUENCES * HIDDEN);
            printf("%s %s %016llx\n", name, row.kernels->isa, (unsigned long long)h);
        }
    return ran == 0; /* a set that is not here */
}

/* head.c: a layer of a task head, packed like the encoder's, run over rows that the caller has picked.
 */
#include "dispatch.h"
#include "error.h"
#include "fastbert.h"
#include "threads.h"
#include "weights.h"

#include <stdlib.h>

struct fb_head {
    fb_kernels kernels;
    ptrdiff_t out, in;
    fb_act act;
    float eps;
    char *packed;               /* owns the memory; behind the matrix */
    float *bias, *gamma, *beta; /* [out] or NULL */
};

enum { DIM_MOST = 1 << 24 };

static fb_status check(const fb_head_config *c, fb_error *err)
{
    const fb_tensor *w = c->weight, *vectors[] = {c->bias, c->gamma, c->beta};
    if (w->rank != 2 || w->shape[0] < 1 || w->shape[0] > DIM_MOST || w->shape[1] < 1 || w->shape[1] > DIM_MOST)
        return fb_fail(err, FB_EINVAL, "%s: expected two dimensions of 1 to %d", w->name, DIM_MOST);
    for (int i = 0; i < 3; i++) {
        const fb_tensor *v = vectors[i];
        if (v != NULL && (v->rank != 1 || v->shape[0] != w->shape[0]))
            return fb_fail(err, FB_EINVAL, "%s: expected [%lld], as many as rows of %s", v->name,
                           (long long)w->shape[0], w->name);
    }
    if ((c->gamma == NULL) != (c->beta == NULL))
        return fb_fail(err, FB_EINVAL, "%s: expected gamma and beta, or neither", w->name);
    return FB_OK;
}

/* Converts and packs, strip by strip, so that there is no second copy of a large matrix. 0: out of memory. */
static int pack(fb_head *h, const fb_head_config *c)
{
    const fb_gemm_f32 *gemm = h->kernels.gemm_f32;
    const fb_tensor *vectors[] = {c->bias, c->gamma, c->beta};
    float **places[] = {&h->bias, &h->gamma, &h->beta};
    const size_t packed_bytes = gemm->packed_bytes(h->out, h->in);
    h->packed = fb_aligned_alloc(packed_bytes + 3 * sizeof(float) * (size_t)h->out);
    float *strip = malloc((size_t)h->in * FB_STRIP * sizeof *strip);
    if (h->packed == NULL || strip == NULL) {
        free(strip);
        return 0;
    }
    for (ptrdiff_t j = 0; j < h->out; j += FB_STRIP) {
        const ptrdiff_t n = h->out - j < FB_STRIP ? h->out - j : FB_STRIP;
        fb_tensor_to_f32(c->weight, j, n, h->in, strip);
        gemm->pack(n, h->in, strip, h->in, 1, h->packed + gemm->packed_bytes(j, h->in));
    }
    free(strip);
    float *at = (float *)(h->packed + packed_bytes);
    for (int i = 0; i < 3; i++, at += h->out)
        if (vectors[i] != NULL) {
            fb_tensor_to_f32(vectors[i], 0, 1, h->out, at);
            *places[i] = at;
        }
    return 1;
}

fb_status fb_head_load(const fb_head_config *config, const char *isa, fb_head **head, fb_error *err)
{
    const fb_tensor *w = config->weight;
    fb_status status = check(config, err);
    *head = NULL;
    if (status != FB_OK)
        return status;
    fb_head *h = calloc(1, sizeof *h);
    if (h == NULL)
        return fb_fail(err, FB_ENOMEM, "%s: out of memory", w->name);
    h->out = (ptrdiff_t)w->shape[0];
    h->in = (ptrdiff_t)w->shape[1];
    h->act = config->act;
    h->eps = config->layer_norm_eps;
    status = fb_select_kernels(isa, &h->kernels, err);
    if (status == FB_OK && !pack(h, config))
        status = fb_fail(err, FB_ENOMEM, "%s: out of memory", w->name);
    if (status == FB_OK)
        *head = h;
    else
        fb_head_free(h);
    return status;
}

void fb_head_free(fb_head *head)
{
    if (head == NULL)
        return;
    fb_aligned_free(head->packed);
    free(head);
}

typedef struct run {
    const fb_head *head;
    ptrdiff_t rows;
    const float *x;
    float *y;
} run;

/* Members own columns, so that each reads its share of the weights once; LayerNorm needs whole rows. */
static void run_member(const fb_team *team, void *arg)
{
    const run *r = arg;
    const fb_head *h = r->head;
    const fb_gemm_f32 *gemm = h->kernels.gemm_f32;
    ptrdiff_t begin, end;
    fb_split(team, h->out, FB_STRIP, &begin, &end);
    const fb_epilogue epilogue = {h->bias ? h->bias + begin : NULL, h->act, NULL, 0};
    gemm->run(r->rows, end - begin, h->in, r->x, h->in, h->packed + gemm->packed_bytes(begin, h->in), &epilogue,
              r->y + begin, h->out);
    if (h->gamma == NULL)
        return;
    fb_barrier(team);
    fb_split(team, r->rows, 1, &begin, &end);
    float *y = r->y + begin * h->out;
    h->kernels.layernorm_f32(end - begin, h->out, y, h->out, h->gamma, h->beta, h->eps, y, h->out);
}

void fb_head_run(const fb_head *head, ptrdiff_t rows, const float *x, float *y, int threads)
{
    run r = {head, rows, x, y};
    if (threads < 1)
        threads = fb_usable_threads(0);
    if ((double)rows * (double)head->out * (double)head->in < FB_SMALL_WORK)
        threads = 1;
    fb_parallel(threads, run_member, &r);
}

fb_status fb_softmax(ptrdiff_t rows, ptrdiff_t n, float *x, fb_error *err)
{
    fb_kernels kernels;
    const fb_status status = fb_select_kernels(NULL, &kernels, err);
    if (status == FB_OK && n > 0)
        kernels.softmax_f32(rows, n, 1.0f, x, n);
    return status;
}

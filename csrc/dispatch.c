#include "dispatch.h"

#include "cpu.h"
#include "error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* CMake defines FB_HAVE_<name> as 1 for each row it builds, 0 for the others. */
#define FB_ISA(family, name, flags) extern const fb_kernels fb_kernels_##name;
#include "isa.def"
#undef FB_ISA

#define FB_CAT_(a, b) a##b
#define FB_CAT(a, b) FB_CAT_(a, b)
#define FB_IF_1(...) __VA_ARGS__
#define FB_IF_0(...)

static const fb_kernels *const rows[] = {
#define FB_ISA(family, name, flags) FB_CAT(FB_IF_, FB_HAVE_##name)(&fb_kernels_##name, )
#include "isa.def"
#undef FB_ISA
};
enum { ROWS = sizeof rows / sizeof rows[0] };

int fb_isa_count(void) { return ROWS; }

fb_isa_row fb_isa_at(int index)
{
    fb_isa_row row = {rows[index], (rows[index]->needs & ~fb_cpu_features()) == 0};
    return row;
}

static void inherit(fb_kernels *merged, const fb_kernels *row)
{
    if (merged->isa == NULL) {
        merged->isa = row->isa;
        merged->needs = row->needs;
    }
#define FB_INHERIT(slot)                                                                                               \
    if (!merged->slot)                                                                                                 \
        merged->slot = row->slot;
    FB_INHERIT(gemm_f32)
    FB_INHERIT(softmax_f32)
    FB_INHERIT(softmax_u8)
    FB_INHERIT(layernorm_f32)
    FB_INHERIT(mix_f32)
    FB_INHERIT(quantize_u8)
    FB_INHERIT(mix_quantize_u8)
    FB_INHERIT(gemm_s8)
    FB_INHERIT(row_block)
    if (row->gemm_split != NULL && (row->gemm_split->needs & ~fb_cpu_features()) == 0)
        FB_INHERIT(gemm_split)
#undef FB_INHERIT
}

static fb_status unknown_isa(const char *isa, fb_error *err)
{
    char valid[256] = "";
    size_t used = 0;
    for (int i = 0; i < ROWS; i++)
        if (fb_isa_at(i).supported && used < sizeof valid)
            used += (size_t)snprintf(valid + used, sizeof valid - used, "%s%s", used ? ", " : "", rows[i]->isa);
    return fb_fail(err, FB_EINVAL, "FASTBERT_ISA: expected one of %s on this machine, got \"%.40s\"", valid, isa);
}

fb_status fb_select_kernels(const char *isa, fb_kernels *merged, fb_error *err)
{
    if (isa == NULL)
        isa = getenv("FASTBERT_ISA");
    int capped = isa != NULL && isa[0] != '\0';
    int seen = !capped;
    memset(merged, 0, sizeof *merged);
    for (int i = 0; i < ROWS; i++) {
        fb_isa_row row = fb_isa_at(i);
        if (!seen && strcmp(isa, row.kernels->isa) == 0) {
            if (!row.supported)
                break;
            seen = 1;
        }
        if (seen && row.supported)
            inherit(merged, row.kernels);
    }
    if (fb_cpu_features() & FB_CPU_NEAR_L3 && merged->row_block < FB_ROW_BLOCK_NEAR)
        merged->row_block = FB_ROW_BLOCK_NEAR;
    return seen ? FB_OK : unknown_isa(isa, err);
}

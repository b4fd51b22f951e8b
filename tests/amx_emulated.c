/* amx_emulated.c: csrc/kernels/amx.c over a model of AMX in plain C, so that a CPU without it can run the kernel.
 *
 * The intrinsics become functions on eight tiles of 16 rows of 64 bytes, one set to a thread, that do what Intel SDM volume
 * 2 says: ldtilecfg empties all tiles, a load empties the rows and bytes beyond the tile's shape, a store and a product
 * touch the shape alone. What faults in hardware is noted: the first fault stays in emulated_fault, and the instruction
 * does nothing.
 *
 * Compiled into a shared library by tests/test_amx.py, with csrc/ among the include paths and the flags of the row amx of
 * isa.def without those of AMX itself. AVX-512 is real.
 */
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

static _Thread_local struct {
    int configured;
    int rows[TILES], row_bytes[TILES];
    uint8_t bytes[TILES][ROWS][ROW_BYTES];
    int64_t multiplied_rows; /* since emulated_start: a product takes a cycle for each row of A */
    char fault[128];
} cpu;

#define FAULT(...) (cpu.fault[0] == '\0' ? (void)snprintf(cpu.fault, sizeof cpu.fault, __VA_ARGS__) : (void)0)

static int shaped(const char *instruction, int tile)
{
    if (!cpu.configured)
        FAULT("%s %d: no tiles are configured", instruction, tile);
    else if (tile < 0 || tile >= TILES || cpu.rows[tile] == 0)
        FAULT("%s %d: the tile has no shape", instruction, tile);
    else
        return 1;
    return 0;
}

static void emulated_loadconfig(const void *memory)
{
    uint8_t bytes[64];
    memcpy(bytes, memory, sizeof bytes);
    uint16_t row_bytes[16];
    memcpy(row_bytes, bytes + 16, sizeof row_bytes);
    const uint8_t *rows = bytes + 48;
    if (bytes[0] != 1)
        FAULT("ldtilecfg: palette %d, not 1", bytes[0]);
    for (int i = 1; i < 16; i++)
        if (bytes[i] != 0)
            FAULT("ldtilecfg: byte %d is not 0", i);
    for (int t = 0; t < 16; t++)
        if (t >= TILES ? rows[t] || row_bytes[t]
                       : rows[t] > ROWS || row_bytes[t] > ROW_BYTES || !rows[t] != !row_bytes[t])
            FAULT("ldtilecfg: tile %d of %d rows of %d bytes", t, rows[t], row_bytes[t]);
    if (cpu.fault[0] != '\0')
        return;
    cpu.configured = 1;
    memset(cpu.bytes, 0, sizeof cpu.bytes);
    for (int t = 0; t < TILES; t++) {
        cpu.rows[t] = rows[t];
        cpu.row_bytes[t] = row_bytes[t];
    }
}

static void emulated_release(void)
{
    cpu.configured = 0;
    memset(cpu.bytes, 0, sizeof cpu.bytes);
}

static void emulated_loadd(int tile, const void *memory, ptrdiff_t stride)
{
    if (!shaped("tileloadd", tile))
        return;
    memset(cpu.bytes[tile], 0, sizeof cpu.bytes[tile]);
    for (int i = 0; i < cpu.rows[tile]; i++)
        memcpy(cpu.bytes[tile][i], (const char *)memory + i * stride, (size_t)cpu.row_bytes[tile]);
}

static void emulated_stored(int tile, void *memory, ptrdiff_t stride)
{
    if (!shaped("tilestored", tile))
        return;
    for (int i = 0; i < cpu.rows[tile]; i++)
        memcpy((char *)memory + i * stride, cpu.bytes[tile][i], (size_t)cpu.row_bytes[tile]);
}

/* Its own arrays are all it touches, and a sanitizer would make it ten times as slow. */
#define UNCHECKED __attribute__((no_sanitize("address"))) __attribute__((no_sanitize("undefined")))

static int fit(const char *instruction, int sums, int a, int w)
{
    if (sums == a || sums == w || a == w)
        FAULT("%s %d %d %d: one tile twice", instruction, sums, a, w);
    else if (cpu.row_bytes[sums] % 4 || cpu.row_bytes[a] % 4 || cpu.row_bytes[w] % 4 || cpu.rows[sums] != cpu.rows[a] ||
             cpu.row_bytes[sums] != cpu.row_bytes[w] || cpu.row_bytes[a] / 4 != cpu.rows[w])
        FAULT("%s %d %d %d: %dx%d, %dx%d, %dx%d bytes do not fit", instruction, sums, a, w, cpu.rows[sums],
              cpu.row_bytes[sums], cpu.rows[a], cpu.row_bytes[a], cpu.rows[w], cpu.row_bytes[w]);
    else
        return 1;
    return 0;
}

/* sums[i][j] += sum over p and four bytes q of a[i][4 p + q] (unsigned) * w[p][4 j + q] (signed) */
UNCHECKED static void emulated_dpbusd(int sums, int a, int w)
{
    if (!shaped("tdpbusd", sums) || !shaped("tdpbusd", a) || !shaped("tdpbusd", w))
        return;
    if (fit("tdpbusd", sums, a, w)) {
        cpu.multiplied_rows += cpu.rows[a];
        for (int i = 0; i < cpu.rows[a]; i++) {
            uint32_t row[ROW_BYTES / 4];
            memcpy(row, cpu.bytes[sums][i], sizeof row);
            for (int p = 0; p < cpu.rows[w]; p++)
                for (int j = 0; j < cpu.row_bytes[w] / 4; j++)
                    for (int q = 0; q < 4; q++)
                        row[j] += (uint32_t)(cpu.bytes[a][i][4 * p + q] * (int8_t)cpu.bytes[w][p][4 * j + q]);
            memcpy(cpu.bytes[sums][i], row, sizeof row);
        }
    }
}

static float flushed(float x) { return fabsf(x) < 0x1p-126f ? 0.0f : x; }
static float bf16(const uint8_t *p)
{
    const uint32_t word = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
    float x;
    memcpy(&x, &word, sizeof x);
    return flushed(x);
}

/* sums[i][j] += even + odd, fma chains over p of a[i][2 p + q] * w[p][2 j + q], q = 0 and 1; denormals are 0 throughout. */
UNCHECKED static void emulated_dpbf16ps(int sums, int a, int w)
{
    if (!shaped("tdpbf16ps", sums) || !shaped("tdpbf16ps", a) || !shaped("tdpbf16ps", w))
        return;
    if (!fit("tdpbf16ps", sums, a, w))
        return;
    cpu.multiplied_rows += cpu.rows[a];
    for (int i = 0; i < cpu.rows[a]; i++) {
        float row[ROW_BYTES / 4], chains[ROW_BYTES / 4][2] = {{0}};
        memcpy(row, cpu.bytes[sums][i], sizeof row);
        for (int p = 0; p < cpu.rows[w]; p++)
            for (int j = 0; j < cpu.row_bytes[w] / 4; j++)
                for (int q = 0; q < 2; q++)
                    chains[j][q] = flushed(fmaf(bf16(cpu.bytes[a][i] + 4 * p + 2 * q),
                                                bf16(cpu.bytes[w][p] + 4 * j + 2 * q), chains[j][q]));
        for (int j = 0; j < cpu.row_bytes[w] / 4; j++)
            row[j] = flushed(flushed(row[j]) + flushed(chains[j][0] + chains[j][1]));
        memcpy(cpu.bytes[sums][i], row, sizeof row);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_loadd emulated_loadd
#define _tile_stream_loadd emulated_loadd /* how it passes through the caches is all that differs */
#define _tile_stored emulated_stored
#define _tile_dpbusd emulated_dpbusd
#define _tile_dpbf16ps emulated_dpbf16ps

#include "kernels/amx.c"

/* ---- what the test calls ---- */

void emulated_start(void) { memset(&cpu, 0, sizeof cpu); }
const char *emulated_fault(void) { return cpu.fault; }
int emulated_in_use(void) { return cpu.configured; }
int64_t emulated_multiplied_rows(void) { return cpu.multiplied_rows; }

const char *amx_name(void) { return fb_kernels_amx.gemm_s8->name; }

size_t amx_packed_bytes(ptrdiff_t n, ptrdiff_t k) { return fb_kernels_amx.gemm_s8->packed_bytes(n, k); }

void amx_pack(ptrdiff_t n, ptrdiff_t k, const int8_t *w, ptrdiff_t ldw, const float *scale_w, void *packed)
{
    fb_kernels_amx.gemm_s8->pack(n, k, w, ldw, scale_w, packed);
}

void amx_run(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
             const int32_t *zero, const void *packed, const float *bias, int act, const float *residual, ptrdiff_t ldr,
             float *c, ptrdiff_t ldc)
{
    const fb_epilogue epilogue = {bias, (fb_act)act, residual, ldr};
    fb_kernels_amx.gemm_s8->run(m, n, k, a, lda, scale_a, zero, packed, &epilogue, c, ldc);
}

const char *amx_split_name(void) { return fb_kernels_amx.gemm_split->name; }

size_t amx_split_packed_bytes(ptrdiff_t n, ptrdiff_t k) { return fb_kernels_amx.gemm_split->packed_bytes(n, k); }

void amx_split_pack(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k, void *packed)
{
    fb_kernels_amx.gemm_split->pack(n, k, w, stride_n, stride_k, packed);
}

void amx_split_run(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const void *packed,
                   const float *bias, int act, const float *residual, ptrdiff_t ldr, float *c, ptrdiff_t ldc,
                   void *scratch)
{
    const fb_epilogue epilogue = {bias, (fb_act)act, residual, ldr};
    fb_kernels_amx.gemm_split->run(m, n, k, a, lda, packed, &epilogue, c, ldc, scratch);
}

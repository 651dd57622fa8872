/* AMX: bfloat16 products on tiles of 16 x 16 sums; all else as AVX-512-BF16.
 *
 * The tokens of a group are the rows of the left operand, read as they are packed; the weights of 16 outputs are the
 * right one, paired by features in scratch, once for all groups, so that each of its tiles is 1 KB in one piece. A
 * product takes 16 cycles whatever its tiles hold: blocks narrower than 32 features leave a share of them empty, and so
 * do few tokens.
 */
#define _GNU_SOURCE
#define SB_LANES 16
#define SB_DOT(dtype) ((dtype) == SB_BFLOAT16)
#define SB_DOT_BFLOAT16
#define SB_LONGEST_CHUNK 32
#define SB_OWN_PEAK
#define SB_OWN_ATTENTION
#include "kernels.h"
#include "layer.h"
#include "simd.h"
#include "activations.h"
#include "tile.h"
#include "kernels_impl.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 16 };

/* Tile registers: 0 to 4 hold sums, 5 tokens, 6 and 7 weights; for panels of 16 and more in chunks of 32 all are alike,
 * which attention relies on. Tokens are always read by 16: past a group's last token lies its next chunk, another
 * position or the sums, and what becomes of it is never looked at. */
static void prepare(int64_t panel, int64_t chunk) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    const int64_t outputs = panel < SIDE ? panel : SIDE;
    for (int i = 0; i < 8; i++) {
        shape.rows[i] = (uint8_t)(i < 6 ? SIDE : chunk / 2);
        shape.row_bytes[i] = (uint16_t)(i == 5 ? chunk * 2 : outputs * 4);
    }
    __asm__ volatile("" ::: "memory"); /* what the tiles load is written before */
    _tile_loadconfig(&shape);
}

static void finish(void) { _tile_release(); }

/* Registers 0 to 3 from the 2 x 2 tiles of sums, or from zero, and back. */
SB_INLINE void start_sums(const int add, const int rows, const int columns, const float *sums, int64_t stride) {
    const char *below = (const char *)sums + SIDE * stride;
    if (add) {
        _tile_loadd(0, sums, stride);
        if (columns > 1) _tile_loadd(1, sums + SIDE, stride);
        if (rows > 1) _tile_loadd(2, below, stride);
        if (rows > 1 && columns > 1) _tile_loadd(3, below + SIDE * 4, stride);
    } else {
        _tile_zero(0);
        if (columns > 1) _tile_zero(1);
        if (rows > 1) _tile_zero(2);
        if (rows > 1 && columns > 1) _tile_zero(3);
    }
}

SB_INLINE void keep_sums(const int rows, const int columns, float *sums, int64_t stride) {
    char *below = (char *)sums + SIDE * stride;
    _tile_stored(0, sums, stride);
    if (columns > 1) _tile_stored(1, sums + SIDE, stride);
    if (rows > 1) _tile_stored(2, below, stride);
    if (rows > 1 && columns > 1) _tile_stored(3, below + SIDE * 4, stride);
}

/* Adds to the sums in t->acc, or writes them. */
SB_INLINE void multiply(const int add, const int rows, const int columns, const int chunk, int64_t outputs,
                        const sb_tile *t) {
    const int64_t chunk_bytes = t->chunk_stride * 2, row = chunk * 2, pairs = outputs * 4;
    const int64_t column_bytes = t->column_stride * 2, weight_bytes = chunk / 2 * pairs;
    const char *w = t->w;
    const int64_t stride = t->acc_stride * (int64_t)sizeof(float);
    start_sums(add, rows, columns, t->acc, stride);
    for (int64_t b = 0; b < t->blocks; b++) {
        const char *x = (const char *)t->x + t->cols[b] * column_bytes;
        for (int64_t c = 0; c < t->chunks; c++, x += chunk_bytes, w += weight_bytes) {
            _tile_loadd(5, x, row);
            _tile_loadd(6, w, pairs);
            _tile_dpbf16ps(0, 5, 6);
            if (columns > 1) {
                _tile_loadd(7, w + SIDE * 4, pairs);
                _tile_dpbf16ps(1, 5, 7);
            }
            if (rows > 1) {
                _tile_loadd(5, x + SIDE * row, row);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (rows > 1 && columns > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    keep_sums(rows, columns, t->acc, stride);
}

/* Panels of blocks whose height is no multiple of 16; all others are run(). */
SB_INLINE void multiply_chunks(const int rows, int64_t panel, const sb_tile *t) {
    if (t->chunk == 32) multiply(0, rows, 1, 32, panel, t);
    else if (t->chunk == 16) multiply(0, rows, 1, 16, panel, t);
    else multiply(0, rows, 1, 8, panel, t);
}

static void tile(int dtype, int64_t panel, int64_t group, const sb_tile *t) {
    (void)dtype;
    if (group > SIDE) multiply_chunks(2, panel, t);
    else multiply_chunks(1, panel, t);
}

/* Two features of `count` outputs, at most a vector of them, side by side. */
SB_INLINE void interleave(const uint16_t *even, const uint16_t *odd, int64_t count, uint16_t *out) {
    const __mmask16 lanes = (__mmask16)((1u << count) - 1);
    const __m256i low = _mm256_maskz_loadu_epi16(lanes, even), high = _mm256_maskz_loadu_epi16(lanes, odd);
    _mm512_mask_storeu_epi32(out, lanes, pair_rows(low, high));
}

/* A pair lies together: whole pairs are transposed. */
static void transpose_pairs(const uint16_t *in, int64_t out_stride, int64_t outputs, int64_t features, uint16_t *out) {
    for (int64_t n = 0; n < outputs; n += 8)
        for (int64_t k = 0; k < features; k += 8)
            SB_UNROLL for (int i = 0; i < 8; i++)
                SB_UNROLL for (int j = 0; j < 4; j++)
                    memcpy(out + (k / 2 + j) * 2 * outputs + 2 * (n + i), in + (n + i) * out_stride + k + 2 * j, 4);
}

/* All panels of a pair of features before the next pair: values are read in the order in which they lie. */
static void pair(const uint16_t *in, int64_t out_stride, int64_t in_stride, int64_t outputs, int64_t features,
                 int64_t panel, uint16_t *out, int64_t panel_stride) {
    enum { LINE = 32, PAGE_AHEAD = 2048 }; /* elements: the hardware's own fetches end at pages */
    if (out_stride == 1) {
        for (int64_t k = 0; k < features; k += 2, in += 2 * in_stride, out += 2 * panel) {
            uint16_t *to = out;
            for (const uint16_t *line = in + PAGE_AHEAD; line < in + PAGE_AHEAD + outputs; line += LINE) {
                __builtin_prefetch(line);
                __builtin_prefetch(line + in_stride);
            }
            for (const uint16_t *even = in; even < in + outputs; even += panel, to += panel_stride)
                for (int64_t n = 0; n < panel; n += SIDE)
                    interleave(even + n, even + in_stride + n, panel < SIDE ? panel : SIDE, to + 2 * n);
        }
        return;
    }
    for (int64_t n = 0; n < outputs / panel; n++, in += panel * out_stride, out += panel_stride)
        transpose_pairs(in, out_stride, panel, features, out);
}

#include "amx_turns.h"

#include "amx_attention.h"
#include "amx_run.h"

/* The sums after these, which may be the next block's: loading them from L2 took as long as the products. */
SB_INLINE void fetch_sums(const float *sums, int64_t width) {
    for (int64_t i = 0; i < 2 * SIDE; i++) {
        __builtin_prefetch(sums + i * width, 1);
        __builtin_prefetch(sums + i * width + SIDE, 1);
    }
}

static void outer_pairs(const uint16_t *dy, const uint16_t *x, float *out, int64_t tokens, int64_t height, int64_t width) {
    enum { TOKENS = SB_LONGEST_CHUNK };
    static const int32_t first[] = {0};
    for (int64_t i = 0; i < height; i += 2 * SIDE)
        for (int64_t j = 0; j < width; j += 2 * SIDE) {
            const sb_tile t = {.x = dy + i * TOKENS,
                               .w = x + j * 2,
                               .cols = first,
                               .blocks = 1,
                               .chunks = tokens / TOKENS,
                               .chunk_stride = height * TOKENS,
                               .acc = out + i * width + j,
                               .acc_stride = width};
            fetch_sums(width - j > 2 * SIDE ? t.acc + 2 * SIDE : out + (i + 2 * SIDE) * width, width);
            if (height - i > SIDE && width - j > SIDE) multiply(1, 2, 2, TOKENS, width, &t);
            else if (height - i > SIDE) multiply(1, 2, 1, TOKENS, width, &t);
            else if (width - j > SIDE) multiply(1, 1, 2, TOKENS, width, &t);
            else multiply(1, 1, 1, TOKENS, width, &t);
        }
}

static void turn_tokens(const uint16_t *const *rows, int64_t feature, int64_t width, uint16_t *out) {
    for (int64_t n = 0; n < width; n += SIDE) transpose_32_by_16(rows, feature + n, out + n * 2 * SIDE, 2 * SIDE);
}

static void pair_tokens(const uint16_t *const *rows, int64_t feature, int64_t width, uint16_t *out) {
    for (int64_t t = 0; t < 2 * SIDE; t += 2, out += 2 * width)
        for (int64_t n = 0; n < width; n += SIDE)
            interleave(rows[t] + feature + n, rows[t + 1] + feature + n, SIDE, out + 2 * n);
}

static double peak(int dtype, int64_t iterations) {
    (void)dtype;
    prepare(2 * SIDE, SB_LONGEST_CHUNK);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t n = 0; n < iterations; n++) {
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    finish();
    return (double)iterations * 4 * 2 * SIDE * SIDE * SB_LONGEST_CHUNK;
}

/* The processor has the tiles, and the kernel lends this process the room to save them. */
static int supported(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, BFLOAT16_TILES = 1 << 22, TILES = 1 << 24 };
    unsigned a, b, c, d;
    if (!sb_avx512bf16.supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d & TILES) && (d & BFLOAT16_TILES) && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

const sb_kernels sb_amx = {.name = "amx",
                           .base = &sb_avx512bf16,
                           .groups = {32, 32, 0, 0, 0},
                           .small_group = SIDE,
                           .packed_size = {4, 2, 4},
                           .pair = pair,
                           .prepare = prepare,
                           .finish = finish,
                           .run = run,
                           .run_outputs = SIDE,
                           .outer_pairs = outer_pairs,
                           .turn_tokens = turn_tokens,
                           .pair_tokens = pair_tokens,
                           SB_COMMON_KERNELS};

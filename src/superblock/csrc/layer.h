/* One block-sparse weight as the drivers walk it: block rows, cut into panels, over groups of packed tokens. */
#ifndef SUPERBLOCK_LAYER_H
#define SUPERBLOCK_LAYER_H

#include "kernels.h"

#include <stddef.h>

typedef struct {
    const sb_kernels *kernels;
    sb_weight weight;
    int64_t rows, padded_in, panel, max_group;
    int32_t dtype, packed_size;
    int transposed; /* values lie output-major: a panel of them is turned, into scratch, before its groups use it */
    size_t scratch; /* bytes for the accumulators and a turned panel */
} sb_layer;

void sb_layer_init(sb_layer *layer, const sb_weight *weight, int32_t dtype);

/* One tile of tokens: where its packed features lie and where its results go. */
typedef struct {
    const void *packed;
    int64_t tokens, group; /* the last group may be partly filled */
    const void *bias, *residual;
    void *y, *preactivation;
    int64_t y_stride, residual_stride;
    void *next; /* packed activations of a next product, instead of y */
    int64_t next_padded, next_size;
    int32_t activation, residual_first;
    int stream; /* y is too large to be worth a place in the caches */
    const char *ahead_residual, *ahead_y; /* `group` dense rows to fetch meanwhile, for the next group; or NULL */
} sb_target;

/* Multiply the packed groups with block rows [first, last). */
void sb_layer_run(const sb_layer *layer, const sb_target *target, int64_t first, int64_t last, void *scratch);

static inline int64_t sb_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t sb_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t sb_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline size_t sb_align(size_t bytes) { return (bytes + 63) & ~(size_t)63; }
static inline int64_t sb_size_of(int32_t dtype) { return dtype == SB_FLOAT32 ? 4 : 2; }

#endif

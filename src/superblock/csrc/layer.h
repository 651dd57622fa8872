/* One block-sparse weight as the drivers walk it: block rows, cut into panels, over groups of packed tokens. */
#ifndef SUPERBLOCK_LAYER_H
#define SUPERBLOCK_LAYER_H

#include "kernels.h"

#include <stddef.h>

typedef struct sb_layer {
    const sb_kernels *kernels;
    sb_weight weight;
    const int32_t *starts, *ends; /* of every block row's entries; fewer than all where only some are multiplied */
    int64_t rows, padded_in, panel, max_group, chunk; /* padded_in: of the columns that are multiplied */
    int32_t dtype, packed_size;
    size_t arranged_bytes; /* for the values, where they lie otherwise than tiles want; else 0 */
    char *arranged;
    const uint8_t *reads; /* which features it has blocks for (see reads.h): others need not be packed; NULL: any */
} sb_layer;

void sb_layer_init(sb_layer *layer, const sb_weight *weight, int32_t dtype, int64_t tokens);

/* Lay the values out as tiles want them, in `memory` of `arranged_bytes`: once for all tokens of a call. */
int sb_layer_arrange(sb_layer *layer, void *memory, int32_t threads);

/* What a strip's values take where they have not been: then every strip lays out its own, in the target's `strip`. */
int64_t sb_layer_strip_bytes(const sb_layer *layer);

/* What its living blocks take. */
int64_t sb_layer_bytes(const sb_layer *layer);

/* The sums of a group and a strip, which sb_layer_run needs. */
enum { SB_ACC_BYTES = SB_MAX_GROUP * SB_MAX_PANEL * 4 };

/* A group among others that it may overlap: its first token, and where that is among the packed positions. */
typedef struct {
    int32_t token, position;
} sb_start;

/* Where the features of a tile's tokens lie. Strides are from a token of a group to the next, from a chunk of its features to
 * the next, of what columns are counted in, and from a group to the next. */
typedef struct {
    const void *features;
    int64_t token_stride, chunk_stride, column_stride, group_stride;
    const sb_start *starts; /* of so many groups, in positions a token's stride apart; NULL: they follow one another */
    int64_t groups;
    const void *last; /* where the last group lies, `last_stride` from a token to the next; NULL: with the others */
    int64_t last_stride;
} sb_packing;

/* Groups packed one after the other. */
sb_packing sb_packed_groups(const sb_layer *layer, const void *packed, int64_t group);

/* One tile of tokens: where its features lie and where its results go. */
typedef struct sb_target {
    sb_packing x;
    int64_t tokens, group; /* the last group may be partly filled */
    const void *bias, *residual;
    void *y, *preactivation;
    int64_t y_stride, residual_stride;
    void *next; /* packed activations of a next product, instead of y */
    int64_t next_padded, next_size, next_chunk;
    int32_t activation, residual_first;
    const uint8_t *reads; /* of the results, by SB_CHUNK (see reads.h): strips that nothing reads are left out, zeros to z */
    char *strip;          /* room for sb_layer_strip_bytes */
    int stream;  /* y is too large to be worth a place in the caches */
    const sb_layer *following; /* whose first weights come after these, to be fetched ahead; NULL: weights stay in L2 */
    const char *ahead_residual, *ahead_y; /* `group` dense rows to fetch meanwhile, for the next group; or NULL */
} sb_target;

/* The groups of a tile, the first token of one, where its features lie and how far those of its tokens are apart. */
int64_t sb_count_groups(const sb_target *target);
int64_t sb_first_token(const sb_target *target, int64_t group);
const char *sb_group_features(const sb_layer *layer, const sb_target *target, int64_t group);
int64_t sb_group_stride(const sb_target *target, int64_t group);

/* Whether the kernels walk the layer in their own way, which takes tokens at any distance. */
int sb_layer_walks(const sb_layer *layer);

/* The results of `width` outputs, if they need no multiplying: none of those that nothing reads, and one group's of those
 * without blocks for a next product. False: they do. */
int sb_layer_skips(const sb_layer *layer, const sb_target *target, int64_t column, int64_t width, int empty, float *acc);

/* Multiply the packed groups with block rows [first, last). */
void sb_layer_run(const sb_layer *layer, const sb_target *target, int64_t first, int64_t last, float *acc);

/* The tile of one panel, but for what a group of tokens places. Values not yet laid out go to `*strip`, which moves on,
 * those of `width` outputs in as many panels. */
sb_tile sb_layer_tile(const sb_layer *layer, int64_t row, int64_t offset, int64_t width, int64_t panel, char **strip);

/* What becomes of the sums of `width` outputs from `column` on; sb_layer_place says for which tokens. */
sb_epilogue sb_layer_epilogue(const sb_layer *layer, const sb_target *target, int64_t column, int64_t width);
void sb_layer_place(const sb_layer *layer, const sb_target *target, int64_t token, int64_t column, sb_epilogue *e);

static inline int64_t sb_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t sb_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t sb_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline size_t sb_align(size_t bytes) { return (bytes + 63) & ~(size_t)63; }
/* The longest chunk of the kernels that divides a block. */
static inline int64_t sb_chunk(const sb_kernels *kernels, int64_t features) {
    int64_t chunk = kernels->longest_chunk;
    while (features % chunk) chunk /= 2;
    return chunk;
}
/* Streamed stores become visible to other threads in no order of their own. */
static inline void sb_finish_stores(void) {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}
static inline int64_t sb_size_of(int32_t dtype) { return dtype == SB_FLOAT32 ? 4 : 2; }

#endif

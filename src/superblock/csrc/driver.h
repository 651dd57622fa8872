/* What the drivers of the forward products share: tokens cut into tiles, packed, and their results placed. */
#ifndef SUPERBLOCK_DRIVER_H
#define SUPERBLOCK_DRIVER_H

#include "layer.h"
#include "pages.h"

typedef struct {
    int64_t group, tile, tiles; /* tokens a group, tokens a tile, tiles */
    int64_t room;               /* for tokens in whole groups, of a tile */
    int64_t splits;             /* parts that the block rows are cut into */
} sb_partition;

/* Weights that L2 does not hold beside the tokens come from L3 for every tile of tokens: fetched ahead, the next strip's
 * arrive while this one multiplies (4096 -> 4096, float32, 50 %: 123 -> 151 GFLOP/s of one core). */
enum { SB_RESIDENT_BYTES = 1 << 20 };

/* Bytes that the packed tokens of a tile may take, if those of a thread take so many. */
int64_t sb_tile_bytes(const sb_layer *layer, int64_t weight_bytes, int64_t a_thread);

/* Whether the layer multiplies rows of tokens, as x has them or normalized, instead of packing them. */
int sb_takes_rows(const sb_layer *layer, const sb_product *p);

/* Tokens of rows in groups of `most`, else in groups of equal size, an equal number for every thread; when they are too few
 * for that, the block rows are shared out too. A token takes `bytes` of the tile, `tile` at most. */
sb_partition sb_cut(int takes_rows, int64_t tokens, int64_t most, int64_t bytes, int64_t tile, int64_t rows, int32_t threads);

/* The same of groups of this size, whatever the threads. */
sb_partition sb_cut_groups(int64_t tokens, int64_t group, int64_t bytes, int64_t tile, int64_t rows, int32_t threads);

/* The size of groups whatever the threads. */
int64_t sb_group_of(int takes_rows, int64_t tokens, int64_t most);

/* Bytes for the norm's parameters as floats and the normalized tokens of a group, before they are packed. */
size_t sb_normalized_bytes(const sb_product *p, int64_t group);

/* Where tokens from `start` on lie, or will: what of them is not multiplied as x has it is in `packed`, which has room for
 * whole groups. */
sb_packing sb_packing_of(const sb_layer *layer, const sb_product *p, int64_t start, int64_t tokens, int64_t group,
                         const char *packed);

/* Packs them, group by group; `room` is for the bytes of sb_normalized_bytes. */
sb_packing sb_pack_tile(const sb_layer *layer, const sb_product *p, int64_t start, int64_t tokens, int64_t group,
                        char *room, char *packed);

/* Of a product's results: whether to write them around the caches, and the wish for large pages. */
int sb_product_streams(const sb_product *p);
void sb_prefer_huge_results(const sb_product *p);

/* Where the results of tokens from `start` on go; their packed features, and whether to stream, are the caller's to add;
 * a product without y has its preactivations at most. */
sb_target sb_target_of(const sb_product *p, int64_t start, int64_t tokens, int64_t group);

/* Where no thread comes to a strip of weights twice, it lays its values out just before they are multiplied, which spares
 * them the way through memory. */
int sb_arranges_strips(const sb_layer *layer, int64_t tiles, int32_t threads);

/* Otherwise, those of one layer or two, in one buffer. */
int sb_arrange(sb_layer *first, sb_layer *second, int32_t threads);

/* Whether an attention of so many tokens in so many sequences is better run whole than in its three steps. */
int sb_attends_as_one(const sb_self_attention *a, int64_t tokens, int64_t sequences, int32_t threads);

#endif

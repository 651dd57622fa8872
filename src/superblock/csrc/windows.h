/* The windows of a convolution as packed tokens. */
#ifndef SUPERBLOCK_WINDOWS_H
#define SUPERBLOCK_WINDOWS_H

#include "driver.h"

/* Images packed row by row, once for all places of the kernel: the features that a group of tokens has at one of these are
 * a run of positions, which begins as far from the group's own place whichever group it is. */
typedef struct {
    int64_t positions; /* of a tile; 0: this way is not taken */
    int64_t groups;    /* of a row of the result; the last may overlap the one before */
    int64_t line;      /* positions of a row of an image: its columns by their rest modulo the stride, `phase` of each */
    int64_t phase;
    int32_t *cols;           /* where the block of every entry begins; the caller frees them */
    int64_t features, starts; /* of a tile, to make room for */
} sb_image_rows;

/* Cut the result into tiles of whole rows, if these fill groups and it is worth while. Returns a status. */
int sb_cut_image_rows(const sb_layer *layer, const sb_product *p, int32_t threads, sb_image_rows *rows, sb_partition *cut);

/* The rows that the target's tokens, from `start` on, need, and where its groups are. */
void sb_pack_image_rows(const sb_layer *layer, const sb_product *p, const sb_image_rows *rows, int64_t start,
                        sb_start *starts, char *packed, sb_target *target);

/* What so many tokens, from one on, see at a place of the kernel: pixels, or NULL beside the image. */
void sb_window_rows(const sb_window *w, const void *x, int64_t size, int64_t place, int64_t token, int64_t count,
                    const void **rows);

/* Otherwise: the features of every place of the kernel, for one group of tokens. */
void sb_pack_windows(const sb_layer *layer, const sb_product *p, int64_t token, int64_t count, int64_t group, char *packed);

#endif

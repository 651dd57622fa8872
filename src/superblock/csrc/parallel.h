#ifndef SUPERBLOCK_PARALLEL_H
#define SUPERBLOCK_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

/* Run `item(context, i)` once for every i in [0, items), on up to `threads` threads; items are handed out in order.
 * Returns the first status that is not SB_OK. */
int sb_parallel(int32_t threads, int64_t items, int (*item)(const void *context, int64_t i), const void *context);

/* What the calling thread wants scratch memory for: one item, a sequence of several, or all items of a product or of
 * several, which it then shares. */
enum sb_scratch_use { SB_ITEM, SB_SEQUENCE, SB_CALL, SB_SHARED, SB_USES };

/* The calling thread's scratch memory, at least `bytes`, 64-byte aligned, kept for its next call; NULL when out of
 * memory. One buffer a thread and use: each call invalidates the last one's. */
void *sb_scratch(enum sb_scratch_use use, size_t bytes);

#endif

/* What is asked of the kernel about the pages behind large memory. */
#ifndef SUPERBLOCK_PAGES_H
#define SUPERBLOCK_PAGES_H

#include <stdint.h>

/* Beyond this malloc hands out fresh pages. */
enum { SB_REUSED_BYTES = 32 << 20 };

/* Whether to write `bytes` of results around the caches: they leave those before anyone reads them, and no line need be
 * read first (768 x 3072, 1576 tokens, float32, 90 %: 5.6 -> 4.5 ms; 6304 tokens: 13.8 -> 11.4 of two threads). But not to
 * pages that the kernel has yet to zero, in the caches: that would write them twice (38 ms, not 22). */
int sb_streams(const void *results, int64_t bytes);

/* Ask for fresh pages in pieces of 2 MB: faults of 4 KB cost more than the product (64 -> 256 channels: 26 -> 12 ms). */
void sb_prefer_huge_pages(const void *memory, int64_t bytes);

#endif

/* Which features anything reads: what nothing reads need not be computed. Lists are by SB_CHUNK of them. */
#ifndef SUPERBLOCK_READS_H
#define SUPERBLOCK_READS_H

#include "superblock.h"

/* Whether any of so many features from one on is read; all are where `reads` is NULL. */
int sb_reads(const uint8_t *reads, int64_t feature, int64_t count);

/* The features that a weight has living blocks for; there is room for all of its block columns. */
void sb_find_reads(const sb_weight *weight, uint8_t *reads);

/* The features of dz that are not zero for want of blocks in the second weight of a feed-forward, whose gradients go back so:
 * in runs that blocks and strips do not straddle. NULL, with SB_OK: all are. The caller frees them. */
int sb_find_gradients(const sb_feed_forward *back, uint8_t **reads);

/* The weight without the block columns that are not read, in memory that the caller frees. NULL: there is none. */
void *sb_leave_out_columns(sb_weight *weight, const uint8_t *reads);

/* The end of every block row's entries, none of which are left where nothing reads the row's features. */
void sb_leave_out_rows(const sb_weight *weight, const uint8_t *reads, int32_t *ends);

/* sb_run_sampled, whose gradient is zero in block rows of features that are not read. */
int sb_run_sampled_rows(const sb_sampled *sampled, const uint8_t *reads);

#endif

/* Two products whose hidden activations stay in the cache: a tile of tokens passes both. */
#include "driver.h"
#include "parallel.h"

#include <string.h>

typedef struct {
    const sb_feed_forward *ff;
    sb_layer first, second;
    sb_partition partition;
    int stream;   /* write y around the caches */
    int resident; /* L2 holds the weights of both beside the tokens */
} feed_forward_job;

static int feed_forward_item(const void *context, int64_t item) {
    const feed_forward_job *job = context;
    const sb_partition *cut = &job->partition;
    const sb_layer *first = &job->first, *second = &job->second;
    const sb_product *p = &job->ff->first;
    const int64_t start = item * cut->tile, tokens = sb_min(cut->tile, p->tokens - start);
    const size_t x_bytes = sb_align((size_t)(cut->tile * first->padded_in * first->packed_size));
    const size_t hidden_bytes = sb_align((size_t)(cut->tile * second->padded_in * second->packed_size));
    const size_t strip_bytes = (size_t)sb_max(sb_layer_strip_bytes(first), sb_layer_strip_bytes(second));
    const size_t bytes = x_bytes + hidden_bytes + strip_bytes + SB_ACC_BYTES;
    char *x = sb_scratch(SB_ITEM, bytes + sb_normalized_bytes(p, cut->group));
    if (!x) return SB_NO_MEMORY;
    char *hidden = x + x_bytes, *strip = hidden + hidden_bytes;
    float *acc = (float *)(strip + strip_bytes);
    sb_pack_tile(first, p, start, tokens, cut->group, x + bytes, x);
    const int64_t covered = first->rows * first->weight.block_out;
    if (covered < second->padded_in) memset(hidden, 0, hidden_bytes); /* features only the second's blocks reach */
    sb_target inner = sb_target_of(p, 0, tokens, cut->group);
    inner.packed = x;
    inner.strip = strip;
    inner.following = job->resident ? NULL : second;
    inner.next = hidden;
    inner.next_padded = second->padded_in;
    inner.next_size = second->packed_size;
    inner.next_chunk = second->chunk;
    sb_layer_run(first, &inner, 0, first->rows, acc);
    sb_target outer = sb_target_of(&job->ff->second, start, tokens, cut->group);
    outer.packed = hidden;
    outer.strip = strip;
    outer.stream = job->stream;
    outer.following = job->resident ? NULL : first;
    sb_layer_run(second, &outer, 0, second->rows, acc);
    sb_finish_stores();
    return SB_OK;
}

SB_API int sb_run_feed_forward(const sb_feed_forward *ff) {
    if (!ff->first.tokens) return SB_OK;
    feed_forward_job job = {.ff = ff, .stream = sb_product_streams(&ff->second)};
    sb_layer_init(&job.first, &ff->first.weight, ff->first.dtype, ff->first.tokens);
    sb_layer_init(&job.second, &ff->second.weight, ff->first.dtype, ff->first.tokens);
    sb_prefer_huge_pages(&ff->second);
    const int64_t bytes = (job.first.padded_in + job.second.padded_in) * job.first.packed_size;
    const int64_t weight_bytes = sb_layer_bytes(&job.first) + sb_layer_bytes(&job.second);
    job.resident = weight_bytes <= SB_RESIDENT_BYTES;
    job.partition = sb_cut(ff->first.tokens, sb_min(job.first.max_group, job.second.max_group), bytes,
                        sb_tile_bytes(&job.first, weight_bytes), 1, ff->first.threads);
    const int status = sb_arrange(&job.first, &job.second, job.partition.tiles, ff->first.threads);
    if (status != SB_OK) return status;
    return sb_parallel(ff->first.threads, job.partition.tiles, feed_forward_item, &job);
}

/* Scaled dot-product attention, a head, or a part of its queries, at a time.
 *
 * Heads are read and written where the projections have them, and scores never leave the core's caches. torch's own
 * kernel takes half of a ViT whose linear layers are 90 % sparse.
 */
#include "layer.h"
#include "parallel.h"

typedef struct {
    const sb_attention *a;
    const sb_kernels *kernels;
    int64_t items, splits, queries; /* parts of a head, and the queries of each */
    int look_ahead;
} attention_job;

static sb_head part_of(const attention_job *job, int64_t item) {
    const sb_attention *a = job->a;
    const int64_t head = item / job->splits, batch = head / a->heads, h = head % a->heads;
    const int64_t start = item % job->splits * job->queries, size = sb_size_of(a->dtype);
    return (sb_head){.q = (const char *)a->q + (batch * a->q_batch + h * a->q_head + start * a->q_token) * size,
                     .k = (const char *)a->k + (batch * a->k_batch + h * a->k_head) * size,
                     .v = (const char *)a->v + (batch * a->v_batch + h * a->v_head) * size,
                     .y = (char *)a->y + (batch * a->y_batch + h * a->y_head + start * a->y_token) * size,
                     .queries = sb_min(job->queries, a->queries - start),
                     .keys = a->keys,
                     .features = a->features,
                     .q_token = a->q_token,
                     .k_token = a->k_token,
                     .v_token = a->v_token,
                     .y_token = a->y_token,
                     .scale = a->scale,
                     .dtype = a->dtype};
}

static int attention_item(const void *context, int64_t item) {
    const attention_job *job = context;
    const sb_head part = part_of(job, item);
    const int64_t next = item + job->a->threads; /* while all threads are equally fast */
    if (!job->look_ahead || next >= job->items) return job->kernels->attend(&part, NULL);
    const sb_head ahead = part_of(job, next);
    return job->kernels->attend(&part, &ahead);
}

SB_API int sb_run_attention(const sb_attention *a) {
    enum { LEAST_QUERIES = 48 /* of a part: whole groups */, CACHED_BYTES = 2 << 20 /* probably still in L2 */ };
    const int64_t heads = a->batch * a->heads;
    if (!heads || !a->queries) return SB_OK;
    attention_job job = {.a = a, .kernels = sb_kernels_for(a->dtype, a->queries), .splits = 1, .queries = a->queries};
    /* Every part of a head loads its keys and values again: only where there are too few heads for the threads. */
    if (heads % a->threads && heads < 8 * a->threads) {
        const int64_t groups = sb_ceil_div(a->queries, LEAST_QUERIES);
        job.queries = sb_ceil_div(groups, sb_min(a->threads, groups)) * LEAST_QUERIES;
        job.splits = sb_ceil_div(a->queries, job.queries);
    }
    job.items = heads * job.splits;
    job.look_ahead = heads * (a->queries + a->keys) * 2 * a->features * sb_size_of(a->dtype) > CACHED_BYTES;
    return sb_parallel(a->threads, job.items, attention_item, &job);
}

/* Self-attention between its two projections: queries, keys and values of a head or two are multiplied and attended to
 * before the next ones, so that they never pass through memory. A thread takes whole sequences, whose heads then go into
 * the out-projection from the cache too; where there are too few of them for the threads, it takes heads.
 */
#include "driver.h"
#include "parallel.h"
#include "reads.h"

#include <stdlib.h>

typedef struct {
    const sb_self_attention *a;
    const sb_kernels *kernels;
    sb_layer projection, output;
    int64_t tokens, group;     /* of a sequence */
    int64_t unit, units;       /* heads whose projections are whole blocks, and how many such */
    size_t packed_bytes, unit_bytes, heads_bytes; /* of a sequence's tokens, a unit's queries, keys and values, all heads */
    char *packed, *heads;      /* of all sequences, where threads take heads */
    const uint8_t *reads;      /* what the out-projection reads of the heads */
    int stream;                /* write y around the caches */
} self_attention_job;

/* The fewest heads whose features are whole blocks of the projection, or 0. */
static int64_t heads_a_unit(const sb_self_attention *a) {
    const int64_t block = a->projection.weight.block_out;
    if (a->features % block == 0) return 1;
    const int64_t unit = block / a->features;
    return block % a->features == 0 && a->heads % unit == 0 ? unit : 0;
}

/* Heads that no block of the out-projection reads are left out. */
static int is_read(const self_attention_job *job, int64_t first, int64_t count) {
    return sb_reads(job->reads, first * job->a->features, count * job->a->features);
}

/* Queries, keys and values of heads [first, first + unit), side by side in `room`. */
static void project(const self_attention_job *job, int64_t first, sb_packing x, char *room, char *strip, float *acc) {
    const sb_self_attention *a = job->a;
    const sb_layer *layer = &job->projection;
    const int64_t width = job->unit * a->features, rows = width / layer->weight.block_out, size = sb_size_of(layer->dtype);
    for (int64_t part = 0; part < 3; part++) {
        const int64_t column = (part * a->heads + first) * a->features;
        const sb_target t = {
            .x = x,
            .strip = strip,
            .tokens = job->tokens,
            .group = job->group,
            .bias = a->projection.bias,
            /* Outputs count from the first of all. */
            .y = (void *)((uintptr_t)room + (uintptr_t)(part * width * size) - (uintptr_t)(column * size)),
            .y_stride = 3 * width,
        };
        sb_layer_run(layer, &t, column / layer->weight.block_out, column / layer->weight.block_out + rows, acc);
    }
}

static int attend(const self_attention_job *job, int64_t first, const char *room, char *heads) {
    const sb_self_attention *a = job->a;
    const int64_t width = job->unit * a->features, size = sb_size_of(a->projection.dtype);
    for (int64_t h = 0; h < job->unit; h++) {
        if (!is_read(job, first + h, 1)) continue;
        const char *q = room + h * a->features * size;
        const sb_head head = {
            .q = q,
            .k = q + width * size,
            .v = q + 2 * width * size,
            .y = heads + (first + h) * a->features * size,
            .queries = job->tokens,
            .keys = job->tokens,
            .features = a->features,
            .q_token = 3 * width,
            .k_token = 3 * width,
            .v_token = 3 * width,
            .y_token = a->heads * a->features,
            .scale = a->scale,
            .dtype = a->projection.dtype,
        };
        const int status = job->kernels->attend(&head, NULL);
        if (status != SB_OK) return status;
    }
    return SB_OK;
}

static int sequence_item(const void *context, int64_t item) {
    const self_attention_job *job = context;
    const sb_self_attention *a = job->a;
    const int64_t start = item * job->tokens;
    const size_t heads_bytes = sb_align(job->heads_bytes);
    const size_t bytes = job->packed_bytes + job->unit_bytes + heads_bytes + SB_ACC_BYTES;
    char *packed = sb_scratch(SB_SEQUENCE, bytes + sb_normalized_bytes(&a->projection, job->group));
    if (!packed) return SB_NO_MEMORY;
    char *room = packed + job->packed_bytes, *heads = room + job->unit_bytes;
    float *acc = (float *)(heads + heads_bytes);
    const sb_packing x =
        sb_pack_tile(&job->projection, &a->projection, start, job->tokens, job->group, packed + bytes, packed);
    for (int64_t first = 0; first < a->heads; first += job->unit) {
        if (!is_read(job, first, job->unit)) continue;
        project(job, first, x, room, NULL, acc);
        const int status = attend(job, first, room, heads);
        if (status != SB_OK) return status;
    }
    sb_product own = a->output; /* of this sequence's heads */
    own.x = heads;
    own.x_stride = a->heads * a->features;
    own.tokens = job->tokens;
    sb_target t = sb_target_of(&a->output, start, job->tokens, job->group);
    t.x = sb_pack_tile(&job->output, &own, 0, job->tokens, job->group, NULL, packed);
    t.stream = job->stream;
    sb_layer_run(&job->output, &t, 0, job->output.rows, acc);
    sb_finish_stores();
    return SB_OK;
}

/* The tokens of one group of a sequence, for all heads. */
static int group_item(const void *context, int64_t item) {
    const self_attention_job *job = context;
    const sb_product *p = &job->a->projection;
    const int64_t groups = sb_ceil_div(job->tokens, job->group), sequence = item / groups;
    const int64_t token = item % groups * job->group, token_bytes = job->projection.padded_in * job->projection.packed_size;
    const size_t bytes = sb_normalized_bytes(p, job->group);
    char *room = bytes ? sb_scratch(SB_ITEM, bytes) : NULL;
    if (bytes && !room) return SB_NO_MEMORY;
    sb_pack_tile(&job->projection, p, sequence * job->tokens + token, sb_min(job->group, job->tokens - token), job->group,
                 room, job->packed + (size_t)sequence * job->packed_bytes + token * token_bytes);
    return SB_OK;
}

static int unit_item(const void *context, int64_t item) {
    const self_attention_job *job = context;
    const int64_t sequence = item / job->units, first = item % job->units * job->unit;
    if (!is_read(job, first, job->unit)) return SB_OK;
    char *room = sb_scratch(SB_SEQUENCE, job->unit_bytes + SB_ACC_BYTES + (size_t)sb_layer_strip_bytes(&job->projection));
    if (!room) return SB_NO_MEMORY;
    float *acc = (float *)(room + job->unit_bytes);
    char *strip = (char *)acc + SB_ACC_BYTES;
    const sb_packing x = sb_packing_of(&job->projection, &job->a->projection, sequence * job->tokens, job->tokens,
                                       job->group, job->packed + (size_t)sequence * job->packed_bytes);
    project(job, first, x, room, strip, acc);
    return attend(job, first, room, job->heads + (size_t)sequence * job->heads_bytes);
}

static int run_sequences(self_attention_job *job) {
    const sb_self_attention *a = job->a;
    const int status = sb_arrange(&job->projection, &job->output, a->threads);
    if (status != SB_OK) return status;
    return sb_parallel(a->threads, a->sequences, sequence_item, job);
}

static int run_heads(self_attention_job *job) {
    const sb_self_attention *a = job->a;
    job->packed = sb_scratch(SB_SHARED, (size_t)a->sequences * (job->packed_bytes + job->heads_bytes));
    if (!job->packed) return SB_NO_MEMORY;
    job->heads = job->packed + (size_t)a->sequences * job->packed_bytes;
    int status = a->sequences > 1 ? sb_arrange(&job->projection, NULL, a->threads) : SB_OK;
    if (status != SB_OK) return status;
    status = sb_parallel(a->threads, a->sequences * sb_ceil_div(job->tokens, job->group), group_item, job);
    if (status != SB_OK) return status;
    status = sb_parallel(a->threads, a->sequences * job->units, unit_item, job);
    if (status != SB_OK) return status;
    sb_product own = a->output;
    own.x = job->heads;
    own.x_stride = a->heads * a->features;
    return sb_run_product(&own);
}

static int shares_out(int64_t items, int64_t threads) { return items % threads == 0 || items >= 4 * threads; }

int sb_attends_as_one(const sb_self_attention *a, int64_t tokens, int64_t sequences, int32_t threads) {
    enum { CACHED_BYTES = 1 << 20 }; /* the tokens of a sequence, and what becomes of them, stay in the caches */
    const int64_t unit = heads_a_unit(a);
    if (!unit) return 0;
    if (!sequences || !tokens) return 1;
    const int64_t bytes = tokens / sequences * a->projection.weight.in_features * sb_size_of(a->projection.dtype);
    return bytes <= CACHED_BYTES && (shares_out(sequences, threads) || shares_out(sequences * a->heads / unit, threads));
}

SB_API int sb_run_self_attention(const sb_self_attention *a) {
    if (!sb_attends_as_one(a, a->projection.tokens, a->sequences, a->threads)) return SB_UNSUPPORTED;
    if (!a->sequences || !a->projection.tokens) return SB_OK;
    self_attention_job job = {.a = a, .unit = heads_a_unit(a)};
    const int32_t dtype = a->projection.dtype;
    const int64_t size = sb_size_of(dtype);
    job.units = a->heads / job.unit;
    job.tokens = a->projection.tokens / a->sequences;
    job.kernels = sb_kernels_for(dtype, job.tokens);
    sb_layer_init(&job.projection, &a->projection.weight, dtype, job.tokens);
    sb_layer_init(&job.output, &a->output.weight, dtype, job.tokens);
    const int64_t most = sb_min(job.projection.max_group, job.output.max_group);
    job.stream = sb_product_streams(&a->output);
    const int takes_rows = sb_layer_walks(&job.projection) || sb_layer_walks(&job.output); /* if they can */
    job.group = sb_group_of(takes_rows, job.tokens, most);
    const int64_t padded_tokens = sb_ceil_div(job.tokens, job.group) * job.group;
    const int64_t widest = sb_max(job.projection.padded_in * job.projection.packed_size,
                                  job.output.padded_in * job.output.packed_size);
    job.packed_bytes = sb_align((size_t)(padded_tokens * widest));
    job.unit_bytes = sb_align((size_t)(job.tokens * 3 * job.unit * a->features * size));
    job.heads_bytes = (size_t)(job.tokens * a->heads * a->features * size);
    uint8_t *reads = malloc((size_t)job.output.padded_in / SB_CHUNK);
    if (!reads) return SB_NO_MEMORY;
    sb_find_reads(&a->output.weight, reads);
    job.reads = reads;
    const int status = shares_out(a->sequences, a->threads) ? run_sequences(&job) : run_heads(&job);
    free(reads);
    return status;
}

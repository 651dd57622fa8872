/* Self-attention between its two projections, a sequence at a time: queries, keys and values of a head or two are
 * multiplied and attended to before the next ones, so that only x and the result pass through memory.
 */
#include "driver.h"
#include "parallel.h"

typedef struct {
    const sb_self_attention *a;
    const sb_kernels *kernels;
    sb_layer projection, output;
    int64_t tokens, group, padded_tokens; /* of a sequence; padded to whole groups */
    int64_t unit;                         /* heads whose projections are whole blocks */
    size_t packed_bytes, unit_bytes, heads_bytes;
    int stream; /* write y around the caches */
} self_attention_job;

/* The fewest heads whose features are whole blocks of the projection, or 0. */
static int64_t heads_a_unit(const sb_self_attention *a) {
    const int64_t block = a->projection.weight.block_out;
    if (a->features % block == 0) return 1;
    const int64_t unit = block / a->features;
    return block % a->features == 0 && a->heads % unit == 0 ? unit : 0;
}

/* Queries, keys and values of heads [first, first + unit), side by side in `room`. */
static void project(const self_attention_job *job, int64_t first, const char *packed, char *room, float *acc) {
    const sb_self_attention *a = job->a;
    const sb_layer *layer = &job->projection;
    const int64_t width = job->unit * a->features, rows = width / layer->weight.block_out, size = sb_size_of(layer->dtype);
    for (int64_t part = 0; part < 3; part++) {
        const int64_t column = (part * a->heads + first) * a->features;
        const sb_target t = {
            .packed = packed,
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
    const size_t bytes = job->packed_bytes + job->unit_bytes + job->heads_bytes + SB_ACC_BYTES;
    char *packed = sb_scratch(SB_SEQUENCE, bytes + sb_normalized_bytes(&a->projection, job->group));
    if (!packed) return SB_NO_MEMORY;
    char *room = packed + job->packed_bytes, *heads = room + job->unit_bytes;
    float *acc = (float *)(heads + job->heads_bytes);
    sb_pack_tile(&job->projection, &a->projection, start, job->tokens, job->group, packed + bytes, packed);
    for (int64_t first = 0; first < a->heads; first += job->unit) {
        project(job, first, packed, room, acc);
        const int status = attend(job, first, room, heads);
        if (status != SB_OK) return status;
    }
    sb_product own = a->output; /* of this sequence's heads */
    own.x = heads;
    own.x_stride = a->heads * a->features;
    sb_pack_tile(&job->output, &own, 0, job->tokens, job->group, NULL, packed);
    sb_target t = sb_target_of(&a->output, start, job->tokens, job->group);
    t.packed = packed;
    t.stream = job->stream;
    sb_layer_run(&job->output, &t, 0, job->output.rows, acc);
    sb_finish_stores();
    return SB_OK;
}

SB_API int sb_run_self_attention(const sb_self_attention *a) {
    self_attention_job job = {.a = a, .unit = heads_a_unit(a)};
    if (!job.unit) return SB_UNSUPPORTED;
    if (!a->sequences || !a->projection.tokens) return SB_OK;
    const int32_t dtype = a->projection.dtype;
    const int64_t size = sb_size_of(dtype);
    job.tokens = a->projection.tokens / a->sequences;
    job.kernels = sb_kernels_for(dtype, job.tokens);
    sb_layer_init(&job.projection, &a->projection.weight, dtype, job.tokens);
    sb_layer_init(&job.output, &a->output.weight, dtype, job.tokens);
    const int64_t most = sb_min(job.projection.max_group, job.output.max_group);
    job.stream = sb_product_streams(&a->output);
    job.group = sb_ceil_div(job.tokens, sb_ceil_div(job.tokens, most));
    job.padded_tokens = sb_ceil_div(job.tokens, job.group) * job.group;
    const int64_t widest = sb_max(job.projection.padded_in * job.projection.packed_size,
                                  job.output.padded_in * job.output.packed_size);
    job.packed_bytes = sb_align((size_t)(job.padded_tokens * widest));
    job.unit_bytes = sb_align((size_t)(job.tokens * 3 * job.unit * a->features * size));
    job.heads_bytes = sb_align((size_t)(job.tokens * a->heads * a->features * size));
    const int status = sb_arrange(&job.projection, &job.output, INT64_MAX, a->threads);
    if (status != SB_OK) return status;
    return sb_parallel(a->threads, a->sequences, sequence_item, &job);
}

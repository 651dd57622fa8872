/* The gradient of the values: dvalues[b] = dyᵀ x at the living blocks.
 *
 * Both operands are first laid out by block, [block row or column][token][features of the block] in float32, or in the
 * pairs that the kernels' own bfloat16 products take, so that every block reads two contiguous runs. Tokens are walked
 * in tiles that keep a block row's operands in L2; a block's sums stay with one thread and one order of tokens, so the
 * result does not depend on the number of threads.
 */
#include "layer.h"
#include "parallel.h"

#include <string.h>

enum { TOKENS = 128, PAIRED_TOKENS = 32, PAIRED_TILE = 1024 };

typedef struct {
    const sb_sampled *sampled;
    const sb_kernels *kernels;
    int64_t rows, columns, tokens; /* tokens: padded, where they are paired */
    int paired;
    char *grad, *x;  /* by block */
    int32_t *row_of; /* block row of every entry */
} sampled_job;

/* One tile of tokens, laid out by block; what lies past the matrix's edge becomes zero. */
static void lay_out(const sampled_job *job, const void *source, int64_t stride, int64_t features, int64_t width,
                    int64_t start, int64_t stop, float *target) {
    const sb_sampled *s = job->sampled;
    const int64_t blocks = sb_ceil_div(features, width), size = sb_size_of(s->dtype);
    for (int64_t t = start; t < stop; t++)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t valid = sb_min(width, features - b * width);
            float *out = target + (b * s->tokens + t) * width;
            job->kernels->widen(s->dtype, (const char *)source + (t * stride + b * width) * size, valid, out);
            memset(out + valid, 0, (size_t)(width - valid) * sizeof *out);
        }
}

/* The same in pairs: features by tokens for the left operand, pairs of tokens by features for the right one. */
static int lay_out_pairs(const sampled_job *job, const uint16_t *source, int64_t stride, int64_t features,
                         int64_t width, int64_t start, int64_t stop, int turned, uint16_t *target) {
    const int64_t blocks = sb_ceil_div(features, width);
    uint16_t *padded = sb_scratch(SB_ITEM, (size_t)(PAIRED_TOKENS * width) * sizeof *padded);
    if (!padded) return SB_NO_MEMORY;
    for (int64_t t = start; t < stop; t += PAIRED_TOKENS)
        for (int64_t b = 0; b < blocks; b++) {
            const uint16_t *in = source + t * stride + b * width;
            uint16_t *out = target + (b * job->tokens + t) * width;
            const int64_t tokens = sb_min(PAIRED_TOKENS, job->sampled->tokens - t);
            const int64_t valid = sb_min(width, features - b * width);
            const int whole = tokens == PAIRED_TOKENS && valid == width;
            if (!whole) {
                memset(padded, 0, (size_t)(PAIRED_TOKENS * width) * sizeof *padded);
                for (int64_t i = 0; i < tokens; i++)
                    memcpy(padded + i * width, in + i * stride, (size_t)valid * sizeof *padded);
                in = padded;
            }
            if (turned) job->kernels->transpose(2, in, whole ? stride : width, PAIRED_TOKENS, width, out);
            else job->kernels->pair(in, 1, whole ? stride : width, width, PAIRED_TOKENS, out);
        }
    return SB_OK;
}

static int lay_out_item(const void *context, int64_t item) {
    const sampled_job *job = context;
    const sb_sampled *s = job->sampled;
    const sb_weight *w = &s->weight;
    const int64_t start = item * TOKENS, stop = sb_min(start + TOKENS, s->tokens);
    if (job->paired) {
        const int status = lay_out_pairs(job, s->grad, s->grad_stride, w->out_features, w->block_out, start, stop, 1,
                                         (uint16_t *)job->grad);
        if (status != SB_OK) return status;
        return lay_out_pairs(job, s->x, s->x_stride, w->in_features, w->block_in, start, stop, 0, (uint16_t *)job->x);
    }
    lay_out(job, s->grad, s->grad_stride, w->out_features, w->block_out, start, stop, (float *)job->grad);
    lay_out(job, s->x, s->x_stride, w->in_features, w->block_in, start, stop, (float *)job->x);
    return SB_OK;
}

enum { BLOCKS_AN_ITEM = 8 };

/* out += dyᵀ x for block b and some tokens. */
static void add_block(const sampled_job *job, int64_t b, int64_t start, int64_t tokens, float *out) {
    const sb_weight *w = &job->sampled->weight;
    const int64_t height = w->block_out, width = w->block_in;
    const int64_t dy = (job->row_of[b] * job->tokens + start) * height, x = (w->cols[b] * job->tokens + start) * width;
    if (job->paired) {
        job->kernels->outer_pairs((uint16_t *)job->grad + dy, (uint16_t *)job->x + x, out, tokens, height, width);
        return;
    }
    sb_outer o = {
        .a = (float *)job->grad + dy,
        .b = (float *)job->x + x,
        .out = out,
        .tokens = tokens,
        .a_stride = height,
        .b_stride = width,
        .out_stride = width,
        .columns = width,
    };
    for (int64_t i = 0; i < height; i += 8, o.a += 8, o.out += 8 * width) job->kernels->outer(&o);
}

/* A run of blocks: their sums over all tokens, in float32, then in the dtype of the values. */
static int sampled_item(const void *context, int64_t item) {
    const sampled_job *job = context;
    const sb_sampled *s = job->sampled;
    const sb_weight *w = &s->weight;
    const int64_t first = item * BLOCKS_AN_ITEM, last = sb_min(first + BLOCKS_AN_ITEM, w->crow[job->rows]);
    const int64_t area = w->block_out * w->block_in;
    float *sums = sb_scratch(SB_ITEM, (size_t)(BLOCKS_AN_ITEM * area) * sizeof *sums);
    if (!sums) return SB_NO_MEMORY;
    memset(sums, 0, (size_t)((last - first) * area) * sizeof *sums);
    const int64_t tile = job->paired ? PAIRED_TILE : TOKENS;
    if (job->paired) job->kernels->prepare(PAIRED_TOKENS, PAIRED_TOKENS);
    for (int64_t start = 0; start < job->tokens; start += tile)
        for (int64_t b = first; b < last; b++)
            add_block(job, b, start, sb_min(tile, job->tokens - start), sums + (b - first) * area);
    if (job->paired) job->kernels->finish();
    job->kernels->narrow(s->dtype, sums, (last - first) * area,
                         (char *)w->values + first * area * sb_size_of(s->dtype));
    return SB_OK;
}

SB_API int sb_run_sampled(const sb_sampled *s) {
    const sb_weight *w = &s->weight;
    sampled_job job = {.sampled = s, .kernels = sb_kernels_for(s->dtype, s->tokens), .tokens = s->tokens};
    job.rows = sb_ceil_div(w->out_features, w->block_out);
    job.columns = sb_ceil_div(w->in_features, w->block_in);
    job.paired = job.kernels->outer_pairs && w->block_out % 16 == 0 && w->block_in % 16 == 0;
    if (job.paired) job.tokens = sb_ceil_div(s->tokens, PAIRED_TOKENS) * PAIRED_TOKENS;
    const int64_t blocks = w->crow[job.rows], size = job.paired ? 2 : 4;
    if (!blocks) return SB_OK;
    const size_t grad_bytes = sb_align((size_t)(job.rows * job.tokens * w->block_out * size));
    const size_t x_bytes = sb_align((size_t)(job.columns * job.tokens * w->block_in * size) + 64);
    char *memory = sb_scratch(SB_CALL, grad_bytes + x_bytes + (size_t)blocks * sizeof *job.row_of);
    if (!memory) return SB_NO_MEMORY;
    job.grad = memory;
    job.x = memory + grad_bytes;
    job.row_of = (int32_t *)(job.x + x_bytes);
    for (int64_t r = 0; r < job.rows; r++)
        for (int32_t b = w->crow[r]; b < w->crow[r + 1]; b++) job.row_of[b] = (int32_t)r;
    const int status = sb_parallel(s->threads, sb_ceil_div(s->tokens, TOKENS), lay_out_item, &job);
    if (status != SB_OK) return status;
    return sb_parallel(s->threads, sb_ceil_div(blocks, BLOCKS_AN_ITEM), sampled_item, &job);
}

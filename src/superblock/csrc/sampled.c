/* The gradient of the values: dvalues[b] = dyᵀ x at the living blocks.
 *
 * Both operands are first laid out by block, [block row or column][token][features of the block] in float32, so that
 * every block reads two contiguous runs. Tokens are walked in tiles that keep a block row's operands in L2; a block's
 * sums stay with one thread and one order of tokens, so the result does not depend on the number of threads.
 */
#include "layer.h"
#include "parallel.h"

#include <stdlib.h>
#include <string.h>

enum { TOKENS = 128 };

typedef struct {
    const sb_sampled *sampled;
    const sb_kernels *kernels;
    int64_t rows, columns;
    float *grad, *x; /* by block */
    const int32_t *row_of; /* block row of every entry */
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

static int lay_out_item(const void *context, int64_t item) {
    const sampled_job *job = context;
    const sb_sampled *s = job->sampled;
    const int64_t start = item * TOKENS, stop = sb_min(start + TOKENS, s->tokens);
    lay_out(job, s->grad, s->grad_stride, s->weight.out_features, s->weight.block_out, start, stop, job->grad);
    lay_out(job, s->x, s->x_stride, s->weight.in_features, s->weight.block_in, start, stop, job->x);
    return SB_OK;
}

enum { BLOCKS_AN_ITEM = 8 };

/* A run of blocks: their sums over all tokens, in float32, then in the dtype of the values. */
static int sampled_item(const void *context, int64_t item) {
    const sampled_job *job = context;
    const sb_sampled *s = job->sampled;
    const sb_weight *w = &s->weight;
    const int64_t first = item * BLOCKS_AN_ITEM, last = sb_min(first + BLOCKS_AN_ITEM, w->crow[job->rows]);
    const int64_t area = w->block_out * w->block_in;
    float *sums = sb_scratch((size_t)(BLOCKS_AN_ITEM * area) * sizeof *sums);
    if (!sums) return SB_NO_MEMORY;
    memset(sums, 0, (size_t)((last - first) * area) * sizeof *sums);
    const int64_t height = w->block_out, width = w->block_in;
    for (int64_t start = 0; start < s->tokens; start += TOKENS)
        for (int64_t b = first; b < last; b++) {
            const float *dy = job->grad + (job->row_of[b] * s->tokens + start) * w->block_out;
            const float *x = job->x + (w->cols[b] * s->tokens + start) * w->block_in;
            sb_outer o = {
                .a = dy,
                .b = x,
                .out = sums + (b - first) * area,
                .tokens = sb_min(TOKENS, s->tokens - start),
                .a_stride = height,
                .b_stride = width,
                .out_stride = width,
                .columns = width,
            };
            for (int64_t i = 0; i < height; i += 8, o.a += 8, o.out += 8 * width) job->kernels->outer(&o);
        }
    job->kernels->narrow(s->dtype, sums, (last - first) * area,
                         (char *)w->values + first * area * sb_size_of(s->dtype));
    return SB_OK;
}

SB_API int sb_run_sampled(const sb_sampled *s) {
    const sb_weight *w = &s->weight;
    sampled_job job = {.sampled = s, .kernels = sb_current()};
    job.rows = sb_ceil_div(w->out_features, w->block_out);
    job.columns = sb_ceil_div(w->in_features, w->block_in);
    const int64_t blocks = w->crow[job.rows];
    if (!blocks) return SB_OK;
    const int64_t grads = job.rows * s->tokens * w->block_out, xs = job.columns * s->tokens * w->block_in;
    int32_t *row_of = malloc((size_t)blocks * sizeof *row_of);
    float *laid_out = NULL;
    int status = SB_NO_MEMORY;
    if (row_of && !posix_memalign((void **)&laid_out, 64, (size_t)(grads + xs + 16) * sizeof *laid_out)) {
        for (int64_t r = 0; r < job.rows; r++)
            for (int32_t b = w->crow[r]; b < w->crow[r + 1]; b++) row_of[b] = (int32_t)r;
        job.row_of = row_of;
        job.grad = laid_out;
        job.x = laid_out + grads;
        status = sb_parallel(s->threads, sb_ceil_div(s->tokens, TOKENS), lay_out_item, &job);
        if (status == SB_OK)
            status = sb_parallel(s->threads, sb_ceil_div(blocks, BLOCKS_AN_ITEM), sampled_item, &job);
    }
    free(laid_out);
    free(row_of);
    return status;
}

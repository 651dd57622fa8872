/* The gradients of an activation and of the bias before it, in one pass: dz = dy act'(z), dbias = the sum of dz.
 *
 * Every share of tokens has its own sums in float32, and these are added in the order of the tokens, so that the result
 * does not depend on the number of threads.
 */
#include "layer.h"
#include "pages.h"
#include "parallel.h"

#include <string.h>

enum { TOKENS = 32, LANES = 16 };

typedef struct {
    const sb_gradient *gradient;
    const sb_kernels *kernels;
    float *sums; /* [share][width] */
    int64_t width;
    int stream;
} gradient_job;

static int gradient_item(const void *context, int64_t item) {
    const gradient_job *job = context;
    const int64_t start = item * TOKENS, stop = sb_min(start + TOKENS, job->gradient->tokens);
    float *sums = job->sums + item * job->width;
    memset(sums, 0, (size_t)job->width * sizeof *sums);
    job->kernels->gradient(job->gradient, start, stop, job->stream, sums);
    sb_finish_stores();
    return SB_OK;
}

SB_API int sb_run_activation_gradient(const sb_gradient *g) {
    const int64_t shares = sb_ceil_div(g->tokens, TOKENS), width = sb_ceil_div(g->features, LANES) * LANES;
    float *total = sb_scratch(SB_CALL, (size_t)((1 + shares) * width) * sizeof *total);
    if (!total) return SB_NO_MEMORY;
    const int64_t row = g->features * sb_size_of(g->dtype);
    const int stream = g->dz && sb_streams(g->dz, g->tokens * row) && row % 64 == 0 && (uintptr_t)g->dz % 64 == 0;
    const gradient_job job = {g, sb_current(), total + width, width, stream};
    const int status = sb_parallel(g->threads, shares, gradient_item, &job);
    if (status != SB_OK) return status;
    memset(total, 0, (size_t)width * sizeof *total);
    for (int64_t share = 0; share < shares; share++)
        for (int64_t n = 0; n < width; n++) total[n] += job.sums[share * width + n];
    job.kernels->narrow(g->dtype, total, g->features, g->dbias);
    return SB_OK;
}

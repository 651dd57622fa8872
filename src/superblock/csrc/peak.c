/* The machine's ceiling, for benchmarks. */
#include "kernels.h"
#include "parallel.h"

typedef struct {
    int64_t iterations;
    int32_t dtype;
    double flops; /* of one thread: all do the same */
} peak_job;

static int peak_item(const void *context, int64_t item) {
    const peak_job *job = context;
    const double flops = sb_kernels_for(job->dtype, INT64_MAX)->peak(job->dtype, job->iterations);
    if (item == 0) ((peak_job *)context)->flops = flops;
    return SB_OK;
}

SB_API double sb_run_peak(int32_t dtype, int64_t iterations, int32_t threads) {
    peak_job job = {.iterations = iterations, .dtype = dtype};
    sb_parallel(threads, threads, peak_item, &job);
    return job.flops * threads;
}

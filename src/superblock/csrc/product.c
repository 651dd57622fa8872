/* A product: tiles of tokens, or parts of the block rows, handed out to the threads. */
#include "driver.h"
#include "parallel.h"
#include "reads.h"
#include "windows.h"

#include <stdlib.h>

/* The fewest block rows whose outputs are whole strips. */
static int64_t rows_a_strip(int64_t block_out) {
    int64_t rows = 1;
    while (rows * block_out % SB_MAX_PANEL) rows *= 2;
    return rows;
}

/* The first block row of part `i` of `parts`, so that the parts hold about as many blocks, and strips stay whole. */
static int64_t split_row(const sb_layer *layer, int64_t i, int64_t parts) {
    const int32_t *crow = layer->weight.crow;
    const int64_t rows = layer->rows;
    if (i >= parts) return rows;
    /* Rows count as one block more: an empty row still costs its epilogue. */
    const int64_t goal = (crow[rows] - crow[0] + rows) * i / parts;
    int64_t low = 0, high = rows;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (crow[middle] - crow[0] + middle < goal) low = middle + 1;
        else high = middle;
    }
    const int64_t strip = rows_a_strip(layer->weight.block_out);
    return low / strip * strip;
}

typedef struct {
    const sb_product *product;
    sb_layer layer;
    sb_partition partition;
    sb_image_rows image_rows; /* of a convolution */
    int by_group;
    const sb_layer *following; /* as in sb_target */
    int64_t first_feature;     /* of those that are multiplied */
    int stream, unfinished;    /* write y around the caches; y will be read again */
} product_job;

/* All block rows of a group before the next group, whose lines are fetched meanwhile. */
static void run_by_group(const sb_layer *layer, const sb_target *tile, int64_t first, int64_t last, float *acc) {
    static const sb_start beginning = {0};
    const int64_t size = sb_size_of(layer->dtype), group = tile->group, out = layer->weight.out_features;
    const int whole = tile->residual && tile->y_stride == out && tile->residual_stride == out;
    for (int64_t g = 0; g < sb_count_groups(tile); g++) {
        sb_target t = *tile;
        const int64_t token = sb_first_token(tile, g), y = token * t.y_stride * size, left = t.tokens - token;
        t.tokens = sb_min(group, left);
        t.x.features = sb_group_features(layer, tile, g);
        t.x.token_stride = sb_group_stride(tile, g);
        t.x.last = NULL;
        if (t.x.starts) t.x.starts = &beginning, t.x.groups = 1;
        t.y = (char *)t.y + y;
        t.preactivation = t.preactivation ? (char *)t.preactivation + y : NULL;
        if (t.residual) t.residual = (const char *)t.residual + token * t.residual_stride * size;
        if (whole && left >= 2 * group) {
            t.ahead_residual = (const char *)t.residual + group * out * size;
            t.ahead_y = (const char *)t.y + group * out * size;
        }
        sb_layer_run(layer, &t, first, last, acc);
    }
}

static int product_item(const void *context, int64_t item) {
    const product_job *job = context;
    const sb_partition *cut = &job->partition;
    const sb_layer *layer = &job->layer;
    const int64_t start = item / cut->splits * cut->tile, part = item % cut->splits;
    const int64_t tokens = sb_min(cut->tile, job->product->tokens - start);
    const sb_image_rows *rows = job->image_rows.positions ? &job->image_rows : NULL;
    const int64_t features = rows ? rows->features : cut->room * layer->padded_in;
    const size_t packed_bytes = sb_align((size_t)(features * layer->packed_size));
    const size_t starts_bytes = rows ? sb_align((size_t)rows->starts * sizeof(sb_start)) : 0;
    const size_t bytes = packed_bytes + SB_ACC_BYTES + (size_t)sb_layer_strip_bytes(layer) + starts_bytes;
    char *scratch = sb_scratch(SB_ITEM, bytes + sb_normalized_bytes(job->product, cut->group));
    if (!scratch) return SB_NO_MEMORY;
    sb_target target = sb_target_of(job->product, start, tokens, cut->group);
    if (rows) {
        sb_start *starts = (sb_start *)(scratch + bytes - starts_bytes);
        sb_pack_image_rows(layer, job->product, rows, start, starts, scratch, &target);
    } else {
        target.x = sb_pack_tile(layer, job->product, start, tokens, cut->group, scratch + bytes, scratch);
        /* Columns count from the first feature of all, of which some may not be packed. */
        const int64_t before = job->first_feature * cut->group * layer->packed_size;
        target.x.features = (const void *)((uintptr_t)target.x.features - (uintptr_t)before);
    }
    target.following = job->following;
    target.strip = scratch + packed_bytes + SB_ACC_BYTES;
    target.stream = job->stream && !job->unfinished;
    const int64_t first = split_row(layer, part, cut->splits), last = split_row(layer, part + 1, cut->splits);
    float *acc = (float *)(scratch + packed_bytes);
    if (job->by_group) run_by_group(layer, &target, first, last, acc);
    else sb_layer_run(layer, &target, first, last, acc);
    sb_finish_stores();
    return SB_OK;
}

/* Multiply-adds that are worth a thread of their own. A second one takes 2 us to begin and end (768 -> 768, 1 token,
 * float32, 90 %: 2.6 us on one thread, 4.6 on two; 8 tokens: 7.7 and 6.6). AMX does twice as much in that time (bfloat16, 32
 * tokens: 17 and 21; at 80 %, 29 and 20). A build for tests may set the first to 1. */
#ifndef SB_WORTH_A_THREAD
#define SB_WORTH_A_THREAD (1 << 18)
#endif
enum { PAIRED = 2 };

static int32_t useful_threads(const sb_layer *layer, int64_t tokens, int32_t threads) {
    const int64_t values = sb_layer_bytes(layer) / sb_size_of(layer->dtype);
    const int64_t least = (int64_t)SB_WORTH_A_THREAD * (layer->kernels->pair ? PAIRED : 1);
    /* One token waits for the weights, so that it takes as long as two. */
    return (int32_t)sb_min(threads, sb_max(values * sb_max(tokens, 2) / least, 1));
}

/* Threads that share out few tokens lay out all values each, those that share out the block rows pack all tokens each:
 * whichever is less (768 -> 3072, 197 tokens, bfloat16, 80 %: 0.22 and 0.14 ms, laid out a strip at a time), as long as
 * these stay in L2 (1576 tokens, 10 %: 2.5 and 4.3 ms). */
static void cut_tiles(product_job *job, int32_t threads) {
    const sb_layer *layer = &job->layer;
    const int64_t tokens = job->product->tokens, bytes = layer->padded_in * layer->packed_size;
    const int64_t weight_bytes = sb_layer_bytes(layer);
    sb_partition *p = &job->partition;
    /* Results wider than the tokens had better be written group by group (256 -> 1024, 3136 tokens, bfloat16, blocks of 16 at
     * 80 %: 0.79 ms, 0.91 strip by strip). */
    const int64_t widest = sb_max(layer->weight.out_features * layer->packed_size, bytes);
    const int64_t tile = sb_tile_bytes(layer, weight_bytes, sb_ceil_div(tokens, threads) * widest);
    *p = sb_cut(sb_takes_rows(layer, job->product), tokens, layer->max_group, bytes, tile, layer->rows, threads);
    if (sb_arranges_strips(layer, p->tiles, threads) && p->tiles > 1 && tokens * bytes < sb_min(weight_bytes, tile))
        *p = (sb_partition){.group = p->group,
                            .tile = tokens,
                            .tiles = 1,
                            .room = sb_ceil_div(tokens, p->group) * p->group,
                            .splits = sb_min(threads, layer->rows)};
}

static int run_tiles(product_job *job, int32_t threads) {
    int status = SB_OK;
    if (!job->image_rows.positions) cut_tiles(job, threads);
    if (sb_arranges_strips(&job->layer, job->partition.tiles, threads)) job->by_group = 0; /* or they come with every group */
    else status = sb_arrange(&job->layer, NULL, threads);
    if (status != SB_OK) return status;
    return sb_parallel(threads, job->partition.tiles * job->partition.splits, product_item, job);
}

/* The weights of a panel are read for every group of tokens, from L2 as long as there is room for them. Rows of more
 * living features than this are multiplied in slabs of columns, one after the other, each adding to y in float32 (4096 ->
 * 4096, 1576 tokens: at 10 % 442 ms in one slab, 290 in two, 278 in four; at 50 % 166 and 153; at 80 %, where 819 live,
 * 63 and 68; 10 %, slabs of at most 1400 and of 1100: 193 and 182 in blocks of 16, 161 and 153 in blocks of 64; but at 70 %,
 * where 1229 live, 53 in one slab and 56 in two). */
enum { ONE_SLAB = 1400, SLAB_FEATURES = 1100, SLAB_TOKENS = 64 };

static int64_t count_slabs(const sb_product *p, const sb_layer *layer) {
    const int more = p->window.kernel_h || p->norm.enabled || p->activation != SB_NONE || p->preactivation;
    if (more || p->dtype != SB_FLOAT32 || p->tokens < SLAB_TOKENS) return 1;
    const int64_t living = sb_layer_bytes(layer) / (int64_t)sizeof(float) / (layer->rows * p->weight.block_out);
    if (living <= ONE_SLAB) return 1;
    return sb_min(sb_ceil_div(living, SLAB_FEATURES), layer->padded_in / p->weight.block_in);
}

/* The first entry of every block row at `column` or beyond; none before `starts` is. */
static void find_column(const sb_layer *layer, int64_t column, const int32_t *starts, int32_t *found) {
    for (int64_t row = 0; row < layer->rows; row++) {
        int32_t entry = starts[row];
        while (entry < layer->weight.crow[row + 1] && layer->weight.cols[entry] < column) entry++;
        found[row] = entry;
    }
}

static int run_slabs(product_job *job, int64_t slabs, int32_t threads) {
    const sb_product whole = *job->product;
    sb_product part = whole;
    sb_layer *layer = &job->layer;
    const int64_t width = layer->weight.block_in, columns = layer->padded_in / width, rows = layer->rows;
    int32_t *bounds = malloc((size_t)(2 * rows) * sizeof *bounds); /* of two slabs in turn */
    if (!bounds) return SB_NO_MEMORY;
    const int32_t *starts = layer->weight.crow;
    int status = SB_OK;
    job->product = &part;
    for (int64_t slab = 0; slab < slabs && status == SB_OK; slab++) {
        const int64_t first = columns * slab / slabs, last = columns * (slab + 1) / slabs;
        int32_t *ends = bounds + slab % 2 * rows;
        find_column(layer, last, starts, ends);
        layer->starts = starts;
        layer->ends = starts = ends;
        layer->padded_in = (last - first) * width;
        job->first_feature = first * width;
        job->unfinished = slab + 1 < slabs;
        part.weight.in_features = whole.weight.in_features - job->first_feature;
        part.x = (const float *)whole.x + job->first_feature;
        if (slab) {
            part.bias = NULL;
            part.residual = whole.y;
            part.residual_stride = whole.y_stride;
        }
        status = run_tiles(job, threads);
    }
    free(bounds);
    return status;
}

/* A residual and y are passed through a panel's width at a time: while the weights stay in L2, going group by group keeps
 * those lines near (768 -> 3072, 90 %, 3152 tokens, float32, with a residual: 24 -> 17 ms), and fetching them in the
 * order in which they lie another part (128 -> 512 channels, 28 x 28, 16 images: 11.5 -> 8.4 ms). AMX waits for the
 * lines of any y that is not streamed (768 -> 3072, 90 %, 6304 tokens: 9.9 -> 7.7 ms). */
SB_API int sb_run_product(const sb_product *p) {
    if (!p->tokens) return SB_OK;
    product_job job = {.product = p};
    sb_layer_init(&job.layer, &p->weight, p->dtype, p->tokens);
    const int32_t threads = useful_threads(&job.layer, p->tokens, p->threads);
    sb_prefer_huge_results(p);
    const int64_t weight_bytes = sb_layer_bytes(&job.layer);
    const int64_t written = p->tokens * p->y_stride * sb_size_of(p->dtype);
    job.stream = sb_product_streams(p);
    job.by_group = weight_bytes <= SB_RESIDENT_BYTES &&
                   (p->residual || (job.layer.kernels->run && !job.stream && written > SB_REUSED_BYTES));
    job.following = weight_bytes > SB_RESIDENT_BYTES ? &job.layer : NULL;
    if (p->window.kernel_h) {
        const int status = sb_cut_image_rows(&job.layer, p, threads, &job.image_rows, &job.partition);
        if (status != SB_OK) return status;
        if (job.image_rows.positions) job.layer.weight.cols = job.image_rows.cols;
    }
    const int64_t slabs = count_slabs(p, &job.layer);
    uint8_t *reads = NULL;
    if (slabs == 1 && !p->window.kernel_h && p->tokens > SB_MAX_GROUP && (reads = malloc((size_t)job.layer.padded_in / SB_CHUNK)))
        sb_find_reads(&p->weight, reads);
    job.layer.reads = reads;
    const int status = slabs > 1 ? run_slabs(&job, slabs, threads) : run_tiles(&job, threads);
    free(job.image_rows.cols);
    free(reads);
    return status;
}

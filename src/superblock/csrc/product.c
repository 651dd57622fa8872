/* The drivers of the forward products: tokens are cut into tiles that fit the L2 cache, tiles into groups. */
#include "layer.h"
#include "parallel.h"

#include <stdatomic.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

/* The packed tokens of a tile stay in L2 while weights and results stream past. Weights that would fit there too leave
 * it to be shared (3072 x 768 at 90 %, bfloat16, 2 MB of L2: 1.2 -> 1.0 ms); larger ones are read again for every tile,
 * so that larger tiles read them less often. */
static int64_t tile_bytes(int64_t weight_bytes) {
    static _Atomic int64_t known; /* asking takes microseconds in a virtual machine */
    int64_t l2 = atomic_load(&known);
#ifdef _SC_LEVEL2_CACHE_SIZE
    if (!l2) l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (l2 <= 0) l2 = 1 << 20;
    atomic_store(&known, l2);
    return weight_bytes < l2 / 2 ? l2 / 5 : l2 * 2 / 5;
}

typedef struct {
    int64_t group, tile, tiles; /* tokens a group, tokens a tile, tiles */
    int64_t splits;             /* parts that the block rows are cut into */
} partition;

/* Ask for fresh pages in pieces of 2 MB: faults of 4 KB cost more than the product (64 -> 256 channels: 26 -> 12 ms). */
static void prefer_huge_pages(const sb_product *p) {
#if defined(MADV_HUGEPAGE)
    enum { HUGE = 2 << 20 };
    const int64_t bytes = ((p->tokens - 1) * p->y_stride + p->weight.out_features) * sb_size_of(p->dtype);
    const uintptr_t y = (uintptr_t)p->y, start = (y + HUGE - 1) / HUGE * HUGE, end = (y + (size_t)bytes) / HUGE * HUGE;
    if (bytes > SB_REUSED_BYTES) madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)p;
#endif
}

/* Groups of equal size, an equal number for every thread; when tokens are too few for that, the block rows are shared
 * out too. `bytes` is what a token takes of the tile. */
static partition cut(int64_t tokens, int64_t max_group, int64_t bytes, int64_t weight_bytes, int64_t rows,
                     int32_t threads) {
    partition p = {.splits = 1};
    int64_t groups = sb_ceil_div(tokens, max_group);
    if (groups >= threads) groups = sb_ceil_div(groups, threads) * threads;
    p.group = sb_ceil_div(tokens, groups);
    groups = sb_ceil_div(tokens, p.group);
    int64_t a_tile = sb_min(sb_max(tile_bytes(weight_bytes) / (p.group * bytes), 1), sb_max(groups / threads, 1));
    p.tile = a_tile * p.group;
    p.tiles = sb_ceil_div(tokens, p.tile);
    if (p.tiles < 2 * threads && p.tiles % threads) p.splits = sb_min(4 * threads, rows);
    return p;
}

/* The first block row of part `i` of `parts`, so that the parts hold about as many blocks. */
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
    return low;
}

/* The packed features of one kernel position for one group of tokens. */
static void pack_group(const sb_layer *layer, const sb_product *p, int64_t token, int64_t count, int64_t group,
                       char *packed) {
    const sb_window *w = &p->window;
    const int64_t size = sb_size_of(p->dtype);
    const void *rows[SB_MAX_GROUP];
    if (!w->kernel_h) {
        for (int64_t m = 0; m < group; m++)
            rows[m] = m < count ? (const char *)p->x + (token + m) * p->x_stride * size : NULL;
        layer->kernels->pack(p->dtype, rows, group, p->weight.in_features, layer->padded_in,
                             layer->chunk, packed);
        return;
    }
    const int64_t padded = layer->padded_in / (w->kernel_h * w->kernel_w);
    const char *images[SB_MAX_GROUP];
    int64_t tops[SB_MAX_GROUP], lefts[SB_MAX_GROUP]; /* of each token's window; divided out once, not by position */
    for (int64_t m = 0; m < count; m++) {
        const int64_t pixel = token + m, row = pixel / w->out_width;
        images[m] = (const char *)p->x + row / w->out_height * w->image_stride * size;
        tops[m] = row % w->out_height * w->stride_h - w->padding_h;
        lefts[m] = pixel % w->out_width * w->stride_w - w->padding_w;
    }
    for (int64_t m = count; m < group; m++) rows[m] = NULL;
    for (int64_t i = 0; i < w->kernel_h; i++)
        for (int64_t j = 0; j < w->kernel_w; j++, packed += padded * group * layer->packed_size) {
            for (int64_t m = 0; m < count; m++) {
                const int64_t row = tops[m] + i * w->dilation_h, column = lefts[m] + j * w->dilation_w;
                const int inside = row >= 0 && row < w->height && column >= 0 && column < w->width;
                rows[m] = inside ? images[m] + (row * w->row_stride + column * w->pixel_stride) * size : NULL;
            }
            layer->kernels->pack(p->dtype, rows, group, w->channels, padded, layer->chunk, packed);
        }
}

static void pack_tile(const sb_layer *layer, const sb_product *p, int64_t start, int64_t tokens, int64_t group,
                      char *packed) {
    for (int64_t token = 0; token < tokens; token += group)
        pack_group(layer, p, start + token, sb_min(group, tokens - token), group,
                   packed + token * layer->padded_in * layer->packed_size);
}

static sb_target target_of(const sb_product *p, int64_t start, int64_t tokens, int64_t group) {
    const int64_t size = sb_size_of(p->dtype), written = p->tokens * p->y_stride * size;
    return (sb_target){
        .tokens = tokens,
        .group = group,
        .bias = p->bias,
        .residual = p->residual ? (const char *)p->residual + start * p->residual_stride * size : NULL,
        .y = (char *)p->y + start * p->y_stride * size,
        .preactivation = p->preactivation ? (char *)p->preactivation + start * p->y_stride * size : NULL,
        .y_stride = p->y_stride,
        .residual_stride = p->residual_stride,
        .activation = p->activation,
        .residual_first = p->residual_first,
        .stream = sb_streamed(written),
    };
}

/* The weights of one layer or two as tiles want them, in one buffer. */
static int arrange(sb_layer *first, sb_layer *second, int32_t threads) {
    const size_t bytes = sb_align(first->arranged_bytes), all = bytes + (second ? second->arranged_bytes : 0);
    char *memory = all ? sb_scratch(SB_CALL, all) : NULL;
    if (all && !memory) return SB_NO_MEMORY;
    const int status = sb_layer_arrange(first, memory, threads);
    return status == SB_OK && second ? sb_layer_arrange(second, memory + bytes, threads) : status;
}

typedef struct {
    const sb_product *product;
    sb_layer layer;
    partition partition;
    int by_group;
} product_job;

/* All block rows of a group before the next group, whose lines are fetched meanwhile. */
static void run_by_group(const sb_layer *layer, const sb_target *tile, int64_t first, int64_t last, float *acc) {
    const int64_t size = sb_size_of(layer->dtype), group = tile->group, out = layer->weight.out_features;
    const int whole = tile->y_stride == out && tile->residual_stride == out;
    for (int64_t token = 0; token < tile->tokens; token += group) {
        sb_target t = *tile;
        const int64_t y = token * t.y_stride * size, left = t.tokens - token;
        t.tokens = sb_min(group, left);
        t.packed = (const char *)t.packed + token * layer->padded_in * layer->packed_size;
        t.y = (char *)t.y + y;
        t.preactivation = t.preactivation ? (char *)t.preactivation + y : NULL;
        t.residual = (const char *)t.residual + token * t.residual_stride * size;
        if (whole && left >= 2 * group) {
            t.ahead_residual = (const char *)t.residual + group * out * size;
            t.ahead_y = (const char *)t.y + group * out * size;
        }
        sb_layer_run(layer, &t, first, last, acc);
    }
}

static int product_item(const void *context, int64_t item) {
    const product_job *job = context;
    const partition *cut = &job->partition;
    const sb_layer *layer = &job->layer;
    const int64_t start = item / cut->splits * cut->tile, part = item % cut->splits;
    const int64_t tokens = sb_min(cut->tile, job->product->tokens - start);
    const size_t packed_bytes = sb_align((size_t)(cut->tile * layer->padded_in * layer->packed_size));
    char *scratch = sb_scratch(SB_ITEM, packed_bytes + SB_ACC_BYTES);
    if (!scratch) return SB_NO_MEMORY;
    pack_tile(layer, job->product, start, tokens, cut->group, scratch);
    sb_target target = target_of(job->product, start, tokens, cut->group);
    target.packed = scratch;
    const int64_t first = split_row(layer, part, cut->splits), last = split_row(layer, part + 1, cut->splits);
    float *acc = (float *)(scratch + packed_bytes);
    if (job->by_group) run_by_group(layer, &target, first, last, acc);
    else sb_layer_run(layer, &target, first, last, acc);
    sb_finish_stores();
    return SB_OK;
}

/* A residual and y are passed through a panel's width at a time: while the weights stay in L2, going group by group keeps
 * those lines near (768 -> 3072, 90 %, 3152 tokens, float32, with a residual: 24 -> 17 ms), and fetching them in the
 * order in which they lie another part (128 -> 512 channels, 28 x 28, 16 images: 11.5 -> 8.4 ms). */
enum { RESIDENT_BYTES = 1 << 20 };

SB_API int sb_run_product(const sb_product *p) {
    if (!p->tokens) return SB_OK;
    product_job job = {.product = p};
    sb_layer_init(&job.layer, &p->weight, p->dtype, p->tokens);
    prefer_huge_pages(p);
    const int64_t bytes = job.layer.padded_in * job.layer.packed_size, weight_bytes = sb_layer_bytes(&job.layer);
    job.by_group = p->residual && weight_bytes <= RESIDENT_BYTES;
    job.partition = cut(p->tokens, job.layer.max_group, bytes, weight_bytes, job.layer.rows, p->threads);
    const int status = arrange(&job.layer, NULL, p->threads);
    if (status != SB_OK) return status;
    return sb_parallel(p->threads, job.partition.tiles * job.partition.splits, product_item, &job);
}

typedef struct {
    const sb_feed_forward *ff;
    sb_layer first, second;
    partition partition;
} feed_forward_job;

static int feed_forward_item(const void *context, int64_t item) {
    const feed_forward_job *job = context;
    const partition *cut = &job->partition;
    const sb_layer *first = &job->first, *second = &job->second;
    const sb_product *p = &job->ff->first;
    const int64_t start = item * cut->tile, tokens = sb_min(cut->tile, p->tokens - start);
    const size_t x_bytes = sb_align((size_t)(cut->tile * first->padded_in * first->packed_size));
    const size_t hidden_bytes = sb_align((size_t)(cut->tile * second->padded_in * second->packed_size));
    char *x = sb_scratch(SB_ITEM, x_bytes + hidden_bytes + SB_ACC_BYTES);
    if (!x) return SB_NO_MEMORY;
    char *hidden = x + x_bytes;
    float *acc = (float *)(hidden + hidden_bytes);
    pack_tile(first, p, start, tokens, cut->group, x);
    const int64_t covered = first->rows * first->weight.block_out;
    if (covered < second->padded_in) memset(hidden, 0, hidden_bytes); /* features only the second's blocks reach */
    sb_target inner = target_of(p, 0, tokens, cut->group);
    inner.packed = x;
    inner.next = hidden;
    inner.next_padded = second->padded_in;
    inner.next_size = second->packed_size;
    inner.next_chunk = second->chunk;
    sb_layer_run(first, &inner, 0, first->rows, acc);
    sb_target outer = target_of(&job->ff->second, start, tokens, cut->group);
    outer.packed = hidden;
    sb_layer_run(second, &outer, 0, second->rows, acc);
    sb_finish_stores();
    return SB_OK;
}

SB_API int sb_run_feed_forward(const sb_feed_forward *ff) {
    if (!ff->first.tokens) return SB_OK;
    feed_forward_job job = {.ff = ff};
    sb_layer_init(&job.first, &ff->first.weight, ff->first.dtype, ff->first.tokens);
    sb_layer_init(&job.second, &ff->second.weight, ff->first.dtype, ff->first.tokens);
    prefer_huge_pages(&ff->second);
    const int64_t bytes = (job.first.padded_in + job.second.padded_in) * job.first.packed_size;
    job.partition = cut(ff->first.tokens, sb_min(job.first.max_group, job.second.max_group), bytes,
                        sb_layer_bytes(&job.first) + sb_layer_bytes(&job.second), 1, ff->first.threads);
    const int status = arrange(&job.first, &job.second, ff->first.threads);
    if (status != SB_OK) return status;
    return sb_parallel(ff->first.threads, job.partition.tiles, feed_forward_item, &job);
}

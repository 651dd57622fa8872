/* The drivers of the forward products: tokens are cut into tiles that fit the L2 cache, tiles into groups. */
#include "layer.h"
#include "parallel.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

/* The packed tokens of a tile stay in L2 while weights and results stream past. Weights that would fit there too are to
 * stay (3072 x 768 at 90 %, 2 MB of L2: in float32 7.0 ms with tiles of two fifths and 6.4 with a tenth, in bfloat16 1.2
 * and 1.0 with a fifth); larger ones are read again for every tile, so that larger tiles read them less often (4096 x
 * 4096, float32, 80 %: 63 ms with two fifths, 59 with three; a feed-forward of 768 and 3072, bfloat16, 80 %: 5.2, 4.7). */
static int64_t tile_bytes(const sb_layer *layer, int64_t weight_bytes) {
    static _Atomic int64_t known; /* asking takes microseconds in a virtual machine */
    int64_t l2 = atomic_load(&known);
#ifdef _SC_LEVEL2_CACHE_SIZE
    if (!l2) l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (l2 <= 0) l2 = 1 << 20;
    atomic_store(&known, l2);
    if (weight_bytes >= l2 / 2) return l2 * 3 / 5;
    return layer->packed_size == 4 ? l2 / 10 : l2 / 5;
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
 * out too. A token takes `bytes` of the tile, `tile` at most. */
static partition cut(int64_t tokens, int64_t max_group, int64_t bytes, int64_t tile, int64_t rows, int32_t threads) {
    partition p = {.splits = 1};
    int64_t groups = sb_ceil_div(tokens, max_group);
    if (groups >= threads) groups = sb_ceil_div(groups, threads) * threads;
    p.group = sb_ceil_div(tokens, groups);
    groups = sb_ceil_div(tokens, p.group);
    int64_t a_tile = sb_min(sb_max(tile / (p.group * bytes), 1), sb_max(groups / threads, 1));
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

/* Bytes of the normalized tokens of a group, before they are packed. */
static size_t normalized_bytes(const sb_product *p, int64_t group) {
    return p->norm.enabled ? sb_align((size_t)(group * p->weight.in_features * sb_size_of(p->dtype))) : 0;
}

/* The packed features of one group of tokens, normalized where they are to be. */
static void pack_tokens(const sb_layer *layer, const sb_product *p, int64_t token, int64_t count, int64_t group,
                        char *normalized, char *packed) {
    const int64_t size = sb_size_of(p->dtype), features = sb_min(p->weight.in_features, layer->padded_in);
    const void *rows[SB_MAX_GROUP] = {0};
    for (int64_t m = 0; m < count; m++) {
        rows[m] = (const char *)p->x + (token + m) * p->x_stride * size;
        if (!p->norm.enabled) continue;
        layer->kernels->normalize(p->dtype, &p->norm, rows[m], features, normalized + m * features * size);
        rows[m] = normalized + m * features * size;
    }
    layer->kernels->pack(p->dtype, rows, group, features, layer->padded_in, layer->chunk, packed);
}

/* The packed features of every kernel position for one group of tokens. */
static void pack_windows(const sb_layer *layer, const sb_product *p, int64_t token, int64_t count, int64_t group,
                         char *packed) {
    const sb_window *w = &p->window;
    const int64_t size = sb_size_of(p->dtype);
    const void *rows[SB_MAX_GROUP];
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
                      char *normalized, char *packed) {
    for (int64_t token = 0; token < tokens; token += group) {
        const int64_t count = sb_min(group, tokens - token);
        char *out = packed + token * layer->padded_in * layer->packed_size;
        if (p->window.kernel_h) pack_windows(layer, p, start + token, count, group, out);
        else pack_tokens(layer, p, start + token, count, group, normalized, out);
    }
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

/* Weights that L2 does not hold beside the tokens come from L3 for every tile of tokens: fetched ahead, the next strip's
 * arrive while this one multiplies (4096 -> 4096, float32, 50 %: 123 -> 151 GFLOP/s of one core). */
enum { RESIDENT_BYTES = 1 << 20 };

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
    const sb_layer *following; /* as in sb_target */
    int64_t first_feature;     /* of those that are multiplied */
    int unfinished;            /* y will be read again */
} product_job;

/* All block rows of a group before the next group, whose lines are fetched meanwhile. */
static void run_by_group(const sb_layer *layer, const sb_target *tile, int64_t first, int64_t last, float *acc) {
    const int64_t size = sb_size_of(layer->dtype), group = tile->group, out = layer->weight.out_features;
    const int whole = tile->residual && tile->y_stride == out && tile->residual_stride == out;
    for (int64_t token = 0; token < tile->tokens; token += group) {
        sb_target t = *tile;
        const int64_t y = token * t.y_stride * size, left = t.tokens - token;
        t.tokens = sb_min(group, left);
        t.packed = (const char *)t.packed + token * layer->padded_in * layer->packed_size;
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
    const partition *cut = &job->partition;
    const sb_layer *layer = &job->layer;
    const int64_t start = item / cut->splits * cut->tile, part = item % cut->splits;
    const int64_t tokens = sb_min(cut->tile, job->product->tokens - start);
    const size_t packed_bytes = sb_align((size_t)(cut->tile * layer->padded_in * layer->packed_size));
    char *scratch = sb_scratch(SB_ITEM, packed_bytes + SB_ACC_BYTES + normalized_bytes(job->product, cut->group));
    if (!scratch) return SB_NO_MEMORY;
    pack_tile(layer, job->product, start, tokens, cut->group, scratch + packed_bytes + SB_ACC_BYTES, scratch);
    sb_target target = target_of(job->product, start, tokens, cut->group);
    /* Columns count from the first feature of all, of which some may not be packed. */
    const int64_t before = job->first_feature * cut->group * layer->packed_size;
    target.packed = (const void *)((uintptr_t)scratch - (uintptr_t)before);
    target.following = job->following;
    target.stream = target.stream && !job->unfinished;
    const int64_t first = split_row(layer, part, cut->splits), last = split_row(layer, part + 1, cut->splits);
    float *acc = (float *)(scratch + packed_bytes);
    if (job->by_group) run_by_group(layer, &target, first, last, acc);
    else sb_layer_run(layer, &target, first, last, acc);
    sb_finish_stores();
    return SB_OK;
}

/* Multiply-adds that are worth a thread of their own. A second one takes 2 us to begin and end (768 -> 768, 1 token,
 * float32, 90 %: 2.6 us on one thread, 4.6 on two; 8 tokens: 7.7 and 6.6). Paired weights are laid out by one thread and read by
 * the other (bfloat16 on AMX, 128 tokens: 30 and 36 us; 256: 53 and 48). A build for tests may set the first to 1. */
#ifndef SB_WORTH_A_THREAD
#define SB_WORTH_A_THREAD (1 << 18)
#endif
enum { PAIRED = 16 };

static int32_t useful_threads(const sb_layer *layer, int64_t tokens, int32_t threads) {
    const int64_t values = sb_layer_bytes(layer) / sb_size_of(layer->dtype);
    const int64_t least = (int64_t)SB_WORTH_A_THREAD * (layer->kernels->pair ? PAIRED : 1);
    /* One token waits for the weights, so that it takes as long as two. */
    return (int32_t)sb_min(threads, sb_max(values * sb_max(tokens, 2) / least, 1));
}

/* The weights of a panel are read for every group of tokens, from L2 as long as there is room for them. Rows of more
 * living features than this are multiplied in slabs of columns, one after the other, each adding to y in float32 (4096 ->
 * 4096, 1576 tokens: at 10 % 442 ms in one slab, 290 in two, 278 in four; at 50 % 166 and 153; at 80 %, where 819 live,
 * 63 and 68). */
enum { SLAB_FEATURES = 1400, SLAB_TOKENS = 64 };

static int64_t count_slabs(const sb_product *p, const sb_layer *layer) {
    const int whole = p->window.kernel_h || p->norm.enabled || p->activation != SB_NONE || p->preactivation;
    if (whole || p->dtype != SB_FLOAT32 || p->tokens < SLAB_TOKENS) return 1;
    const int64_t living = sb_layer_bytes(layer) / (int64_t)sizeof(float) / (layer->rows * p->weight.block_out);
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
        const int64_t bytes = layer->padded_in * layer->packed_size;
        job->partition = cut(whole.tokens, layer->max_group, bytes, tile_bytes(layer, sb_layer_bytes(layer)), rows, threads);
        status = sb_parallel(threads, job->partition.tiles * job->partition.splits, product_item, job);
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
    prefer_huge_pages(p);
    const int64_t bytes = job.layer.padded_in * job.layer.packed_size, weight_bytes = sb_layer_bytes(&job.layer);
    const int64_t written = p->tokens * p->y_stride * sb_size_of(p->dtype);
    job.by_group = weight_bytes <= RESIDENT_BYTES &&
                   (p->residual || (job.layer.kernels->run && written > SB_REUSED_BYTES));
    job.following = weight_bytes > RESIDENT_BYTES ? &job.layer : NULL;
    job.partition = cut(p->tokens, job.layer.max_group, bytes, tile_bytes(&job.layer, weight_bytes), job.layer.rows,
                        threads);
    const int status = arrange(&job.layer, NULL, threads);
    if (status != SB_OK) return status;
    const int64_t slabs = count_slabs(p, &job.layer);
    if (slabs > 1) return run_slabs(&job, slabs, threads);
    return sb_parallel(threads, job.partition.tiles * job.partition.splits, product_item, &job);
}

SB_API int sb_run_rows(const sb_product *product, const sb_rows *rows) {
    sb_product p = *product;
    p.x = rows->x;
    p.residual = rows->residual;
    p.y = rows->y;
    p.preactivation = rows->preactivation;
    p.tokens = rows->tokens;
    p.x_stride = rows->x_stride;
    p.residual_stride = rows->residual_stride;
    p.y_stride = p.weight.out_features;
    p.threads = rows->threads;
    return sb_run_product(&p);
}

typedef struct {
    const sb_feed_forward *ff;
    sb_layer first, second;
    partition partition;
    int resident; /* L2 holds the weights of both beside the tokens */
} feed_forward_job;

static int feed_forward_item(const void *context, int64_t item) {
    const feed_forward_job *job = context;
    const partition *cut = &job->partition;
    const sb_layer *first = &job->first, *second = &job->second;
    const sb_product *p = &job->ff->first;
    const int64_t start = item * cut->tile, tokens = sb_min(cut->tile, p->tokens - start);
    const size_t x_bytes = sb_align((size_t)(cut->tile * first->padded_in * first->packed_size));
    const size_t hidden_bytes = sb_align((size_t)(cut->tile * second->padded_in * second->packed_size));
    char *x = sb_scratch(SB_ITEM, x_bytes + hidden_bytes + SB_ACC_BYTES + normalized_bytes(p, cut->group));
    if (!x) return SB_NO_MEMORY;
    char *hidden = x + x_bytes;
    float *acc = (float *)(hidden + hidden_bytes);
    pack_tile(first, p, start, tokens, cut->group, hidden + hidden_bytes + SB_ACC_BYTES, x);
    const int64_t covered = first->rows * first->weight.block_out;
    if (covered < second->padded_in) memset(hidden, 0, hidden_bytes); /* features only the second's blocks reach */
    sb_target inner = target_of(p, 0, tokens, cut->group);
    inner.packed = x;
    inner.following = job->resident ? NULL : second;
    inner.next = hidden;
    inner.next_padded = second->padded_in;
    inner.next_size = second->packed_size;
    inner.next_chunk = second->chunk;
    sb_layer_run(first, &inner, 0, first->rows, acc);
    sb_target outer = target_of(&job->ff->second, start, tokens, cut->group);
    outer.packed = hidden;
    outer.following = job->resident ? NULL : first;
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
    const int64_t weight_bytes = sb_layer_bytes(&job.first) + sb_layer_bytes(&job.second);
    job.resident = weight_bytes <= RESIDENT_BYTES;
    job.partition = cut(ff->first.tokens, sb_min(job.first.max_group, job.second.max_group), bytes,
                        tile_bytes(&job.first, weight_bytes), 1, ff->first.threads);
    const int status = arrange(&job.first, &job.second, ff->first.threads);
    if (status != SB_OK) return status;
    return sb_parallel(ff->first.threads, job.partition.tiles, feed_forward_item, &job);
}

#include "driver.h"
#include "parallel.h"
#include "windows.h"

#include <stdatomic.h>
#include <unistd.h>

/* The packed tokens of a tile stay in L2 while weights and results stream past. Weights that would fit there too are to
 * stay (3072 x 768 at 90 %, 2 MB of L2: in float32 7.0 ms with tiles of two fifths and 6.4 with a tenth, in bfloat16 1.2
 * and 1.0 with a fifth); larger ones are read again for every tile, so that larger tiles read them less often (4096 x
 * 4096, float32, 80 %: 63 ms with two fifths, 59 with three; a feed-forward of 768 and 3072, bfloat16, 80 %: 5.2, 4.7). */
int64_t sb_tile_bytes(const sb_layer *layer, int64_t weight_bytes) {
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

sb_partition sb_cut(int64_t tokens, int64_t max_group, int64_t bytes, int64_t tile, int64_t rows, int32_t threads) {
    int64_t groups = sb_ceil_div(tokens, max_group);
    if (groups >= threads) groups = sb_ceil_div(groups, threads) * threads;
    return sb_cut_groups(tokens, sb_ceil_div(tokens, groups), bytes, tile, rows, threads);
}

sb_partition sb_cut_groups(int64_t tokens, int64_t group, int64_t bytes, int64_t tile, int64_t rows, int32_t threads) {
    sb_partition p = {.group = group, .splits = 1};
    const int64_t groups = sb_ceil_div(tokens, group);
    int64_t a_tile = sb_min(sb_max(tile / (p.group * bytes), 1), sb_max(groups / threads, 1));
    /* As many tiles for every thread, too. */
    const int64_t tiles = sb_ceil_div(groups, a_tile);
    if (tiles > 1) a_tile = sb_ceil_div(groups, sb_ceil_div(tiles, threads) * threads);
    p.tile = a_tile * p.group;
    p.tiles = sb_ceil_div(tokens, p.tile);
    if (p.tiles < 2 * threads && p.tiles % threads) p.splits = sb_min(4 * threads, rows);
    return p;
}

size_t sb_normalized_bytes(const sb_product *p, int64_t group) {
    enum { LINE = 64 / sizeof(float) };
    if (!p->norm.enabled) return 0;
    const int64_t features = p->weight.in_features, padded = sb_ceil_div(features, LINE) * LINE;
    return sb_align((size_t)(group * features * sb_size_of(p->dtype) + 2 * padded * (int64_t)sizeof(float)));
}

/* The packed features of one group of tokens, normalized where they are to be. */
static void pack_tokens(const sb_layer *layer, const sb_product *p, int64_t token, int64_t count, int64_t group,
                        char *room, char *packed) {
    const int64_t size = sb_size_of(p->dtype), features = sb_min(p->weight.in_features, layer->padded_in);
    const void *rows[SB_MAX_GROUP] = {0};
    for (int64_t m = 0; m < count; m++) rows[m] = (const char *)p->x + (token + m) * p->x_stride * size;
    if (p->norm.enabled) layer->kernels->normalize(p->dtype, &p->norm, rows, count, features, room);
    layer->kernels->pack(p->dtype, rows, group, group, features, layer->padded_in, layer->chunk, packed);
}

void sb_pack_tile(const sb_layer *layer, const sb_product *p, int64_t start, int64_t tokens, int64_t group,
                  char *room, char *packed) {
    for (int64_t token = 0; token < tokens; token += group) {
        const int64_t count = sb_min(group, tokens - token);
        char *out = packed + token * layer->padded_in * layer->packed_size;
        if (p->window.kernel_h) sb_pack_windows(layer, p, start + token, count, group, out);
        else pack_tokens(layer, p, start + token, count, group, room, out);
    }
}

sb_target sb_target_of(const sb_product *p, int64_t start, int64_t tokens, int64_t group) {
    const int64_t size = sb_size_of(p->dtype);
    return (sb_target){
        .tokens = tokens,
        .group = group,
        .bias = p->bias,
        .residual = p->residual ? (const char *)p->residual + start * p->residual_stride * size : NULL,
        .y = p->y ? (char *)p->y + start * p->y_stride * size : NULL,
        .preactivation = p->preactivation ? (char *)p->preactivation + start * p->y_stride * size : NULL,
        .y_stride = p->y_stride,
        .residual_stride = p->residual_stride,
        .activation = p->activation,
        .residual_first = p->residual_first,
    };
}

int sb_arranges_strips(const sb_layer *layer, int64_t tiles, int32_t threads) {
    return layer->arranged_bytes && !layer->arranged && tiles <= threads;
}

int sb_arrange(sb_layer *first, sb_layer *second, int32_t threads) {
    if (first->arranged) return SB_OK;
    const size_t bytes = sb_align(first->arranged_bytes), all = bytes + (second ? second->arranged_bytes : 0);
    char *memory = all ? sb_scratch(SB_CALL, all) : NULL;
    if (all && !memory) return SB_NO_MEMORY;
    const int status = sb_layer_arrange(first, memory, threads);
    return status == SB_OK && second ? sb_layer_arrange(second, memory + bytes, threads) : status;
}

static int64_t result_bytes(const sb_product *p) {
    return ((p->tokens - 1) * p->y_stride + p->weight.out_features) * sb_size_of(p->dtype);
}

int sb_product_streams(const sb_product *p) { return sb_streams(p->y, result_bytes(p)); }

void sb_prefer_huge_results(const sb_product *p) { sb_prefer_huge_pages(p->y, result_bytes(p)); }

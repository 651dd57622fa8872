#include "driver.h"
#include "parallel.h"
#include "reads.h"
#include "windows.h"

#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

/* The packed tokens of a tile stay in L2 while weights and results stream past. Weights that would fit there too are to
 * stay (3072 x 768 at 90 %, 2 MB of L2: in float32 7.0 ms with tiles of two fifths and 6.4 with a tenth, in bfloat16 1.2
 * and 1.0 with a fifth); larger ones are read again for every tile, so that larger tiles read them less often (4096 x
 * 4096, float32, 80 %: 63 ms with two fifths, 59 with three; a feed-forward of 768 and 3072, bfloat16, 80 %: 5.2, 4.7). Where
 * values are laid out anew, two fifths may hold all of a thread, which then does so itself, just before they are multiplied
 * (ViT-B/16, one image, bfloat16, 90 %: 9.3 -> 8.0 ms). */
int64_t sb_tile_bytes(const sb_layer *layer, int64_t weight_bytes, int64_t a_thread) {
    static _Atomic int64_t known; /* asking takes microseconds in a virtual machine */
    int64_t l2 = atomic_load(&known);
#ifdef _SC_LEVEL2_CACHE_SIZE
    if (!l2) l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (l2 <= 0) l2 = 1 << 20;
    atomic_store(&known, l2);
    if (weight_bytes >= l2 / 2) return l2 * 3 / 5;
    if (layer->packed_size == 4) return l2 / 10;
    return layer->arranged_bytes && a_thread <= l2 * 2 / 5 ? l2 * 2 / 5 : l2 / 5;
}

/* Packed tokens are read faster, which pays if they are often enough: so many strips that multiply a feature, on average, had
 * better find it in its row (1576 tokens, blocks of 64: 3072 -> 768, 80 %, 2.4 strips: 1.04 ms packed and 0.93 in rows; 768 ->
 * 3072, 9.6 strips: 0.90 and 0.83; 1024 -> 4096, 50 %, 32 strips: 2.5 and 2.6). Fewer where rows lie in the same sets of the
 * caches (4096 -> 4096, 80 %, 12.8 strips: 6.4 and 6.6; 90 %: 3.45 and 3.43), or blocks 16 wide take half of a line (3072 ->
 * 768, 80 %: 1.44 and 1.56; 50,176 tokens, 256 -> 64, 0.2 strips: 1.06 and 0.77). */
static int64_t strips_in_rows(const sb_layer *layer, int64_t stride) {
    enum { PAGE = 2048 }; /* elements */
    if (layer->chunk < 32) return layer->chunk == 16 ? 1 : 0;
    return stride % PAGE ? 20 : 8;
}

int sb_takes_rows(const sb_layer *layer, const sb_product *p) {
    enum { LINE = 32 };
    if (!sb_layer_walks(layer) || p->window.kernel_h || layer->padded_in != p->weight.in_features) return 0;
    const int64_t values = sb_layer_bytes(layer) / sb_size_of(layer->dtype);
    const int64_t stride = p->norm.enabled ? layer->padded_in : p->x_stride;
    if (values > layer->padded_in * SB_MAX_PANEL * strips_in_rows(layer, stride)) return 0;
    return p->norm.enabled || ((uintptr_t)p->x % 64 == 0 && p->x_stride % LINE == 0);
}

sb_partition sb_cut(int takes_rows, int64_t tokens, int64_t most, int64_t bytes, int64_t tile, int64_t rows, int32_t threads) {
    int64_t groups = sb_ceil_div(tokens, most);
    if (groups >= threads) groups = sb_ceil_div(groups, threads) * threads;
    sb_partition p = sb_cut_groups(tokens, sb_ceil_div(tokens, groups), bytes, tile, rows, threads);
    if (!takes_rows) return p;
    p.group = most;
    p.tile = sb_ceil_div(tokens, p.tiles); /* which need not end with a group */
    p.room = sb_ceil_div(p.tile, most) * most;
    return p;
}

int64_t sb_group_of(int takes_rows, int64_t tokens, int64_t most) {
    return takes_rows ? most : sb_ceil_div(tokens, sb_ceil_div(tokens, most));
}

sb_partition sb_cut_groups(int64_t tokens, int64_t group, int64_t bytes, int64_t tile, int64_t rows, int32_t threads) {
    sb_partition p = {.group = group, .splits = 1};
    const int64_t groups = sb_ceil_div(tokens, group);
    int64_t a_tile = sb_min(sb_max(tile / (p.group * bytes), 1), sb_max(groups / threads, 1));
    /* As many tiles for every thread, too. */
    const int64_t tiles = sb_ceil_div(groups, a_tile);
    if (tiles > 1) a_tile = sb_ceil_div(groups, sb_ceil_div(tiles, threads) * threads);
    p.tile = p.room = a_tile * p.group;
    p.tiles = sb_ceil_div(tokens, p.tile);
    if (p.tiles < 2 * threads && p.tiles % threads) p.splits = sb_min(4 * threads, rows);
    return p;
}

static int64_t whole_lines(int64_t floats) {
    enum { LINE = 64 / sizeof(float) };
    return sb_ceil_div(floats, LINE) * LINE;
}

size_t sb_normalized_bytes(const sb_product *p, int64_t group) {
    if (!p->norm.enabled) return 0;
    const int64_t features = p->weight.in_features, parameters = 2 * whole_lines(features);
    return sb_align((size_t)(group * features * sb_size_of(p->dtype) + parameters * (int64_t)sizeof(float)));
}

/* Groups are read whole: the last one must not reach past the last token. */
static int reaches_out(const sb_product *p, int64_t token, int64_t group) { return token + group > p->tokens; }

/* The features that the layer has blocks for, run by run. */
static void pack_reads(const sb_layer *layer, int32_t dtype, const void *const *rows, int64_t group, int64_t features,
                       char *packed) {
    const int64_t size = sb_size_of(dtype), width = layer->weight.block_in;
    for (int64_t first = 0, end; first < layer->padded_in; first = end) {
        for (end = first; end < layer->padded_in && sb_reads(layer->reads, end, width);) end += width;
        const void *parts[SB_MAX_GROUP];
        for (int64_t m = 0; m < group; m++) parts[m] = rows[m] ? (const char *)rows[m] + first * size : NULL;
        char *out = packed + first * group * layer->packed_size;
        if (end > first) layer->kernels->pack(dtype, parts, group, group, features - first, end - first, layer->chunk, out);
        else end += width;
    }
}

/* The features of one group of tokens, packed, and normalized where they are to be; or as rows, if x's own do not serve. */
static void pack_tokens(const sb_layer *layer, const sb_product *p, int64_t token, int64_t count, int64_t group,
                        char *room, char *packed) {
    const int64_t size = sb_size_of(p->dtype), features = sb_min(p->weight.in_features, layer->padded_in);
    const int as_rows = sb_takes_rows(layer, p);
    if (as_rows && !p->norm.enabled && !reaches_out(p, token, group)) return;
    const void *rows[SB_MAX_GROUP] = {0};
    for (int64_t m = 0; m < count; m++) rows[m] = (const char *)p->x + (token + m) * p->x_stride * size;
    if (p->norm.enabled) {
        float *parameters = (float *)room;
        char *normalized = as_rows ? packed : (char *)(parameters + 2 * whole_lines(features));
        layer->kernels->normalize(p->dtype, &p->norm, rows, count, features, parameters, normalized);
    } else if (as_rows) {
        for (int64_t m = 0; m < count; m++) memcpy(packed + m * features * size, rows[m], (size_t)(features * size));
    }
    if (!as_rows) pack_reads(layer, p->dtype, rows, group, features, packed);
}

sb_packing sb_packing_of(const sb_layer *layer, const sb_product *p, int64_t start, int64_t tokens, int64_t group,
                         const char *packed) {
    if (!sb_takes_rows(layer, p)) return sb_packed_groups(layer, packed, group);
    const int in_place = !p->norm.enabled;
    const int64_t own = layer->padded_in, stride = in_place ? p->x_stride : own, size = sb_size_of(p->dtype);
    const int64_t last = (sb_ceil_div(tokens, group) - 1) * group;
    return (sb_packing){.features = in_place ? (const char *)p->x + start * stride * size : packed,
                        .token_stride = stride,
                        .chunk_stride = layer->chunk,
                        .column_stride = layer->weight.block_in,
                        .group_stride = group * stride,
                        .last = in_place && reaches_out(p, start + last, group) ? packed + last * own * size : NULL,
                        .last_stride = own};
}

sb_packing sb_pack_tile(const sb_layer *layer, const sb_product *p, int64_t start, int64_t tokens, int64_t group,
                        char *room, char *packed) {
    for (int64_t token = 0; token < tokens; token += group) {
        const int64_t count = sb_min(group, tokens - token);
        char *out = packed + token * layer->padded_in * layer->packed_size;
        if (p->window.kernel_h) sb_pack_windows(layer, p, start + token, count, group, out);
        else pack_tokens(layer, p, start + token, count, group, room, out);
    }
    return sb_packing_of(layer, p, start, tokens, group, packed);
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

#include "windows.h"

#include <stdlib.h>

/* Features of a place of the kernel, in whole blocks. */
static int64_t padded_channels(const sb_layer *layer, const sb_window *w) {
    return layer->padded_in / (w->kernel_h * w->kernel_w);
}

static const char *pixel_at(const sb_window *w, const char *image, int64_t size, int64_t row, int64_t column) {
    if (row < 0 || row >= w->height || column < 0 || column >= w->width) return NULL;
    return image + (row * w->row_stride + column * w->pixel_stride) * size;
}

void sb_window_rows(const sb_window *w, const void *x, int64_t size, int64_t place, int64_t token, int64_t count,
                    const void **rows) {
    const int64_t top = place / w->kernel_w * w->dilation_h - w->padding_h;
    const int64_t left = place % w->kernel_w * w->dilation_w - w->padding_w;
    int64_t column = token % w->out_width, row = token / w->out_width % w->out_height;
    const char *image = (const char *)x + token / w->out_width / w->out_height * w->image_stride * size;
    for (int64_t m = 0; m < count; m++) {
        rows[m] = pixel_at(w, image, size, row * w->stride_h + top, column * w->stride_w + left);
        if (++column < w->out_width) continue;
        column = 0;
        if (++row < w->out_height) continue;
        row = 0;
        image += w->image_stride * size;
    }
}

void sb_pack_windows(const sb_layer *layer, const sb_product *p, int64_t token, int64_t count, int64_t group, char *packed) {
    const sb_window *w = &p->window;
    const void *rows[SB_MAX_GROUP] = {0};
    const int64_t channels = padded_channels(layer, w), places = w->kernel_h * w->kernel_w;
    for (int64_t place = 0; place < places; place++, packed += channels * group * layer->packed_size) {
        sb_window_rows(w, p->x, sb_size_of(p->dtype), place, token, count, rows);
        layer->kernels->pack(p->dtype, rows, group, group, w->channels, channels, layer->chunk, packed);
    }
}

/* So many groups of a row of the result that tiles have the least to multiply: AMX takes 16 tokens or 32 at a time. */
static int64_t count_groups(const sb_layer *layer, int64_t out_width) {
    enum { OWN = 2 }; /* what a group costs besides its tokens, in tokens */
    const int64_t side = sb_max(layer->kernels->small_group, 1);
    int64_t best = 0, least = INT64_MAX;
    for (int64_t count = sb_ceil_div(out_width, layer->max_group); out_width + count * OWN < least; count++) {
        const int64_t group = sb_ceil_div(out_width, count), cost = count * (sb_ceil_div(group, side) * side + OWN);
        if (cost < least) least = cost, best = count;
    }
    return best;
}

/* Rows of an image that a row of windows reaches. */
static int64_t reach(const sb_window *w) { return (w->kernel_h - 1) * w->dilation_h + 1; }

static int find_columns(const sb_layer *layer, const sb_product *p, sb_image_rows *rows) {
    const sb_window *w = &p->window;
    const int32_t *crow = layer->weight.crow;
    const int64_t blocks = padded_channels(layer, w) / layer->weight.block_in;
    rows->cols = malloc((size_t)sb_max(crow[layer->rows], 1) * sizeof *rows->cols);
    if (!rows->cols) return SB_NO_MEMORY;
    for (int64_t e = crow[0]; e < crow[layer->rows]; e++) {
        const int64_t place = layer->weight.cols[e] / blocks, block = layer->weight.cols[e] % blocks;
        const int64_t i = place / w->kernel_w * w->dilation_h, j = place % w->kernel_w * w->dilation_w;
        const int64_t chunk = block * (layer->weight.block_in / layer->chunk);
        const int64_t column = j % w->stride_w * rows->phase + j / w->stride_w;
        rows->cols[e] = (int32_t)(chunk * rows->positions + i * rows->line + column);
    }
    return SB_OK;
}

int sb_cut_image_rows(const sb_layer *layer, const sb_product *p, int32_t threads, sb_image_rows *rows, sb_partition *cut) {
    const sb_window *w = &p->window;
    const int64_t channels = padded_channels(layer, w), most = layer->kernels->small_group;
    const int64_t groups = count_groups(layer, w->out_width), group = sb_ceil_div(w->out_width, groups);
    const int64_t phase = w->out_width + (w->kernel_w - 1) * w->dilation_w / w->stride_w, line = w->stride_w * phase;
    const int64_t pixel_bytes = channels * layer->packed_size;
    const int64_t token_bytes = sb_ceil_div(line * w->stride_h * pixel_bytes, w->out_width);
    const int64_t tile_bytes = sb_tile_bytes(layer, sb_layer_bytes(layer), INT64_MAX);
    const sb_partition tiles = sb_cut_groups(p->tokens, w->out_width, token_bytes, tile_bytes, layer->rows, threads);
    const int64_t tile = tiles.tile / w->out_width, images = (tile + w->out_height - 2) / w->out_height + 1;
    const int64_t lines = tile * w->stride_h + images * sb_max(reach(w) - w->stride_h, 0);
    /* With what tiles read past the last group; an odd number, lest chunks lie in the same sets of the caches. */
    const int64_t positions = (lines * line + SB_MAX_GROUP) | 1;
    const int filled = 2 * group >= (most ? most : layer->max_group);
    const int fits = positions * pixel_bytes <= sb_tile_bytes(layer, INT64_MAX, INT64_MAX);
    if (!filled || !fits || 3 * positions > 2 * w->kernel_h * w->kernel_w * tiles.tile) return SB_OK;
    *rows = (sb_image_rows){
        .positions = positions,
        .groups = groups,
        .line = line,
        .phase = phase,
        .features = positions * channels,
        .starts = tile * groups,
    };
    *cut = tiles;
    cut->group = group;
    return find_columns(layer, p, rows);
}

/* A row of an image, or zeros beside it: columns [-padding, ...) with one rest after the other. */
static void pack_line(const sb_layer *layer, const sb_product *p, const sb_image_rows *rows, const char *image, int64_t row,
                      char *packed) {
    const sb_window *w = &p->window;
    const int64_t position_bytes = layer->chunk * layer->packed_size;
    const void *pixels[SB_MAX_GROUP];
    for (int64_t rest = 0; rest < sb_min(w->stride_w, (w->kernel_w - 1) * w->dilation_w + 1); rest++)
        for (int64_t first = 0; first < rows->phase; first += SB_MAX_GROUP) {
            const int64_t count = sb_min(SB_MAX_GROUP, rows->phase - first);
            for (int64_t m = 0; m < count; m++)
                pixels[m] = pixel_at(w, image, sb_size_of(p->dtype), row, (first + m) * w->stride_w + rest - w->padding_w);
            layer->kernels->pack(p->dtype, pixels, count, rows->positions, w->channels, padded_channels(layer, w),
                                 layer->chunk, packed + (rest * rows->phase + first) * position_bytes);
        }
}

void sb_pack_image_rows(const sb_layer *layer, const sb_product *p, const sb_image_rows *rows, int64_t start,
                        sb_start *starts, char *packed, sb_target *target) {
    const sb_window *w = &p->window;
    const int64_t end = (start + target->tokens) / w->out_width, line_bytes = rows->line * layer->chunk * layer->packed_size;
    int64_t line = 0;
    target->x = (sb_packing){.features = packed,
                             .token_stride = layer->chunk,
                             .chunk_stride = rows->positions * layer->chunk,
                             .column_stride = layer->chunk,
                             .group_stride = target->group * layer->chunk, /* mostly */
                             .starts = starts,
                             .groups = target->tokens / w->out_width * rows->groups};
    for (int64_t row = start / w->out_width, count; row < end; row += count) {
        const int64_t first = row % w->out_height, top = first * w->stride_h - w->padding_h;
        const char *image = (const char *)p->x + row / w->out_height * w->image_stride * sb_size_of(p->dtype);
        count = sb_min(w->out_height - first, end - row);
        const int64_t lines = (count - 1) * w->stride_h + reach(w);
        for (int64_t i = 0; i < lines; i++) pack_line(layer, p, rows, image, top + i, packed + (line + i) * line_bytes);
        for (int64_t i = 0; i < count; i++)
            for (int64_t g = 0; g < rows->groups; g++) {
                const int64_t column = sb_min(g * target->group, w->out_width - target->group);
                *starts++ = (sb_start){(int32_t)((row + i) * w->out_width + column - start),
                                       (int32_t)((line + i * w->stride_h) * rows->line + column)};
            }
        line += lines;
    }
}

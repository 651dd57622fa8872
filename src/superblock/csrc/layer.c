#include "layer.h"

#include <string.h>

static int64_t most_tokens(const sb_kernels *kernels, int64_t panel) { return kernels->groups[panel / kernels->lanes]; }

/* The widest panel that divides the block, or 16 and a last panel of 8: all panels share one group size. */
static void choose_panel(sb_layer *layer) {
    const int64_t height = layer->weight.block_out;
    for (int64_t panel = SB_MAX_PANEL; panel >= 8; panel /= 2) {
        const int64_t vectors = panel / layer->kernels->lanes;
        if (vectors > 4 || !layer->kernels->groups[vectors] || panel > height) continue;
        if (height % panel && panel > 16) continue;
        layer->panel = panel;
        layer->max_group = most_tokens(layer->kernels, panel);
        if (height % panel) layer->max_group = sb_min(layer->max_group, most_tokens(layer->kernels, 8));
        return;
    }
}

void sb_layer_init(sb_layer *layer, const sb_weight *weight, int32_t dtype) {
    memset(layer, 0, sizeof *layer);
    layer->kernels = sb_current();
    layer->weight = *weight;
    layer->dtype = dtype;
    layer->packed_size = layer->kernels->packed_size[dtype];
    layer->rows = sb_ceil_div(weight->out_features, weight->block_out);
    layer->padded_in = sb_ceil_div(weight->in_features, weight->block_in) * weight->block_in;
    layer->transposed = weight->out_stride != 1;
    choose_panel(layer);
    int64_t longest = 0;
    for (int64_t r = 0; layer->transposed && r < layer->rows; r++)
        longest = sb_max(longest, weight->crow[r + 1] - weight->crow[r]);
    layer->scratch = sb_align((size_t)(SB_MAX_GROUP * SB_MAX_PANEL * 4)) +
                     sb_align((size_t)(longest * weight->block_in * layer->panel * sb_size_of(dtype)));
}

/* The panel's values, feature-major, into `turned`. */
static void turn(const sb_layer *layer, int64_t row, int64_t offset, int64_t panel, void *turned) {
    const sb_weight *w = &layer->weight;
    const int64_t size = sb_size_of(layer->dtype);
    char *out = turned;
    for (int64_t e = w->crow[row]; e < w->crow[row + 1]; e++) {
        const int64_t block = w->ids ? w->ids[e] : e;
        const char *in = (const char *)w->values + (block * w->block_stride + offset * w->out_stride) * size;
        layer->kernels->transpose((int)size, in, w->out_stride, panel, w->block_in, out);
        out += w->block_in * panel * size;
    }
}

/* A panel's share of the lines that the next group will touch, in the order in which they lie. */
static void fetch_ahead(const sb_target *t, int64_t first, int64_t bytes) {
    for (int64_t at = first; at < first + bytes; at += 64) {
        __builtin_prefetch(t->ahead_residual + at);
        __builtin_prefetch(t->ahead_y + at, 1);
    }
}

static void run_panel(const sb_layer *layer, const sb_target *t, int64_t row, int64_t offset, int64_t panel,
                      void *scratch) {
    const sb_weight *w = &layer->weight;
    const int64_t start = w->crow[row], blocks = w->crow[row + 1] - start, size = sb_size_of(layer->dtype);
    const int64_t column = row * w->block_out + offset;
    float *acc = scratch;
    sb_tile tile = {.cols = w->cols + start, .blocks = blocks, .chunks = w->block_in / SB_CHUNK, .acc = acc};
    if (layer->transposed) {
        char *turned = (char *)scratch + sb_align((size_t)(SB_MAX_GROUP * SB_MAX_PANEL * 4));
        turn(layer, row, offset, panel, turned);
        tile.w = turned;
        tile.block_stride = w->block_in * panel;
        tile.row_stride = panel;
    } else {
        const int64_t first = w->ids ? 0 : start * w->block_stride;
        tile.w = (const char *)w->values + (first + offset) * size;
        tile.ids = w->ids ? w->ids + start : NULL;
        tile.block_stride = w->block_stride;
        tile.row_stride = w->in_stride;
    }
    const int64_t columns = sb_min(panel, w->out_features - column);
    sb_epilogue e = {
        .acc = acc,
        .bias = t->bias && columns > 0 ? (const char *)t->bias + column * size : NULL,
        .panel = panel,
        .columns = columns,
        .packed_columns = t->next ? sb_min(panel, t->next_padded - column) : 0,
        .group = t->group,
        .acc_stride = sb_max(panel, layer->kernels->lanes),
        .y_stride = t->y_stride,
        .residual_stride = t->residual_stride,
        .dtype = layer->dtype,
        .activation = t->activation,
        .residual_first = t->residual_first,
        .stream = t->stream && panel * size % 64 == 0 && t->y_stride * size % 64 == 0 && (uintptr_t)t->y % 64 == 0 &&
                  w->block_out * size % 64 == 0,
    };
    if (columns <= 0 && e.packed_columns <= 0) return;
    if (t->ahead_y) fetch_ahead(t, column * t->group * size, columns * t->group * size);
    for (int64_t token = 0; token < t->tokens; token += t->group) {
        tile.x = (const char *)t->packed + token * layer->padded_in * layer->packed_size;
        e.rows = t->next ? t->group : sb_min(t->group, t->tokens - token);
        if (t->next) {
            e.packed = (char *)t->next + (token * t->next_padded + column * t->group) * t->next_size;
        } else {
            const int64_t at = token * t->y_stride + column;
            e.y = (char *)t->y + at * size;
            e.preactivation = t->preactivation ? (char *)t->preactivation + at * size : NULL;
            e.residual =
                t->residual ? (const char *)t->residual + (token * t->residual_stride + column) * size : NULL;
        }
        if (!t->next && !e.stream) {
            tile.target = e.y;
            tile.target_stride = t->y_stride * size;
            tile.target_bytes = columns * size;
        }
        layer->kernels->tile(layer->dtype, panel, t->group, &tile);
        layer->kernels->epilogue(&e);
    }
}

void sb_layer_run(const sb_layer *layer, const sb_target *t, int64_t first, int64_t last, void *scratch) {
    const int64_t height = layer->weight.block_out;
    for (int64_t row = first; row < last; row++)
        for (int64_t offset = 0; offset < height;) {
            const int64_t panel = height - offset >= layer->panel ? layer->panel : 8;
            run_panel(layer, t, row, offset, panel, scratch);
            offset += panel;
        }
}

#include "layer.h"
#include "parallel.h"

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

int64_t sb_layer_bytes(const sb_layer *layer) {
    const sb_weight *w = &layer->weight;
    return (w->crow[layer->rows] - w->crow[0]) * w->block_out * w->block_in * sb_size_of(layer->dtype);
}

void sb_layer_init(sb_layer *layer, const sb_weight *weight, int32_t dtype, int64_t tokens) {
    memset(layer, 0, sizeof *layer);
    layer->kernels = sb_kernels_for(dtype, tokens);
    layer->weight = *weight;
    layer->dtype = dtype;
    layer->packed_size = layer->kernels->packed_size[dtype];
    layer->rows = sb_ceil_div(weight->out_features, weight->block_out);
    layer->padded_in = sb_ceil_div(weight->in_features, weight->block_in) * weight->block_in;
    layer->chunk = sb_chunk(layer->kernels, weight->block_in);
    if (weight->out_stride != 1 || layer->kernels->pair) layer->arranged_bytes = (size_t)sb_layer_bytes(layer);
    choose_panel(layer);
}

static int64_t panel_at(const sb_layer *layer, int64_t offset) {
    return layer->weight.block_out - offset >= layer->panel ? layer->panel : 8;
}

/* Arranged, a block row is its panels, and a panel its blocks. */
static char *arranged_panel(const sb_layer *layer, int64_t row, int64_t offset) {
    const sb_weight *w = &layer->weight;
    const int64_t before = w->crow[row] - w->crow[0], blocks = w->crow[row + 1] - w->crow[row];
    return layer->arranged + (before * w->block_out + blocks * offset) * w->block_in * sb_size_of(layer->dtype);
}

static void arrange_panel(const sb_layer *layer, int64_t row, int64_t offset, int64_t panel, char *out) {
    const sb_weight *w = &layer->weight;
    const int64_t size = sb_size_of(layer->dtype);
    for (int64_t e = w->crow[row]; e < w->crow[row + 1]; e++, out += w->block_in * panel * size) {
        const int64_t block = w->ids ? w->ids[e] : e;
        const char *in = (const char *)w->values + (block * w->block_stride + offset * w->out_stride) * size;
        if (layer->kernels->pair)
            layer->kernels->pair((const uint16_t *)in, w->out_stride, w->in_stride, panel, w->block_in, (uint16_t *)out);
        else layer->kernels->transpose((int)size, in, w->out_stride, panel, w->block_in, out);
    }
}

static int arrange_row(const void *context, int64_t row) {
    const sb_layer *layer = context;
    for (int64_t offset = 0, panel; offset < layer->weight.block_out; offset += panel) {
        panel = panel_at(layer, offset);
        arrange_panel(layer, row, offset, panel, arranged_panel(layer, row, offset));
    }
    return SB_OK;
}

int sb_layer_arrange(sb_layer *layer, void *memory, int32_t threads) {
    layer->arranged = memory;
    return layer->arranged_bytes ? sb_parallel(threads, layer->rows, arrange_row, layer) : SB_OK;
}

/* Panels side by side, of one block row or several: their results make whole cache lines of a token, two where they
 * can (768 x 3072, 1576 tokens, bfloat16: single lines are written at half the speed of pairs). */
typedef struct {
    sb_tile tiles[SB_MAX_PANEL / 8];
    int64_t panels[SB_MAX_PANEL / 8];
    int64_t count, column, width;
    int64_t prepared; /* the panel that the kernels are prepared for */
} strip;

/* A panel's share of the lines that the next group will touch, in the order in which they lie. */
static void fetch_ahead(const sb_target *t, int64_t first, int64_t bytes) {
    for (int64_t at = first; at < first + bytes; at += 64) {
        __builtin_prefetch(t->ahead_residual + at);
        __builtin_prefetch(t->ahead_y + at, 1);
    }
}

static void add_panel(const sb_layer *layer, int64_t row, int64_t offset, int64_t panel, strip *s) {
    const sb_weight *w = &layer->weight;
    const int64_t start = w->crow[row], size = sb_size_of(layer->dtype);
    sb_tile tile = {.cols = w->cols + start,
                    .blocks = w->crow[row + 1] - start,
                    .chunks = w->block_in / layer->chunk,
                    .chunk = layer->chunk,
                    .acc_stride = SB_MAX_PANEL};
    if (layer->arranged_bytes) {
        tile.w = arranged_panel(layer, row, offset);
        tile.block_stride = w->block_in * panel;
        tile.row_stride = panel;
    } else {
        const int64_t first = w->ids ? 0 : start * w->block_stride;
        tile.w = (const char *)w->values + (first + offset) * size;
        tile.ids = w->ids ? w->ids + start : NULL;
        tile.block_stride = w->block_stride;
        tile.row_stride = w->in_stride;
    }
    if (!s->count) s->column = row * w->block_out + offset;
    s->tiles[s->count] = tile;
    s->panels[s->count++] = panel;
    s->width += panel;
}

/* The tiles of a strip for one group of tokens, which `group` places. */
static void multiply(const sb_layer *layer, strip *s, const sb_tile *group, int64_t tokens) {
    const sb_kernels *kernels = layer->kernels;
    const int64_t size = sb_size_of(layer->dtype);
    for (int64_t p = 0, column = 0; p < s->count; column += s->panels[p++]) {
        sb_tile *tile = &s->tiles[p];
        if (kernels->prepare && s->panels[p] != s->prepared) {
            s->prepared = s->panels[p];
            kernels->prepare(s->prepared, tokens, layer->chunk);
        }
        tile->x = group->x;
        tile->acc = group->acc + column;
        tile->target = group->target + column * size;
        tile->target_stride = group->target_stride;
        tile->target_bytes = sb_min(s->panels[p] * size, group->target_bytes - column * size);
        kernels->tile(layer->dtype, s->panels[p], tokens, tile);
    }
}

static void run_strip(const sb_layer *layer, const sb_target *t, strip *s, float *acc) {
    const int64_t size = sb_size_of(layer->dtype), column = s->column, width = s->width;
    const int64_t columns = sb_min(width, layer->weight.out_features - column);
    sb_epilogue e = {
        .acc = acc,
        .bias = t->bias && columns > 0 ? (const char *)t->bias + column * size : NULL,
        .panel = width,
        .columns = columns,
        .packed_columns = t->next ? sb_min(width, t->next_padded - column) : 0,
        .packed_from = column,
        .chunk = t->next_chunk,
        .group = t->group,
        .acc_stride = SB_MAX_PANEL,
        .y_stride = t->y_stride,
        .residual_stride = t->residual_stride,
        .dtype = layer->dtype,
        .activation = t->activation,
        .residual_first = t->residual_first,
        .stream = t->stream && width * size % 64 == 0 && column * size % 64 == 0 && t->y_stride * size % 64 == 0 &&
                  (uintptr_t)t->y % 64 == 0 && (uintptr_t)t->preactivation % 64 == 0,
    };
    if (columns <= 0 && e.packed_columns <= 0) return;
    if (t->ahead_y) fetch_ahead(t, column * t->group * size, columns * t->group * size);
    for (int64_t token = 0; token < t->tokens; token += t->group) {
        const int64_t at = token * t->y_stride + column;
        sb_tile tile = {.x = (const char *)t->packed + token * layer->padded_in * layer->packed_size, .acc = acc};
        if (!t->next && !e.stream) {
            tile.target = (char *)t->y + at * size;
            tile.target_stride = t->y_stride * size;
            tile.target_bytes = columns * size;
        }
        multiply(layer, s, &tile, t->group);
        e.rows = t->next ? t->group : sb_min(t->group, t->tokens - token);
        if (t->next) {
            e.packed = (char *)t->next + token * t->next_padded * t->next_size;
        } else {
            e.y = (char *)t->y + at * size;
            e.preactivation = t->preactivation ? (char *)t->preactivation + at * size : NULL;
            e.residual =
                t->residual ? (const char *)t->residual + (token * t->residual_stride + column) * size : NULL;
        }
        layer->kernels->epilogue(&e);
    }
}

void sb_layer_run(const sb_layer *layer, const sb_target *t, int64_t first, int64_t last, float *acc) {
    strip s = {0};
    for (int64_t row = first; row < last; row++)
        for (int64_t offset = 0, panel; offset < layer->weight.block_out; offset += panel) {
            panel = panel_at(layer, offset);
            if (s.width + panel > SB_MAX_PANEL) {
                run_strip(layer, t, &s, acc);
                s = (strip){0};
            }
            add_panel(layer, row, offset, panel, &s);
        }
    if (s.count) run_strip(layer, t, &s, acc);
    if (layer->kernels->finish) layer->kernels->finish();
}

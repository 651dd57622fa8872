#include "layer.h"
#include "parallel.h"
#include "reads.h"

#include <string.h>

static int64_t most_tokens(const sb_kernels *kernels, int64_t panel) { return kernels->groups[panel / kernels->lanes]; }

/* The panel, of those that divide the block, whose tile keeps the most sums in registers; of equals the widest, which
 * reads the longest runs of weights. Or 16 and a last panel of 8: all panels share one group size. */
static void choose_panel(sb_layer *layer, int64_t tokens) {
    const int64_t height = layer->weight.block_out;
    int64_t most = 0;
    for (int64_t panel = SB_MAX_PANEL; panel >= 8; panel /= 2) {
        const int64_t vectors = panel / layer->kernels->lanes;
        if (vectors > 4 || !layer->kernels->groups[vectors] || panel > height) continue;
        if (height % panel && panel > 16) continue;
        const int64_t group = most_tokens(layer->kernels, panel), sums = sb_min(group, tokens) * panel;
        if (sums <= most) continue;
        most = sums;
        layer->panel = panel;
        layer->max_group = group;
        if (height % panel) layer->max_group = sb_min(group, most_tokens(layer->kernels, 8));
    }
}

int64_t sb_layer_bytes(const sb_layer *layer) {
    const sb_weight *w = &layer->weight;
    return (w->crow[layer->rows] - w->crow[0]) * w->block_out * w->block_in * sb_size_of(layer->dtype);
}

/* The weights of a strip, on average. */
static int64_t strip_bytes(const sb_layer *layer) {
    return sb_layer_bytes(layer) * SB_MAX_PANEL / sb_max(layer->rows * layer->weight.block_out, 1);
}

/* So much of them stays in L1 while the groups pass (AMX, 1576 tokens, bfloat16, 80 %, groups of 16 or of 32 tokens:
 * 768 -> 3072, 20 KB: 1.5 and 1.9 ms; 1024 -> 4096, 26 KB: 2.5 and 2.8; 3072 -> 768, 79 KB: 2.2 and 1.75). */
enum { L1_WEIGHTS = 32 << 10 };

void sb_layer_init(sb_layer *layer, const sb_weight *weight, int32_t dtype, int64_t tokens) {
    memset(layer, 0, sizeof *layer);
    layer->kernels = sb_kernels_for(dtype, tokens);
    layer->weight = *weight;
    layer->starts = weight->crow;
    layer->ends = weight->crow + 1;
    layer->dtype = dtype;
    layer->packed_size = layer->kernels->packed_size[dtype];
    layer->rows = sb_ceil_div(weight->out_features, weight->block_out);
    layer->padded_in = sb_ceil_div(weight->in_features, weight->block_in) * weight->block_in;
    layer->chunk = sb_chunk(layer->kernels, weight->block_in);
    if (weight->out_stride != 1 || layer->kernels->pair) layer->arranged_bytes = (size_t)sb_layer_bytes(layer);
    choose_panel(layer, tokens);
    if (layer->kernels->small_group && strip_bytes(layer) <= L1_WEIGHTS)
        layer->max_group = sb_min(layer->max_group, layer->kernels->small_group);
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

/* `width` outputs of entries [first, last), in panels one after the other. */
static void arrange_panels(const sb_layer *layer, int64_t first, int64_t last, int64_t offset, int64_t width,
                           int64_t panel, char *out) {
    const sb_weight *w = &layer->weight;
    const sb_kernels *kernels = layer->kernels;
    const int64_t size = sb_size_of(layer->dtype), block_size = w->block_in * panel, panel_size = (last - first) * block_size;
    for (int64_t e = first; e < last; e++, out += block_size * size) {
        const int64_t block = w->ids ? w->ids[e] : e;
        const char *in = (const char *)w->values + (block * w->block_stride + offset * w->out_stride) * size;
        if (kernels->pair) {
            kernels->pair((const uint16_t *)in, w->out_stride, w->in_stride, width, w->block_in, panel, (uint16_t *)out, panel_size);
            continue;
        }
        for (int64_t n = 0; n < width; n += panel)
            kernels->transpose((int)size, in + n * w->out_stride * size, w->out_stride, panel, w->block_in,
                               out + n / panel * panel_size * size);
    }
}

static int arrange_row(const void *context, int64_t row) {
    const sb_layer *layer = context;
    const int32_t *entries = layer->weight.crow + row;
    const int64_t height = layer->weight.block_out, rest = height % layer->panel, whole = height - rest;
    arrange_panels(layer, entries[0], entries[1], 0, whole, layer->panel, arranged_panel(layer, row, 0));
    if (rest) arrange_panels(layer, entries[0], entries[1], whole, rest, rest, arranged_panel(layer, row, whole));
    return SB_OK;
}

int64_t sb_layer_strip_bytes(const sb_layer *layer) {
    int64_t most = 0;
    if (!layer->arranged_bytes || layer->arranged) return 0;
    for (int64_t row = 0; row < layer->rows; row++) most = sb_max(most, layer->ends[row] - layer->starts[row]);
    return (int64_t)sb_align((size_t)(most * layer->weight.block_in * SB_MAX_PANEL * sb_size_of(layer->dtype)));
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
    char *room;       /* what its values have left of the target's */
} strip;

/* A panel's share of the lines that the next group will touch, in the order in which they lie. */
static void fetch_lines(const sb_target *t, int64_t first, int64_t bytes) {
    for (int64_t at = first; at < first + bytes; at += 64) {
        __builtin_prefetch(t->ahead_residual + at);
        __builtin_prefetch(t->ahead_y + at, 1);
    }
}

sb_tile sb_layer_tile(const sb_layer *layer, int64_t row, int64_t offset, int64_t width, int64_t panel, char **strip) {
    const sb_weight *w = &layer->weight;
    const int64_t start = layer->starts[row], size = sb_size_of(layer->dtype);
    sb_tile tile = {.cols = w->cols + start,
                    .blocks = layer->ends[row] - start,
                    .chunks = w->block_in / layer->chunk,
                    .chunk = layer->chunk};
    if (layer->arranged_bytes) {
        const int64_t block_bytes = w->block_in * panel * size;
        if (layer->arranged) {
            tile.w = arranged_panel(layer, row, offset) + (start - w->crow[row]) * block_bytes;
        } else {
            arrange_panels(layer, start, layer->ends[row], offset, width, panel, *strip);
            tile.w = *strip;
            *strip += tile.blocks * w->block_in * width * size;
        }
        tile.block_stride = w->block_in * panel;
        tile.row_stride = panel;
    } else {
        const int64_t first = w->ids ? 0 : start * w->block_stride;
        tile.w = (const char *)w->values + (first + offset) * size;
        tile.ids = w->ids ? w->ids + start : NULL;
        tile.block_stride = w->block_stride;
        tile.row_stride = w->in_stride;
    }
    return tile;
}

/* A panel's tiles fetch their share of what its place in the next strip will read: so many lines a chunk that it has
 * come when the strip is done. */
static void set_ahead(const sb_layer *layer, const sb_target *t, int64_t row, int64_t offset, int64_t panel, sb_tile *tile) {
    enum { MOST = 8 };
    const int64_t height = layer->weight.block_out, chunks = tile->blocks * tile->chunks * sb_count_groups(t);
    int64_t next = row + sb_max(SB_MAX_PANEL / height, 1);
    const sb_layer *of = layer;
    if (next >= layer->rows) of = t->following, next -= layer->rows;
    if (next >= of->rows || !chunks) return;
    const int64_t size = sb_size_of(of->dtype), bytes = (of->ends[next] - of->starts[next]) * of->weight.block_stride * size;
    if (of->arranged && of == layer) tile->ahead = sb_layer_tile(of, next, offset, panel, panel, NULL).w;
    else if (of->arranged_bytes || of->weight.ids) return; /* in no order */
    else tile->ahead = (const char *)of->weight.values + of->starts[next] * of->weight.block_stride * size + bytes * offset / height;
    tile->ahead_lines = sb_min(sb_ceil_div(bytes * panel / height, 64 * chunks), MOST);
}

static void add_panel(const sb_layer *layer, const sb_target *t, int64_t row, int64_t offset, int64_t panel, strip *s) {
    if (!s->count) s->column = row * layer->weight.block_out + offset, s->room = t->strip;
    sb_tile *tile = &s->tiles[s->count];
    *tile = sb_layer_tile(layer, row, offset, panel, panel, &s->room);
    if (t->following) set_ahead(layer, t, row, offset, panel, tile);
    s->panels[s->count++] = panel;
    s->width += panel;
}

sb_packing sb_packed_groups(const sb_layer *layer, const void *packed, int64_t group) {
    return (sb_packing){.features = packed,
                        .token_stride = layer->chunk,
                        .chunk_stride = group * layer->chunk,
                        .column_stride = group * layer->weight.block_in,
                        .group_stride = group * layer->padded_in};
}

int64_t sb_count_groups(const sb_target *t) { return t->x.starts ? t->x.groups : sb_ceil_div(t->tokens, t->group); }

int64_t sb_first_token(const sb_target *t, int64_t group) { return t->x.starts ? t->x.starts[group].token : group * t->group; }

static int lies_apart(const sb_target *t, int64_t group) { return t->x.last && group == sb_count_groups(t) - 1; }

int64_t sb_group_stride(const sb_target *t, int64_t group) {
    return lies_apart(t, group) ? t->x.last_stride : t->x.token_stride;
}

const char *sb_group_features(const sb_layer *layer, const sb_target *t, int64_t group) {
    const sb_packing *x = &t->x;
    if (lies_apart(t, group)) return x->last;
    const int64_t at = x->starts ? x->starts[group].position * x->token_stride : group * x->group_stride;
    return (const char *)x->features + at * layer->packed_size;
}

/* The tiles of a strip for one group of tokens, which `group` places, or for several. */
static void multiply(const sb_layer *layer, strip *s, const sb_tile *group, int64_t tokens) {
    const sb_kernels *kernels = layer->kernels;
    const int64_t size = sb_size_of(layer->dtype);
    for (int64_t p = 0, column = 0; p < s->count; column += s->panels[p++]) {
        sb_tile *tile = &s->tiles[p];
        if (kernels->prepare && s->panels[p] != s->prepared) {
            s->prepared = s->panels[p];
            kernels->prepare(s->prepared, layer->chunk);
        }
        tile->x = group->x;
        tile->chunk_stride = group->chunk_stride;
        tile->column_stride = group->column_stride;
        tile->acc = group->acc + column;
        tile->acc_stride = group->acc_stride;
        tile->target = group->target ? group->target + column * size : NULL;
        tile->target_stride = group->target_stride;
        tile->target_bytes = sb_min(s->panels[p] * size, group->target_bytes - column * size);
        tile->bias = group->bias ? group->bias + column : NULL;
        tile->residual = group->residual ? group->residual + column : NULL;
        tile->residual_stride = group->residual_stride;
        tile->groups = group->groups;
        tile->group_bytes = group->group_bytes;
        tile->stream = group->stream;
        kernels->tile(layer->dtype, s->panels[p], tokens, tile);
        tile->ahead += tile->blocks * tile->chunks * tile->groups * tile->ahead_lines * 64;
    }
}

/* Whether tiles can finish this strip's results themselves, which spares a round of loads and stores. Panels narrower
 * than two lines had better be written side by side (4096 -> 4096 in blocks of 16, 90 %: 127 GFLOP/s, not 139). */
static int finishes(const sb_layer *layer, const sb_target *t, const strip *s, int64_t columns) {
    enum { TWO_LINES = 128 / sizeof(float) };
    const int plain = layer->dtype == SB_FLOAT32 && t->activation == SB_NONE && !t->preactivation && !t->next;
    return plain && columns == s->width && layer->panel >= TWO_LINES;
}

/* The results of whole groups, one after the other without a call between them. */
static void finish_groups(const sb_layer *layer, const sb_target *t, strip *s, const sb_epilogue *e, int64_t groups) {
    float bias[SB_MAX_PANEL] = {0};
    if (e->bias) memcpy(bias, e->bias, (size_t)s->width * sizeof *bias);
    const int64_t run = t->x.starts ? 1 : groups; /* that lie at equal steps */
    for (int64_t group = 0; group < groups; group += run) {
        const int64_t token = sb_first_token(t, group);
        const sb_tile tile = {
            .x = sb_group_features(layer, t, group),
            .chunk_stride = t->x.chunk_stride,
            .column_stride = t->x.column_stride,
            .acc = (float *)t->y + token * t->y_stride + s->column,
            .acc_stride = t->y_stride,
            .bias = bias,
            .residual = t->residual ? (const float *)t->residual + token * t->residual_stride + s->column : NULL,
            .residual_stride = t->residual_stride,
            .groups = run,
            .group_bytes = t->x.group_stride * layer->packed_size,
            .stream = e->stream,
        };
        multiply(layer, s, &tile, t->group);
    }
}

sb_epilogue sb_layer_epilogue(const sb_layer *layer, const sb_target *t, int64_t column, int64_t width) {
    const int64_t size = sb_size_of(layer->dtype), columns = sb_min(width, layer->weight.out_features - column);
    return (sb_epilogue){
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
}

void sb_layer_place(const sb_layer *layer, const sb_target *t, int64_t token, int64_t column, sb_epilogue *e) {
    const int64_t size = sb_size_of(layer->dtype), at = (token * t->y_stride + column) * size;
    e->present = sb_min(t->group, t->tokens - token);
    e->rows = t->next ? t->group : e->present;
    e->preactivation = t->preactivation ? (char *)t->preactivation + at : NULL;
    if (t->next) {
        e->packed = (char *)t->next + token * t->next_padded * t->next_size;
        return;
    }
    e->y = (char *)t->y + at;
    e->residual = t->residual ? (const char *)t->residual + (token * t->residual_stride + column) * size : NULL;
}

/* Zeros to the preactivations, if they are kept. */
static void clear(const sb_layer *layer, const sb_target *t, int64_t column, int64_t width, float *acc) {
    sb_epilogue e = sb_layer_epilogue(layer, t, column, width);
    if (!t->preactivation || e.columns <= 0) return;
    memset(acc, 0, SB_ACC_BYTES);
    e.acc = acc;
    e.bias = NULL;
    e.activation = SB_NONE;
    for (int64_t group = 0; group < sb_count_groups(t); group++) {
        sb_layer_place(layer, t, sb_first_token(t, group), column, &e);
        e.y = e.preactivation;
        e.preactivation = e.packed = NULL;
        e.rows = e.present;
        layer->kernels->epilogue(&e);
    }
}

/* Without blocks it is act(bias) whatever the token: other groups copy the first one's. False: not of this target. */
static int repeat(const sb_layer *layer, const sb_target *t, int64_t column, int64_t width, float *acc) {
    if (!t->next || t->preactivation || (column | width) % t->next_chunk) return 0;
    sb_epilogue e = sb_layer_epilogue(layer, t, column, width);
    if (e.packed_columns <= 0) return 1;
    memset(acc, 0, SB_ACC_BYTES);
    e.acc = acc;
    sb_layer_place(layer, t, 0, column, &e);
    layer->kernels->epilogue(&e);
    const int64_t step = t->group * t->next_padded * t->next_size, bytes = e.packed_columns * t->group * t->next_size;
    char *first = (char *)t->next + column * t->group * t->next_size;
    for (int64_t group = 1; group < sb_count_groups(t); group++) memcpy(first + group * step, first, (size_t)bytes);
    return 1;
}

int sb_layer_skips(const sb_layer *layer, const sb_target *t, int64_t column, int64_t width, int empty, float *acc) {
    if (sb_reads(t->reads, column, width)) return empty && repeat(layer, t, column, width, acc);
    clear(layer, t, column, width, acc);
    return 1;
}

static int is_empty(const strip *s) {
    for (int64_t p = 0; p < s->count; p++)
        if (s->tiles[p].blocks) return 0;
    return 1;
}

static void run_strip(const sb_layer *layer, const sb_target *t, strip *s, float *acc) {
    const int64_t size = sb_size_of(layer->dtype), column = s->column;
    if (sb_layer_skips(layer, t, column, s->width, is_empty(s), acc)) return;
    sb_epilogue e = sb_layer_epilogue(layer, t, column, s->width);
    if (e.columns <= 0 && e.packed_columns <= 0) return;
    e.acc = acc;
    const int64_t groups = sb_count_groups(t), whole = t->x.starts ? groups : t->tokens / t->group;
    const int64_t finished = finishes(layer, t, s, e.columns) ? whole : 0;
    if (finished) finish_groups(layer, t, s, &e, finished);
    if (t->ahead_y) fetch_lines(t, column * t->group * size, e.columns * t->group * size);
    for (int64_t group = finished; group < groups; group++) {
        sb_tile tile = {.x = sb_group_features(layer, t, group),
                        .chunk_stride = t->x.chunk_stride,
                        .column_stride = t->x.column_stride,
                        .acc = acc,
                        .acc_stride = SB_MAX_PANEL,
                        .groups = 1};
        sb_layer_place(layer, t, sb_first_token(t, group), column, &e);
        char *written = t->next ? e.preactivation : e.y;
        if (written && (!e.stream || t->residual)) { /* the epilogue streams no results with a residual */
            tile.target = written;
            tile.target_stride = t->y_stride * size;
            tile.target_bytes = e.columns * size;
        }
        multiply(layer, s, &tile, t->group);
        layer->kernels->epilogue(&e);
    }
}

int sb_layer_walks(const sb_layer *layer) {
    return layer->kernels->run && layer->weight.block_out % layer->kernels->run_outputs == 0;
}

void sb_layer_run(const sb_layer *layer, const sb_target *t, int64_t first, int64_t last, float *acc) {
    if (sb_layer_walks(layer)) {
        layer->kernels->run(layer, t, first, last, acc);
        return;
    }
    strip s = {0};
    for (int64_t row = first; row < last; row++)
        for (int64_t offset = 0, panel; offset < layer->weight.block_out; offset += panel) {
            panel = panel_at(layer, offset);
            if (s.width + panel > SB_MAX_PANEL) {
                run_strip(layer, t, &s, acc);
                s = (strip){0};
            }
            add_panel(layer, t, row, offset, panel, &s);
        }
    if (s.count) run_strip(layer, t, &s, acc);
    if (layer->kernels->finish) layer->kernels->finish();
}

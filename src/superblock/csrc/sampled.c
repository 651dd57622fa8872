/* The gradient of the values: dvalues[b] = dyᵀ act(x) at the living blocks.
 *
 * The weight is cut into cells of some block rows and columns, whose sums and operands of a tile of tokens share L2:
 * tile by tile both operands are laid out by block, [block row or column][token][features of the block] in float32, or
 * in the pairs that the kernels' own bfloat16 products take, and every living block adds its product. So dy and x are
 * read once a cell in the order in which they lie, the images of a convolution once a place of the kernel, and copies of
 * them never leave L2. A cell's sums stay with one
 * thread and one order of tokens, so the result does not depend on the number of threads.
 */
#include "layer.h"
#include "parallel.h"
#include "reads.h"
#include "windows.h"

#include <stdlib.h>
#include <string.h>

/* Bytes of a token that a cell takes of an operand, and tokens of a tile: at most 0.8 MB of operands beside the sums, 1.6
 * in pairs. Longer tiles load and store the sums less often, which pairs wait for longer than for their products. */
enum { SIDE_BYTES = 6144, TOKENS = 64, PAIRED_TILE = 128, PAIRED_TOKENS = 32 };

/* dy or x: a panel of it is the features of one block row or column. */
typedef struct {
    const char *source;
    const sb_window *window;           /* that its rows are seen through, or NULL */
    const void *zeros;                 /* a row beside the image */
    int64_t stride, features, places; /* features of a row, and the places of the kernel at which they are seen */
    int64_t width, panels;
    int64_t parts; /* that its panels are cut into */
    int32_t *bounds; /* the first panel of every part, and the end */
    int32_t activation; /* taken while it is laid out */
} operand;

typedef struct {
    const sb_sampled *sampled;
    const sb_kernels *kernels;
    operand dy, x;
    const int32_t *ends; /* of every block row's entries, without the rows whose gradient is zero */
    int64_t tile;        /* tokens */
    int paired, x_first; /* x_first: sums are [features of x][features of dy] */
} sampled_job;

/* A living block of a cell, and which of the panels that the cell has in use it multiplies. */
typedef struct {
    int32_t block, row, column;
} entry;

/* An operand's part in a cell. */
typedef struct {
    const operand *of;
    int64_t first, last; /* panels */
    int32_t *used, count; /* those with living blocks */
    char *packed;
} share;

typedef struct {
    share dy, x;
    entry *entries;
    int64_t count;
    float *sums;
    uint16_t *gathered; /* of pairs: a panel of 32 tokens that cannot be laid out from where it lies */
} cell;

/* The first of entries [from, to) at or past a column. */
static int32_t find(const int32_t *cols, int32_t from, int32_t to, int64_t column) {
    while (from < to) {
        const int32_t middle = from + (to - from) / 2;
        if (cols[middle] < column) from = middle + 1;
        else to = middle;
    }
    return from;
}

static share share_of(const operand *o, int64_t part) {
    return (share){.of = o, .first = o->bounds[part], .last = o->bounds[part + 1]};
}

static int64_t count_blocks(const sampled_job *job, const cell *c) {
    const sb_weight *w = &job->sampled->weight;
    int64_t count = 0;
    for (int64_t r = c->dy.first; r < c->dy.last; r++)
        count += find(w->cols, w->crow[r], job->ends[r], c->x.last) - find(w->cols, w->crow[r], job->ends[r], c->x.first);
    return count;
}

/* Numbers the marked panels in order, where the marks are, and lists them. */
static void number(share *s, int32_t *marks) {
    for (int64_t panel = s->first; panel < s->last; panel++)
        if (marks[panel - s->first]) {
            s->used[s->count] = (int32_t)panel;
            marks[panel - s->first] = s->count++;
        }
}

/* Entries are of panels counted from the cell's first ones, and then of those in use. */
static void find_blocks(const sampled_job *job, cell *c, int32_t *marks) {
    const sb_weight *w = &job->sampled->weight;
    int32_t *rows = marks, *columns = marks + (c->dy.last - c->dy.first);
    memset(marks, 0, (size_t)(c->dy.last - c->dy.first + c->x.last - c->x.first) * sizeof *marks);
    entry *e = c->entries;
    for (int64_t r = c->dy.first; r < c->dy.last; r++)
        for (int32_t b = find(w->cols, w->crow[r], job->ends[r], c->x.first);
             b < job->ends[r] && w->cols[b] < c->x.last; b++, e++) {
            *e = (entry){b, (int32_t)(r - c->dy.first), (int32_t)(w->cols[b] - c->x.first)};
            rows[e->row] = columns[e->column] = 1;
        }
    number(&c->dy, rows);
    number(&c->x, columns);
    for (e = c->entries; e < c->entries + c->count; e++) {
        e->row = rows[e->row];
        e->column = columns[e->column];
    }
}

static size_t packed_bytes(const sampled_job *job, const share *s) {
    return sb_align((size_t)((s->last - s->first) * job->tile * s->of->width * (job->paired ? 2 : 4)));
}

/* The rows of `tokens` tokens at a place of the kernel, and of the two after them. */
static void find_rows(const sampled_job *job, const operand *o, int64_t place, int64_t start, int64_t tokens, const void **rows) {
    const int64_t size = sb_size_of(job->sampled->dtype), all = tokens + SB_ROWS_AHEAD;
    const int64_t present = sb_min(all, job->sampled->tokens - start);
    if (o->window) sb_window_rows(o->window, o->source, size, place, start, present, rows);
    for (int64_t t = 0; t < present; t++) {
        if (!o->window) rows[t] = o->source + (start + t) * o->stride * size;
        else if (!rows[t]) rows[t] = o->zeros;
    }
    for (int64_t t = present; t < all; t++) rows[t] = rows[present - 1];
}

/* A run of panels in use, from `from` on, whose features are seen at one place of the kernel: its end, and the first panel
 * there. */
static int64_t end_of_place(const share *s, int64_t from, int64_t *place, int64_t *first) {
    const int64_t panels = s->of->panels / s->of->places;
    *place = s->used[from] / panels;
    *first = *place * panels;
    int64_t end = s->count;
    while (s->used[end - 1] >= *first + panels) end--;
    return end;
}

/* Rows far apart are no stream to the hardware: their next panel is asked for while this one is turned. */
static void fetch_panel(const uint16_t *const *rows, int64_t count, int64_t feature, int64_t width) {
    enum { LINE = 32, AHEAD = 64 }; /* elements */
    for (int64_t t = 0; t < count; t++)
        for (int64_t n = 0; n < width; n += LINE) __builtin_prefetch(rows[t] + feature + n + AHEAD);
}

/* The features of a panel for `tokens` rows, activated unless they are windows; zero past the last of either. */
static void gather(const sampled_job *job, const operand *o, const uint16_t *const *rows, int64_t tokens, int64_t feature,
                   uint16_t *out) {
    const int64_t valid = sb_min(o->width, o->features - feature);
    if (tokens < PAIRED_TOKENS || valid < o->width) memset(out, 0, (size_t)(PAIRED_TOKENS * o->width) * sizeof *out);
    for (int64_t t = 0; o->window && t < tokens; t++)
        memcpy(out + t * o->width, rows[t] + feature, (size_t)valid * sizeof *out);
    if (!o->window)
        job->kernels->activate(SB_BFLOAT16, o->activation, rows[0] + feature, o->stride, tokens, valid, out, o->width);
}

/* Tokens [start, start + tokens) of the panels in use, activated, in pairs: features by tokens for the operand that
 * comes first, pairs of tokens by features for the other. What lies past the last token or feature becomes zero. */
static void lay_out_pairs(const sampled_job *job, const share *s, int64_t start, int64_t tokens, int turned,
                          uint16_t *panel) {
    const operand *o = s->of;
    const uint16_t *gathered[PAIRED_TOKENS];
    const void *found[PAIRED_TOKENS + SB_ROWS_AHEAD];
    for (int64_t t = 0; t < PAIRED_TOKENS; t++) gathered[t] = panel + t * o->width;
    for (int64_t t = 0; t < tokens; t += PAIRED_TOKENS)
        for (int64_t p = 0, end, place, first; p < s->count; p = end) {
            const int64_t present = sb_min(PAIRED_TOKENS, tokens - t);
            end = end_of_place(s, p, &place, &first);
            find_rows(job, o, place, start + t, present, found);
            const uint16_t *rows[PAIRED_TOKENS];
            for (int64_t m = 0; m < present; m++) rows[m] = found[m];
            for (; p < end; p++) {
                const int64_t feature = (s->used[p] - first) * o->width;
                const int whole = present == PAIRED_TOKENS && o->features - feature >= o->width && o->activation == SB_NONE;
                uint16_t *out = (uint16_t *)s->packed + (p * job->tile + t) * o->width;
                if (!o->window) fetch_panel(rows, present, feature, o->width);
                if (!whole) gather(job, o, rows, present, feature, panel);
                (turned ? job->kernels->turn_tokens : job->kernels->pair_tokens)(
                    whole ? rows : gathered, whole ? feature : 0, o->width, out);
            }
        }
}

static void lay_out(const sampled_job *job, const share *s, int64_t start, int64_t tokens) {
    const operand *o = s->of;
    const void *rows[TOKENS + SB_ROWS_AHEAD];
    for (int64_t p = 0, end, place, first; p < s->count; p = end) {
        end = end_of_place(s, p, &place, &first);
        find_rows(job, o, place, start, tokens, rows);
        job->kernels->lay_out(&(sb_panels){
            .rows = rows,
            .out = (float *)s->packed + p * job->tile * o->width,
            .panels = s->used + p,
            .count = end - p,
            .first = first,
            .tokens = tokens,
            .features = o->features,
            .width = o->width,
            .out_stride = job->tile * o->width,
            .dtype = job->sampled->dtype,
            .activation = o->activation,
        });
    }
}

/* Every block's product over a tile of tokens, added to its sums. */
static void add_tile(const sampled_job *job, const cell *c, int64_t tokens) {
    const share *first = job->x_first ? &c->x : &c->dy, *second = job->x_first ? &c->dy : &c->x;
    const int64_t height = first->of->width, width = second->of->width, size = job->paired ? 2 : 4;
    float *out = c->sums;
    for (const entry *e = c->entries; e < c->entries + c->count; e++, out += height * width) {
        const void *a = first->packed + (job->x_first ? e->column : e->row) * job->tile * height * size;
        const void *b = second->packed + (job->x_first ? e->row : e->column) * job->tile * width * size;
        if (job->paired) job->kernels->outer_pairs(a, b, out, tokens, height, width);
        else job->kernels->outer(&(sb_outer){a, b, out, tokens, height, width});
    }
}

static void run_tile(const sampled_job *job, const cell *c, int64_t start) {
    const int64_t tokens = sb_min(job->tile, job->sampled->tokens - start);
    if (!job->paired) {
        lay_out(job, &c->dy, start, tokens);
        lay_out(job, &c->x, start, tokens);
        add_tile(job, c, tokens);
        return;
    }
    lay_out_pairs(job, &c->dy, start, tokens, !job->x_first, c->gathered);
    lay_out_pairs(job, &c->x, start, tokens, job->x_first, c->gathered);
    add_tile(job, c, sb_ceil_div(tokens, PAIRED_TOKENS) * PAIRED_TOKENS);
}

/* Sums to values, turned where they lie otherwise. */
static void store_values(const sampled_job *job, const cell *c) {
    const sb_sampled *s = job->sampled;
    const sb_weight *w = &s->weight;
    const int64_t area = w->block_out * w->block_in, size = sb_size_of(s->dtype);
    const int64_t height = job->x_first ? w->block_in : w->block_out;
    const int turned = job->x_first != (w->out_stride == 1);
    for (int64_t i = 0; i < c->count; i++) {
        char *values = (char *)w->values + c->entries[i].block * area * size;
        float *sums = c->sums + i * area;
        job->kernels->narrow(s->dtype, sums, area, turned ? (void *)sums : values);
        if (turned) job->kernels->transpose((int)size, sums, area / height, height, area / height, values);
    }
}

static int cell_item(const void *context, int64_t item) {
    const sampled_job *job = context;
    const sb_weight *w = &job->sampled->weight;
    cell c = {.dy = share_of(&job->dy, item / job->x.parts), .x = share_of(&job->x, item % job->x.parts)};
    c.count = count_blocks(job, &c);
    if (!c.count) return SB_OK;
    const size_t sums = sb_align((size_t)(c.count * w->block_out * w->block_in) * sizeof *c.sums);
    const size_t dy = packed_bytes(job, &c.dy), x = packed_bytes(job, &c.x);
    const size_t panel = (size_t)(PAIRED_TOKENS * sb_max(w->block_out, w->block_in)) * sizeof(uint16_t);
    const size_t entries = (size_t)c.count * sizeof *c.entries;
    const int64_t rows = c.dy.last - c.dy.first, columns = c.x.last - c.x.first;
    const size_t lists = 2 * (size_t)(rows + columns) * sizeof(int32_t);
    char *memory = sb_scratch(SB_ITEM, sums + dy + x + panel + entries + lists);
    if (!memory) return SB_NO_MEMORY;
    c.sums = (float *)memory;
    c.dy.packed = memory + sums;
    c.x.packed = c.dy.packed + dy;
    c.gathered = (uint16_t *)(c.x.packed + x);
    c.entries = (entry *)((char *)c.gathered + panel);
    c.dy.used = (int32_t *)((char *)c.entries + entries);
    c.x.used = c.dy.used + rows;
    find_blocks(job, &c, c.x.used + columns);
    memset(c.sums, 0, sums);
    if (job->paired) job->kernels->prepare(PAIRED_TOKENS, PAIRED_TOKENS);
    for (int64_t start = 0; start < job->sampled->tokens; start += job->tile) run_tile(job, &c, start);
    if (job->paired) job->kernels->finish();
    store_values(job, &c);
    return SB_OK;
}

static int64_t parts_of(const operand *o, int64_t size) {
    return sb_min(sb_ceil_div(o->panels * o->width * size, SIDE_BYTES), o->panels);
}

/* Cells of both operands, as many for every thread. */
static void cut(sampled_job *job) {
    const int64_t size = job->paired ? 2 : 4, threads = job->sampled->threads;
    job->dy.parts = parts_of(&job->dy, size);
    job->x.parts = parts_of(&job->x, size);
    operand *wide = job->dy.panels * job->dy.width > job->x.panels * job->x.width ? &job->dy : &job->x;
    const int64_t others = wide == &job->x ? job->dy.parts : job->x.parts;
    const int64_t cells = sb_ceil_div(wide->parts * others, threads) * threads;
    wide->parts = sb_min(sb_ceil_div(cells, others), wide->panels);
}

/* Parts of about the same work: each block of a panel multiplies it with `across` features, and laying the panel out takes
 * as long as `laid_out` of them. */
static void share_out(const operand *o, const int32_t *living, int64_t across, int64_t laid_out) {
    int64_t all = 0, before = 0, part = 0;
    for (int64_t p = 0; p < o->panels; p++) all += living[p] ? living[p] * across + laid_out : 0;
    for (int64_t p = 0; p < o->panels; p++) {
        const int64_t own = living[p] ? living[p] * across + laid_out : 0;
        while (part < o->parts && (2 * before + own) * o->parts >= 2 * all * part) o->bounds[part++] = (int32_t)p;
        before += own;
    }
    while (part <= o->parts) o->bounds[part++] = (int32_t)o->panels;
}

/* Values of rows that are left out have no gradient. */
static void clear_rows(const sb_sampled *s, const int32_t *ends, int64_t rows) {
    const sb_weight *w = &s->weight;
    const int64_t block_bytes = w->block_out * w->block_in * sb_size_of(s->dtype);
    for (int64_t r = 0; r < rows; r++)
        memset((char *)w->values + ends[r] * block_bytes, 0, (size_t)((w->crow[r + 1] - ends[r]) * block_bytes));
}

SB_API int sb_run_sampled(const sb_sampled *s) { return sb_run_sampled_rows(s, NULL); }

int sb_run_sampled_rows(const sb_sampled *s, const uint8_t *reads) {
    const sb_weight *w = &s->weight;
    const int64_t rows = sb_ceil_div(w->out_features, w->block_out), columns = sb_ceil_div(w->in_features, w->block_in);
    const sb_window *window = s->window.kernel_h ? &s->window : NULL;
    if (!w->crow[rows]) return SB_OK;
    const size_t lists = (size_t)(2 * (rows + columns + 1) + rows);
    const size_t zeros = window ? (size_t)(window->channels * sb_size_of(s->dtype)) : 0;
    int32_t *memory = calloc(1, lists * sizeof *memory + zeros);
    if (!memory) return SB_NO_MEMORY;
    int32_t *row_blocks = memory, *column_blocks = row_blocks + rows, *ends = column_blocks + columns;
    int32_t *bounds = ends + rows;
    sb_leave_out_rows(w, reads, ends);
    clear_rows(s, ends, rows);
    for (int64_t r = 0; r < rows; r++) {
        row_blocks[r] = ends[r] - w->crow[r];
        for (int32_t b = w->crow[r]; b < ends[r]; b++) column_blocks[w->cols[b]]++;
    }
    sampled_job job = {
        .sampled = s,
        .kernels = sb_kernels_for(s->dtype, s->tokens),
        .ends = ends,
        .dy = {.source = s->grad,
               .stride = s->grad_stride,
               .features = w->out_features,
               .places = 1,
               .width = w->block_out,
               .panels = rows,
               .bounds = bounds},
        .x = {.source = s->x,
              .window = window,
              .zeros = memory + lists,
              .stride = s->x_stride,
              .features = window ? window->channels : w->in_features,
              .places = window ? window->kernel_h * window->kernel_w : 1,
              .width = w->block_in,
              .panels = columns,
              .bounds = bounds + rows + 1,
              .activation = s->activation},
    };
    job.paired = job.kernels->outer_pairs && w->block_out % 16 == 0 && w->block_in % 16 == 0;
    job.tile = job.paired ? PAIRED_TILE : TOKENS;
    /* In pairs what comes first is turned, which takes longer: the narrower one. Else the sums lie as the values do. */
    job.x_first = job.paired ? w->in_features < w->out_features : w->out_stride == 1;
    cut(&job);
    const int64_t laid_out = job.paired ? 160 : 40;
    share_out(&job.dy, row_blocks, w->block_in, laid_out);
    share_out(&job.x, column_blocks, w->block_out, laid_out);
    const int status = sb_parallel(s->threads, job.dy.parts * job.x.parts, cell_item, &job);
    free(memory);
    return status;
}

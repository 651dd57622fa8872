#include "reads.h"
#include "layer.h"

#include <stdlib.h>
#include <string.h>

static int64_t count_rows(const sb_weight *w) { return sb_ceil_div(w->out_features, w->block_out); }

int sb_reads(const uint8_t *reads, int64_t feature, int64_t count) {
    return !reads || memchr(reads + feature / SB_CHUNK, 1, (size_t)sb_ceil_div(count, SB_CHUNK)) != NULL;
}

void sb_find_reads(const sb_weight *w, uint8_t *reads) {
    const int64_t chunks = w->block_in / SB_CHUNK, columns = sb_ceil_div(w->in_features, w->block_in);
    memset(reads, 0, (size_t)(columns * chunks));
    for (int32_t e = w->crow[0]; e < w->crow[count_rows(w)]; e++) memset(reads + w->cols[e] * chunks, 1, (size_t)chunks);
}

int sb_find_gradients(const sb_feed_forward *back, uint8_t **reads) {
    const sb_weight *w = &back->first.weight; /* the second one's, turned: its rows are the hidden features */
    const int64_t width = back->second.weight.block_in, run = sb_max(width, SB_MAX_PANEL), rows = count_rows(w);
    *reads = NULL;
    if (run % width || run % SB_MAX_PANEL) return SB_OK;
    const int64_t features = sb_ceil_div(sb_max(rows * w->block_out, back->second.weight.in_features), run) * run;
    uint8_t *found = *reads = calloc((size_t)(features / SB_CHUNK), 1);
    if (!found) return SB_NO_MEMORY;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = r * w->block_out / run * run, end = sb_ceil_div((r + 1) * w->block_out, run) * run;
        if (w->crow[r + 1] > w->crow[r]) memset(found + first / SB_CHUNK, 1, (size_t)((end - first) / SB_CHUNK));
    }
    return SB_OK;
}

void *sb_leave_out_columns(sb_weight *w, const uint8_t *reads) {
    const int64_t rows = count_rows(w), blocks = w->crow[rows] - w->crow[0];
    int32_t *crow = malloc((size_t)(rows + 1 + 2 * blocks) * sizeof *crow);
    if (!crow) return NULL;
    int32_t *cols = crow + rows + 1, *ids = cols + blocks, count = 0;
    for (int64_t r = 0; r < rows; r++) {
        crow[r] = count;
        for (int32_t e = w->crow[r]; e < w->crow[r + 1]; e++)
            if (sb_reads(reads, w->cols[e] * w->block_in, w->block_in)) {
                cols[count] = w->cols[e];
                ids[count++] = w->ids ? w->ids[e] : e;
            }
    }
    crow[rows] = count;
    w->crow = crow;
    w->cols = cols;
    w->ids = ids;
    return crow;
}

void sb_leave_out_rows(const sb_weight *w, const uint8_t *reads, int32_t *ends) {
    for (int64_t r = 0; r < count_rows(w); r++)
        ends[r] = sb_reads(reads, r * w->block_out, w->block_out) ? w->crow[r + 1] : w->crow[r];
}

/* What was prepared once, of the rows of one call. */
#include "superblock.h"

static void read_rows(sb_product *p, const sb_rows *rows) {
    p->x = rows->x;
    p->x_stride = rows->x_stride;
    p->preactivation = rows->preactivation;
    p->y_stride = p->weight.out_features;
    p->tokens = rows->tokens;
    p->threads = rows->threads;
}

static void write_rows(sb_product *p, const sb_rows *rows) {
    p->residual = rows->residual;
    p->residual_stride = rows->residual_stride;
    p->y = rows->y;
    p->y_stride = p->weight.out_features;
    p->tokens = rows->tokens;
    p->threads = rows->threads;
}

SB_API int sb_run_rows(const sb_product *product, const sb_rows *rows) {
    sb_product whole = *product;
    read_rows(&whole, rows);
    write_rows(&whole, rows);
    return sb_run_product(&whole);
}

SB_API int sb_run_feed_forward_rows(const sb_feed_forward *ff, const sb_rows *rows) {
    sb_feed_forward whole = *ff;
    read_rows(&whole.first, rows);
    write_rows(&whole.second, rows);
    return sb_run_feed_forward(&whole);
}

SB_API int sb_run_self_attention_rows(const sb_self_attention *attention, const sb_rows *rows) {
    sb_self_attention whole = *attention;
    read_rows(&whole.projection, rows);
    write_rows(&whole.output, rows);
    whole.sequences = rows->sequences;
    whole.threads = rows->threads;
    return sb_run_self_attention(&whole);
}

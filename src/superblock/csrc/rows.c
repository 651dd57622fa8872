/* What was prepared once, of the rows of one call. */
#include "superblock.h"

#include <stddef.h>

static sb_product with_rows(const sb_product *product, const sb_rows *rows) {
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
    return p;
}

/* Two products in turn: what only the other one has is taken from each. */
static void split_rows(sb_product *first, sb_product *second, const sb_rows *rows) {
    *first = with_rows(first, rows);
    *second = with_rows(second, rows);
    first->residual = NULL;
    second->preactivation = NULL;
}

SB_API int sb_run_rows(const sb_product *product, const sb_rows *rows) {
    const sb_product whole = with_rows(product, rows);
    return sb_run_product(&whole);
}

SB_API int sb_run_feed_forward_rows(const sb_feed_forward *ff, const sb_rows *rows) {
    sb_feed_forward whole = *ff;
    split_rows(&whole.first, &whole.second, rows);
    return sb_run_feed_forward(&whole);
}

SB_API int sb_run_self_attention_rows(const sb_self_attention *attention, const sb_rows *rows) {
    sb_self_attention whole = *attention;
    split_rows(&whole.projection, &whole.output, rows);
    whole.sequences = rows->sequences;
    whole.threads = rows->threads;
    return sb_run_self_attention(&whole);
}

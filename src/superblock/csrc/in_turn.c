/* Several products in one call: what Python does between two of them comes from the outer caches each time. */
#include "driver.h"
#include "reads.h"

#include <stddef.h>
#include <stdlib.h>

SB_API int sb_run_in_turn(const sb_step *steps, int64_t count) {
    int status = SB_OK;
    for (int64_t i = 0; i < count && status == SB_OK; i++) status = sb_run_rows(steps[i].product, &steps[i].rows);
    return status;
}

SB_API int sb_run_encoder_rows(const sb_encoder_block *blocks, int64_t count, void *between, const sb_rows *rows) {
    for (int64_t i = 0; i < count; i++)
        if (!sb_attends_as_one(blocks[i].attention, rows->tokens, rows->sequences, rows->threads)) return SB_UNSUPPORTED;
    sb_rows own = *rows;
    own.preactivation = NULL;
    for (int64_t i = 0; i < count; i++) {
        const int64_t features = blocks[i].attention->output.weight.out_features;
        own.residual = own.x;
        own.residual_stride = own.x_stride;
        own.y = between;
        const int status = sb_run_self_attention_rows(blocks[i].attention, &own);
        if (status != SB_OK) return status;
        own.x = own.residual = between;
        own.x_stride = own.residual_stride = features;
        own.y = rows->y;
        const int finished = sb_run_feed_forward_rows(blocks[i].feed_forward, &own);
        if (finished != SB_OK) return finished;
        own.x = rows->y;
    }
    return SB_OK;
}

SB_API int sb_run_feed_forward_gradients(const sb_feed_forward *back, const sb_sampled *first, const sb_sampled *second,
                                         const sb_gradient *bias) {
    uint8_t *reads;
    int status = sb_find_gradients(back, &reads);
    if (status == SB_OK) status = sb_run_feed_forward(back);
    if (status == SB_OK && first) status = sb_run_sampled_rows(first, reads);
    free(reads);
    if (status == SB_OK && second) status = sb_run_sampled(second);
    if (status == SB_OK && bias) status = sb_run_activation_gradient(bias);
    return status;
}

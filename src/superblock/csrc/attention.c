/* Scaled dot-product attention on the tiles of the block-sparse products, with the keys and the values as weights.
 *
 * A group of queries is scored against all keys, normalized and multiplied with the values before the next group is
 * touched, so scores never leave the cache; heads are read and written where the projections have them. torch's own
 * kernel takes half of a ViT whose linear layers are 90 % sparse.
 */
#include "layer.h"
#include "parallel.h"

#include <string.h>

typedef struct {
    const sb_attention *a;
    const sb_kernels *kernels;
    int64_t key_panel, value_panel, group, keys, size, packed_size, splits; /* keys: padded to whole panels */
} attention_job;

static int64_t widest_panel(const sb_kernels *kernels, int64_t multiple) {
    for (int64_t panel = 32; panel > 8; panel /= 2)
        if (multiple % panel == 0 && panel / kernels->lanes <= 4 && kernels->groups[panel / kernels->lanes]) return panel;
    return 8;
}

static void copy_rows(const char *from, int64_t stride, int64_t rows, int64_t bytes, char *to) {
    for (int64_t r = 0; r < rows; r++) memcpy(to + r * bytes, from + r * stride, (size_t)bytes);
}

/* Keys by panel, feature-major; values as they are; both followed by zeros up to whole panels. */
static void load_head(const attention_job *job, const char *k, const char *v, char *keys, char *values, char *spare) {
    const sb_attention *a = job->a;
    const int64_t row = a->features * job->size, panel = job->key_panel;
    for (int64_t start = 0; start < job->keys; start += panel) {
        const char *from = k + start * a->k_token * job->size;
        int64_t stride = a->k_token;
        if (start + panel > a->keys) {
            memset(spare, 0, (size_t)(panel * row));
            copy_rows(from, stride * job->size, a->keys - start, row, spare);
            from = spare;
            stride = a->features;
        }
        job->kernels->transpose((int)job->size, from, stride, panel, a->features, keys + start * row);
    }
    copy_rows(v, a->v_token * job->size, a->keys, row, values);
    memset(values + a->keys * row, 0, (size_t)((job->keys - a->keys) * row));
}

static void multiply(const attention_job *job, const void *x, const char *w, int64_t panel, int64_t panels,
                     int64_t panel_step, int64_t features, int64_t row_stride, float *out, int64_t stride) {
    static const int32_t first[] = {0};
    sb_tile tile = {.x = x,
                    .cols = first,
                    .blocks = 1,
                    .chunks = features / SB_CHUNK,
                    .chunk = SB_CHUNK,
                    .row_stride = row_stride,
                    .acc_stride = stride};
    for (int64_t p = 0; p < panels; p++) {
        tile.w = w + p * panel_step * job->size;
        tile.acc = out + p * panel;
        job->kernels->tile(job->a->dtype, panel, job->group, &tile);
    }
}

static void attend(const attention_job *job, const char *q, char *y, int64_t queries, const char *keys,
                   const char *values, char *packed, float *scores) {
    const sb_attention *a = job->a;
    const sb_kernels *kernels = job->kernels;
    const int32_t narrow = job->packed_size == 2;
    for (int64_t start = 0; start < queries; start += job->group) {
        const int64_t count = sb_min(job->group, queries - start);
        const void *rows[SB_MAX_GROUP] = {0};
        for (int64_t m = 0; m < count; m++) rows[m] = q + (start + m) * a->q_token * job->size;
        kernels->pack(a->dtype, rows, job->group, a->features, a->features, SB_CHUNK, packed);
        multiply(job, packed, keys, job->key_panel, job->keys / job->key_panel, job->key_panel * a->features,
                 a->features, job->key_panel, scores, job->keys);
        for (int64_t m = 0; m < job->group; m++) {
            float *row = scores + m * job->keys;
            kernels->softmax(row, a->keys, job->keys, a->scale);
            if (narrow) kernels->narrow(a->dtype, row, job->keys, row);
            rows[m] = row;
        }
        kernels->pack(narrow ? a->dtype : SB_FLOAT32, rows, job->group, job->keys, job->keys, SB_CHUNK, packed);
        multiply(job, packed, values, job->value_panel, a->features / job->value_panel, job->value_panel, job->keys,
                 a->features, scores, a->features);
        for (int64_t m = 0; m < count; m++)
            kernels->narrow(a->dtype, scores + m * a->features, a->features,
                            y + (start + m) * a->y_token * job->size);
    }
}

static int attention_item(const void *context, int64_t item) {
    const attention_job *job = context;
    const sb_attention *a = job->a;
    const int64_t head = item / job->splits, batch = head / a->heads, h = head % a->heads;
    const int64_t each = sb_ceil_div(sb_ceil_div(a->queries, job->group), job->splits) * job->group;
    const int64_t start = item % job->splits * each, queries = sb_min(each, a->queries - start);
    if (queries <= 0) return SB_OK;
    const int64_t widest = sb_max(job->keys, a->features);
    const size_t head_bytes = sb_align((size_t)(job->keys * a->features * job->size));
    const size_t group_bytes = sb_align((size_t)(job->group * widest * 4));
    const size_t spare_bytes = sb_align((size_t)(sb_max(job->group * widest, job->key_panel * a->features) * 4));
    char *keys = sb_scratch(SB_ITEM, 2 * head_bytes + spare_bytes + group_bytes);
    if (!keys) return SB_NO_MEMORY;
    char *values = keys + head_bytes, *packed = values + head_bytes;
    float *scores = (float *)(packed + spare_bytes);
    load_head(job, (const char *)a->k + (batch * a->k_batch + h * a->k_head) * job->size,
              (const char *)a->v + (batch * a->v_batch + h * a->v_head) * job->size, keys, values, packed);
    attend(job, (const char *)a->q + (batch * a->q_batch + h * a->q_head + start * a->q_token) * job->size,
           (char *)a->y + (batch * a->y_batch + h * a->y_head + start * a->y_token) * job->size, queries, keys, values,
           packed, scores);
    return SB_OK;
}

SB_API int sb_run_attention(const sb_attention *a) {
    const int64_t heads = a->batch * a->heads;
    if (!heads || !a->queries) return SB_OK;
    attention_job job = {.a = a, .kernels = sb_kernels_for(a->dtype, 0), .size = sb_size_of(a->dtype)};
    job.packed_size = job.kernels->packed_size[a->dtype];
    job.key_panel = widest_panel(job.kernels, 32);
    job.value_panel = widest_panel(job.kernels, a->features);
    job.keys = sb_ceil_div(a->keys, job.key_panel) * job.key_panel;
    const int64_t most = sb_min(job.kernels->groups[job.key_panel / job.kernels->lanes],
                                job.kernels->groups[job.value_panel / job.kernels->lanes]);
    job.group = sb_ceil_div(a->queries, sb_ceil_div(a->queries, most));
    /* Every part of a head loads its keys and values again: only where there are too few heads for the threads. */
    job.splits = heads % a->threads && heads < 8 * a->threads ? sb_min(a->threads, sb_ceil_div(a->queries, most)) : 1;
    return sb_parallel(a->threads, heads * job.splits, attention_item, &job);
}

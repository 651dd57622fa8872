/* bfloat16 attention of one head on tiles.
 *
 * 32 queries at a time: their scores against a block of keys are tiles of 16 x 16 in float32, a row a query; softmax
 * turns a row into bfloat16 probabilities where it lies, which is how the left tiles of the second product read it.
 * Keys (turned) and values are paired for the right ones once a head. What earlier blocks of keys gave is rescaled when
 * a later one has a larger score.
 */
#include "fetch_ahead.h"
#include "parallel.h"

#include <float.h>

enum {
    GROUP = 2 * SIDE,
    STEP = 2 * SIDE, /* the elements that one product sums */
    LONGEST_BLOCK = 512, /* keys: their scores stay in L2 */
    TILE_BYTES = SIDE * 64,
    SPARE = SIDE /* scores between rows: a power of two would thrash the cache's sets */
};

typedef struct {
    const sb_head *head;
    int64_t keys, features; /* to whole steps of products, to whole tiles */
    int64_t steps;          /* of features */
    int64_t block, stride;  /* keys a block, scores from one row to the next */
    char *key_tiles;        /* [keys / 16][steps][16 pairs of features][16 keys] */
    char *value_tiles;      /* [keys / 32][features / 16][16 pairs of keys][16 features] */
    uint16_t *queries;      /* [32][steps][32] */
    float *scores;          /* [32][stride] */
    float *results;         /* [32][features] */
} tiled_head;

static const uint16_t *row_of(const void *base, int64_t row, int64_t stride) {
    return (const uint16_t *)base + row * stride;
}

/* A step of a row's features, of which `left` are left, and zeros. */
SB_INLINE __m512i load_step(const uint16_t *from, int64_t left) {
    return _mm512_maskz_loadu_epi16(left >= STEP ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1, from);
}

static void pair_keys(const tiled_head *t) {
    const sb_head *h = t->head;
    char *out = t->key_tiles;
    for (int64_t key = 0; key < t->keys; key += SIDE)
        for (int64_t f = 0; f < h->features; f += STEP, out += TILE_BYTES) {
            vec block[SIDE];
            SB_UNROLL for (int i = 0; i < SIDE; i++)
                block[i] = key + i >= h->keys
                               ? splat(0.0f)
                               : (vec)load_step(row_of(h->k, key + i, h->k_token) + f, h->features - f);
            turn(block);
            SB_UNROLL for (int i = 0; i < SIDE; i++) store((float *)out + i * SIDE, block[i]);
        }
}

static void pair_values(const tiled_head *t) {
    static const uint16_t zeros[SIDE];
    const sb_head *h = t->head;
    for (int64_t key = 0; key < t->keys; key += 2)
        for (int64_t f = 0; f < h->features; f += SIDE) {
            const uint16_t *even = key < h->keys ? row_of(h->v, key, h->v_token) + f : zeros;
            const uint16_t *odd = key + 1 < h->keys ? row_of(h->v, key + 1, h->v_token) + f : zeros;
            char *tile = t->value_tiles + (key / STEP * (t->features / SIDE) + f / SIDE) * TILE_BYTES;
            const int64_t left = h->features - f;
            interleave(even, odd, left < SIDE ? left : SIDE, (uint16_t *)(tile + key % STEP / 2 * 64));
        }
}

/* Queries past the last one repeat it. */
static void copy_queries(const tiled_head *t, int64_t start) {
    const sb_head *h = t->head;
    for (int64_t m = 0; m < GROUP; m++) {
        const uint16_t *row = row_of(h->q, start + m < h->queries ? start + m : h->queries - 1, h->q_token);
        for (int64_t f = 0; f < h->features; f += STEP)
            _mm512_storeu_si512(t->queries + m * t->steps * STEP + f, load_step(row + f, h->features - f));
    }
}

/* One product: steps of 64 bytes a row on the left, tiles on the right. */
typedef struct {
    const char *left, *right;
    int64_t steps, left_stride, right_column, right_step; /* bytes */
    float *out;
    int64_t out_stride; /* floats */
} product;

/* out, rows x columns tiles, = left right, or += with `add`. */
SB_INLINE void multiply_tiles(const int rows, const int columns, const int add, product p, fetcher *fetching) {
    const int64_t bytes = p.out_stride * 4;
    start_sums(add, rows, columns, p.out, bytes);
    plan_fetches(fetching, p.steps);
    for (int64_t s = 0; s < p.steps; s++, p.left += 64, p.right += p.right_step) {
        fetch(fetching);
        _tile_loadd(4, p.left, p.left_stride);
        _tile_loadd(6, p.right, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (columns > 1) {
            _tile_loadd(7, p.right + p.right_column, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (rows > 1) {
            _tile_loadd(5, p.left + SIDE * p.left_stride, p.left_stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (rows > 1 && columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
    keep_sums(rows, columns, p.out, bytes);
}

/* Scores of `keys` keys from `first` on, both whole steps. */
SB_INLINE void score(const int rows, const tiled_head *t, int64_t first, int64_t keys, fetcher *fetching) {
    const int64_t column = t->steps * TILE_BYTES;
    for (int64_t key = 0; key < keys; key += 2 * SIDE) {
        const product p = {.left = (const char *)t->queries,
                           .right = t->key_tiles + (first + key) / SIDE * column,
                           .steps = t->steps,
                           .left_stride = t->steps * 64,
                           .right_column = column,
                           .right_step = TILE_BYTES,
                           .out = t->scores + key,
                           .out_stride = t->stride};
        multiply_tiles(rows, 2, 0, p, fetching);
    }
}

/* The values of the same keys by their probabilities. */
SB_INLINE void gather(const int rows, const int add, const tiled_head *t, int64_t first, int64_t keys,
                      fetcher *fetching) {
    const int64_t step = t->features / SIDE * TILE_BYTES;
    for (int64_t f = 0; f < t->features; f += 2 * SIDE) {
        const product p = {.left = (const char *)t->scores,
                           .right = t->value_tiles + first / STEP * step + f / SIDE * TILE_BYTES,
                           .steps = keys / STEP,
                           .left_stride = t->stride * 4,
                           .right_column = TILE_BYTES,
                           .right_step = step,
                           .out = t->results + f,
                           .out_stride = t->features};
        if (t->features - f > SIDE) multiply_tiles(rows, 2, add, p, fetching);
        else multiply_tiles(rows, 1, add, p, fetching);
    }
}

typedef struct {
    float highest[GROUP], total[GROUP], kept[GROUP]; /* kept: what a block leaves of earlier results */
} running;

/* Each row's maximum so far, times `scale`, with its first `count` scores; those after, up to `padded`, become -inf. */
static void raise_highest(const tiled_head *t, int64_t rows, int64_t count, int64_t padded, float scale, running *state,
                          fetcher *fetching) {
    const int64_t whole = count / SIDE * SIDE;
    const __mmask16 valid = (__mmask16)((1u << (count - whole)) - 1);
    for (int64_t m = 0; m < rows; m++) {
        float *scores = t->scores + m * t->stride;
        vec highest = splat(-FLT_MAX);
        plan_fetches(fetching, 1);
        fetch(fetching);
        for (int64_t n = 0; n < whole; n += SIDE) highest = larger(load(scores + n), highest);
        for (int64_t n = whole; n < padded; n += SIDE) {
            const __mmask16 kept = n == whole ? valid : 0;
            const vec last = (vec)_mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), kept, scores + n);
            highest = larger(last, highest);
            store(scores + n, last);
        }
        const float here = _mm512_reduce_max_ps((__m512)highest) * scale, before = state->highest[m];
        state->highest[m] = here > before ? here : before;
        state->kept[m] = before - state->highest[m];
    }
    for (int m = 0; m < GROUP; m += SIDE) store(state->kept + m, power_of_two(load(state->kept + m), 3));
}

/* Scores to probabilities, not yet divided by their sum, in their place. */
static void soften(const tiled_head *t, int64_t rows, int64_t padded, float scale, running *state, fetcher *fetching) {
    for (int64_t m = 0; m < rows; m++) {
        float *scores = t->scores + m * t->stride;
        const float top = state->highest[m];
        vec sum = splat(0.0f);
        plan_fetches(fetching, 1);
        fetch(fetching);
        for (int64_t n = 0; n < padded; n += STEP) {
            const vec low = power_of_two(load(scores + n) * scale - top, 3);
            const vec high = power_of_two(load(scores + n + SIDE) * scale - top, 3);
            sum += low + high;
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            memcpy((uint16_t *)scores + n, &both, sizeof both);
        }
        state->total[m] = state->total[m] * state->kept[m] + _mm512_reduce_add_ps((__m512)sum);
    }
}

static void rescale(int64_t rows, int64_t features, float *results, const float *kept) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t f = 0; f < features; f += SIDE, results += SIDE) store(results, load(results) * kept[m]);
}

static void store_results(const tiled_head *t, int64_t start, int64_t count, const float *total) {
    const sb_head *h = t->head;
    for (int64_t m = 0; m < count; m++) {
        const vec share = splat(1.0f / total[m]);
        for (int64_t f = 0; f < h->features; f += SIDE)
            store_part(SB_BFLOAT16, h->y, (start + m) * h->y_token + f, h->features - f,
                       load(t->results + m * t->features + f) * share);
    }
}

SB_INLINE void attend_group(const int rows, const tiled_head *t, int64_t start, fetcher *fetching) {
    const sb_head *h = t->head;
    const float scale = h->scale * SB_LOG2_E; /* softmax takes powers of two */
    const int64_t count = sb_min(h->queries - start, rows * SIDE);
    running state = {0};
    /* Not -infinity: where all scores of a block are that, a later one still counts. */
    for (int m = 0; m < GROUP; m++) state.highest[m] = -FLT_MAX;
    copy_queries(t, start);
    for (int64_t key = 0; key < h->keys; key += t->block) {
        const int64_t left = sb_min(h->keys - key, t->block), padded = sb_ceil_div(left, STEP) * STEP;
        score(rows, t, key, padded, fetching);
        raise_highest(t, count, left, padded, scale, &state, fetching);
        soften(t, count, padded, scale, &state, fetching);
        if (key) {
            rescale(count, t->features, t->results, state.kept);
            gather(rows, 1, t, key, padded, fetching);
        } else {
            gather(rows, 0, t, key, padded, fetching);
        }
    }
    store_results(t, start, count, state.total);
}

static int attend(const sb_head *head, const sb_head *ahead) {
    const int64_t keys = sb_ceil_div(head->keys, STEP) * STEP, steps = sb_ceil_div(head->features, STEP);
    const int64_t features = sb_ceil_div(head->features, SIDE) * SIDE, blocks = sb_ceil_div(keys, LONGEST_BLOCK);
    const int64_t block = sb_ceil_div(keys / STEP, blocks) * STEP, stride = block + SPARE;
    tiled_head t = {.head = head, .keys = keys, .features = features, .steps = steps, .block = block, .stride = stride};
    const int64_t key_bytes = keys * steps * STEP * 2, value_bytes = keys * features * 2;
    const int64_t query_bytes = GROUP * steps * STEP * 2, row_bytes = GROUP * (stride + features) * 4;
    t.key_tiles = sb_scratch(SB_ITEM, (size_t)(key_bytes + value_bytes + query_bytes + row_bytes));
    if (!t.key_tiles) return SB_NO_MEMORY;
    t.value_tiles = t.key_tiles + key_bytes;
    t.queries = (uint16_t *)(t.value_tiles + value_bytes);
    t.scores = (float *)((char *)t.queries + query_bytes);
    t.results = t.scores + GROUP * stride;
    pair_keys(&t);
    pair_values(&t);
    const int64_t products = keys / STEP * (steps + sb_ceil_div(features, STEP)); /* of a group */
    fetcher fetching;
    fetch_during(&fetching, sb_ceil_div(head->queries, GROUP) * products + 2 * head->queries * blocks, ahead);
    prepare(GROUP, SB_LONGEST_CHUNK);
    for (int64_t start = 0; start < head->queries; start += GROUP) {
        if (head->queries - start > SIDE) attend_group(2, &t, start, &fetching);
        else attend_group(1, &t, start, &fetching);
    }
    finish();
    return SB_OK;
}

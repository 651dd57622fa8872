/* Attention of one head on vectors of queries.
 *
 * Scores and results are kept transposed, [keys][queries] and [features][queries]: softmax's maximum, sum and division
 * are then one operation a vector of queries, and the probabilities are an operand of the second product where they
 * lie. A tile of 8 keys (or features) x 3 vectors of queries needs 11 loads for 24 multiply-adds. Keys are taken in
 * blocks whose scores stay in the core's caches; what earlier blocks gave is rescaled when a later one has a larger
 * score.
 */
#include "fetch_ahead.h"
#include "parallel.h"

#include <float.h>

enum {
    QUERY_VECTORS = 3,
    LONGEST_BLOCK = 256, /* keys */
#if SB_LANES == 16 || defined(__aarch64__)
    TILE_ROWS = 8
#else
    TILE_ROWS = 4 /* of 16 registers, 12 hold sums */
#endif
};

/* Where one head's operands lie, in floats; `width` queries are a group. */
typedef struct {
    float *keys;   /* [keys / 8][features / 8][8 keys][8 features] */
    float *values; /* [features / 8][keys][8 features] */
    float *queries, *results; /* [features][width] */
    float *scores;            /* [keys of a block][width] */
    int64_t padded;           /* keys */
} head_room;

typedef struct {
    vec highest[QUERY_VECTORS], total[QUERY_VECTORS];
} running;

/* Rows of features as floats, [rows / group][features / 8][group][8]; rows past the last one repeat it. */
static void pack_head(int dtype, const void *from, int64_t stride, int64_t rows, int64_t padded, int64_t features,
                      int64_t group, float *wide, float *to) {
    for (int64_t r = 0; r < padded; r++) {
        const void *source = (const char *)from + (r < rows ? r : rows - 1) * stride * size_of(dtype);
        if (dtype != SB_FLOAT32) widen(dtype, source, features, wide);
        const float *row = dtype == SB_FLOAT32 ? source : wide;
        float *out = to + r / group * group * features + r % group * SB_CHUNK;
        for (int64_t f = 0; f < features; f += SB_CHUNK) memcpy(out + f * group, row + f, SB_CHUNK * sizeof(float));
    }
}

/* Queries, transposed; what lies past the last query repeats it. */
SB_INLINE void load_queries_as(int dtype, int64_t vectors, const sb_head *head, int64_t start, float *out) {
    for (int64_t v = 0; v < vectors; v++)
        for (int64_t f = 0; f < head->features; f += SB_LANES) {
            const int64_t left = head->features - f;
            vec block[SB_LANES];
            SB_UNROLL for (int i = 0; i < SB_LANES; i++) {
                const int64_t at = start + v * SB_LANES + i, row = at < head->queries ? at : head->queries - 1;
                block[i] = load_part(dtype, head->q, row * head->q_token + f, left);
            }
            turn(block);
            float *to = out + (f * vectors + v) * SB_LANES;
            SB_UNROLL for (int i = 0; i < SB_LANES; i++)
                if (i < left) store(to + i * vectors * SB_LANES, block[i]);
        }
}

/* Results over the sums of their probabilities, transposed to where the head has them. */
SB_INLINE void store_results_as(int dtype, int64_t vectors, const sb_head *head, int64_t start, const float *results,
                                const running *state) {
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t first = start + v * SB_LANES;
        const vec share = 1.0f / state->total[v];
        for (int64_t f = 0; f < head->features; f += SB_LANES) {
            const int64_t left = head->features - f;
            const float *from = results + (f * vectors + v) * SB_LANES;
            vec block[SB_LANES];
            SB_UNROLL for (int i = 0; i < SB_LANES; i++)
                block[i] = i < left ? load(from + i * vectors * SB_LANES) * share : share;
            turn(block);
            SB_UNROLL for (int i = 0; i < SB_LANES; i++)
                if (first + i < head->queries)
                    store_part(dtype, head->y, (first + i) * head->y_token + f, left, block[i]);
        }
    }
}

static void load_queries(int64_t vectors, const sb_head *head, int64_t start, float *out) {
    SB_OF_DTYPE(head->dtype, load_queries_as, vectors, head, start, out)
}

static void store_results(int64_t vectors, const sb_head *head, int64_t start, const float *results,
                          const running *state) {
    SB_OF_DTYPE(head->dtype, store_results_as, vectors, head, start, results, state)
}

/* sums[r][v] += left[r * left_row] * right[v], one step of a tile. */
SB_INLINE void multiply_step(const int vectors, const float *left, const int left_row, const float *right,
                             vec sums[TILE_ROWS][QUERY_VECTORS]) {
    vec b[QUERY_VECTORS];
    SB_UNROLL for (int v = 0; v < vectors; v++) b[v] = load(right + v * SB_LANES);
    SB_UNROLL for (int r = 0; r < TILE_ROWS; r++) {
        const vec a = splat(left[r * left_row]);
        SB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] += a * b[v];
    }
}

SB_INLINE void clear(const int vectors, vec sums[TILE_ROWS][QUERY_VECTORS]) {
    SB_UNROLL for (int r = 0; r < TILE_ROWS; r++)
        SB_UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = splat(0.0f);
}

/* Scores of 8 keys at a time, and their maximum. Keys past the last one repeat it. */
SB_INLINE void score(const int vectors, int64_t features, int64_t keys, const float *packed, const float *queries,
                     float *scores, running *state, fetcher *fetching) {
    vec highest[QUERY_VECTORS];
    SB_UNROLL for (int v = 0; v < vectors; v++) highest[v] = state->highest[v];
    for (int64_t key = 0; key < keys; key += TILE_ROWS) {
        vec sums[TILE_ROWS][QUERY_VECTORS];
        clear(vectors, sums);
        plan_fetches(fetching, features / SB_CHUNK);
        const float *left = packed + key / SB_CHUNK * SB_CHUNK * features + key % SB_CHUNK * SB_CHUNK, *right = queries;
        for (int64_t f = 0; f < features; f += SB_CHUNK, left += SB_CHUNK * SB_CHUNK) {
            fetch(fetching);
            SB_UNROLL for (int i = 0; i < SB_CHUNK; i++, right += vectors * SB_LANES)
                multiply_step(vectors, left + i, SB_CHUNK, right, sums);
        }
        SB_UNROLL for (int r = 0; r < TILE_ROWS; r++)
            SB_UNROLL for (int v = 0; v < vectors; v++) {
                store(scores + ((key + r) * vectors + v) * SB_LANES, sums[r][v]);
                highest[v] = larger(sums[r][v], highest[v]);
            }
    }
    SB_UNROLL for (int v = 0; v < vectors; v++) state->highest[v] = highest[v];
}

/* Scores to their exponentials, relative to the highest so far, and their sum. The difference comes before the factor:
 * it is exact for the scores that count. */
SB_INLINE void soften(const int vectors, int64_t keys, float scale, float *scores, running *state) {
    vec total[QUERY_VECTORS], highest[QUERY_VECTORS];
    SB_UNROLL for (int v = 0; v < vectors; v++) total[v] = state->total[v], highest[v] = state->highest[v];
    for (int64_t key = 0; key < keys; key++)
        SB_UNROLL for (int v = 0; v < vectors; v++, scores += SB_LANES) {
            const vec e = power_of_two((load(scores) - highest[v]) * scale, 5);
            total[v] += e;
            store(scores, e);
        }
    SB_UNROLL for (int v = 0; v < vectors; v++) state->total[v] = total[v];
}

/* Results of 8 features at a time: the earlier blocks' ones times `kept`, if any, and this block's. */
SB_INLINE void gather(const int vectors, int64_t features, int64_t keys, int64_t padded, const float *packed,
                      const float *scores, const vec *kept, float *results, fetcher *fetching) {
    for (int64_t f = 0; f < features; f += TILE_ROWS) {
        vec sums[TILE_ROWS][QUERY_VECTORS];
        clear(vectors, sums);
        plan_fetches(fetching, sb_ceil_div(keys, SB_CHUNK));
        const float *left = packed + f / SB_CHUNK * SB_CHUNK * padded + f % SB_CHUNK, *right = scores;
        for (int64_t key = 0; key < keys; key++, left += SB_CHUNK, right += vectors * SB_LANES) {
            if (key % SB_CHUNK == 0) fetch(fetching);
            multiply_step(vectors, left, 1, right, sums);
        }
        SB_UNROLL for (int r = 0; r < TILE_ROWS; r++)
            SB_UNROLL for (int v = 0; v < vectors; v++) {
                float *out = results + ((f + r) * vectors + v) * SB_LANES;
                store(out, kept ? load(out) * kept[v] + sums[r][v] : sums[r][v]);
            }
    }
}

SB_INLINE void attend_group(const int vectors, const sb_head *head, const head_room *room, int64_t start,
                            fetcher *fetching) {
    const int64_t each = sb_ceil_div(room->padded / SB_CHUNK, sb_ceil_div(room->padded, LONGEST_BLOCK)) * SB_CHUNK;
    const float scale = head->scale * SB_LOG2_E; /* softmax takes powers of two */
    running state;
    /* Not -infinity: where all scores of a block are that, a later one still counts. */
    SB_UNROLL for (int v = 0; v < vectors; v++) state.highest[v] = splat(-FLT_MAX), state.total[v] = splat(0.0f);
    load_queries(vectors, head, start, room->queries);
    for (int64_t key = 0; key < head->keys; key += each) {
        const int64_t keys = sb_min(head->keys - key, each);
        vec kept[QUERY_VECTORS];
        SB_UNROLL for (int v = 0; v < vectors; v++) kept[v] = state.highest[v];
        score(vectors, head->features, keys, room->keys + key * head->features, room->queries, room->scores, &state,
              fetching);
        SB_UNROLL for (int v = 0; v < vectors; v++) {
            kept[v] = power_of_two((kept[v] - state.highest[v]) * scale, 5);
            state.total[v] *= kept[v];
        }
        soften(vectors, keys, scale, room->scores, &state);
        gather(vectors, head->features, keys, room->padded, room->values + key * SB_CHUNK, room->scores,
               key ? kept : NULL, room->results, fetching);
    }
    store_results(vectors, head, start, room->results, &state);
}

static int attend(const sb_head *head, const sb_head *ahead) {
    enum { WIDTH = QUERY_VECTORS * SB_LANES };
    const int64_t features = head->features, padded = sb_ceil_div(head->keys, SB_CHUNK) * SB_CHUNK;
    const int64_t block = sb_min(padded, LONGEST_BLOCK);
    const int64_t floats = 2 * (padded + WIDTH) * features + block * WIDTH;
    head_room room = {.keys = sb_scratch(SB_ITEM, (size_t)floats * sizeof(float)), .padded = padded};
    if (!room.keys) return SB_NO_MEMORY;
    room.values = room.keys + padded * features;
    room.queries = room.values + padded * features;
    room.results = room.queries + WIDTH * features;
    room.scores = room.results + WIDTH * features;
    pack_head(head->dtype, head->k, head->k_token, head->keys, padded, features, SB_CHUNK, room.results, room.keys);
    pack_head(head->dtype, head->v, head->v_token, head->keys, padded, features, padded, room.results, room.values);
    int64_t vectors = sb_ceil_div(head->queries, SB_LANES), groups = sb_ceil_div(vectors, QUERY_VECTORS);
    fetcher fetching;
    fetch_during(&fetching, groups * (padded / TILE_ROWS) * (features / SB_CHUNK) * 2, ahead);
    for (int64_t start = 0; groups; groups--) {
        const int64_t now = sb_ceil_div(vectors, groups);
        if (now == 3) attend_group(3, head, &room, start, &fetching);
        else if (now == 2) attend_group(2, head, &room, start, &fetching);
        else attend_group(1, head, &room, start, &fetching);
        start += now * SB_LANES;
        vectors -= now;
    }
    return SB_OK;
}

/* bfloat16 attention of one head on tiles.
 *
 * Keys (turned) and values are paired for the right-hand tiles once a head. Of a run of queries, 16 at a time, the scores
 * against a block of keys come first: tiles in float32, a row a query, which become bfloat16 probabilities between the
 * products of the next tiles. Then their products with the values follow, so that the keys have had L1 to themselves, and
 * now the values.
 *
 * Softmax is the same for any number taken from a query's scores. None is, where the lengths of queries and keys say that
 * no power can leave the range of float32. Else the scores are multiplied twice, first for the highest: to keep them
 * would take more of L1 than there is. What earlier blocks of keys gave is rescaled when a later one has a higher score.
 */
#include "fetch_ahead.h"
#include "parallel.h"

#include <float.h>

enum {
    STEP = 2 * SIDE,     /* the elements that one product sums */
    ACROSS = 4 * SIDE,   /* columns of four tiles */
    LONGEST_BLOCK = 512, /* keys: a run's probabilities stay in L2 */
    LONGEST_RUN = 256,   /* queries */
    TILE_BYTES = SIDE * 64
};

typedef struct {
    const sb_head *head;
    int64_t steps, columns;  /* of features: products that sum them, tiles across */
    int64_t share;           /* probabilities from one row to the next */
    char *key_tiles;         /* [keys / 16][steps][16 pairs of features][16 keys] */
    char *value_tiles;       /* [keys / 32][columns][16 pairs of keys][16 features] */
    uint16_t *queries;       /* [16][steps][32] */
    uint16_t *shares;        /* [queries of the run][share] */
    float *sums[2];          /* [16][64], of a tile that is finished and the one after it */
    float *lanes;            /* [queries of the run][16]: maxima or sums of a row so far */
    float *results;          /* [queries of the run][columns][16], where there are several blocks of keys */
    float longest_key;       /* its square */
    float highest[LONGEST_RUN], total[LONGEST_RUN], kept[LONGEST_RUN]; /* kept: what a block leaves of earlier results */
} tiled_head;

static int64_t whole(int64_t count, int64_t step) { return sb_ceil_div(count, step) * step; }

/* Lines from one row to the next in an odd number: a power of two would thrash the cache's sets. */
static int64_t odd_lines(int64_t lines) { return lines | 1; }

static const uint16_t *row_of(const void *base, int64_t row, int64_t stride) {
    return (const uint16_t *)base + row * stride;
}

/* A step of a row's features, of which `left` are left, and zeros. */
SB_INLINE __m512i load_step(const uint16_t *from, int64_t left) {
    if (left >= STEP) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16(((__mmask32)1 << left) - 1, from);
}

/* To whole products of scores; the longest key's length is noted. */
static void pair_keys(tiled_head *t) {
    const sb_head *h = t->head;
    char *out = t->key_tiles;
    vec longest = splat(0.0f);
    for (int64_t key = 0; key < whole(h->keys, ACROSS); key += SIDE) {
        vec squares[4] = {{0}};
        for (int64_t f = 0; f < h->features; f += STEP, out += TILE_BYTES) {
            vec block[SIDE];
            SB_UNROLL for (int i = 0; i < SIDE; i++)
                block[i] = key + i >= h->keys
                               ? splat(0.0f)
                               : (vec)load_step(row_of(h->k, key + i, h->k_token) + f, h->features - f);
            turn(block);
            SB_UNROLL for (int i = 0; i < SIDE; i++) {
                store((float *)out + i * SIDE, block[i]);
                squares[i % 4] = (vec)_mm512_dpbf16_ps((__m512)squares[i % 4], (__m512bh)block[i], (__m512bh)block[i]);
            }
        }
        longest = larger(longest, (squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
    t->longest_key = _mm512_reduce_max_ps((__m512)longest);
}

static void pair_values(const tiled_head *t) {
    static const uint16_t zeros[SIDE];
    const sb_head *h = t->head;
    for (int64_t key = 0; key < whole(h->keys, STEP); key += 2) {
        const uint16_t *even = row_of(h->v, key, h->v_token), *odd = even + h->v_token;
        char *out = t->value_tiles + key / STEP * t->columns * TILE_BYTES + key % STEP / 2 * 64;
        for (int64_t f = 0; f < h->features; f += SIDE, out += TILE_BYTES) {
            const uint16_t *low = key < h->keys ? even + f : zeros, *high = key + 1 < h->keys ? odd + f : zeros;
            if (h->features - f >= SIDE) interleave(low, high, SIDE, (uint16_t *)out);
            else interleave(low, high, h->features - f, (uint16_t *)out);
        }
    }
}

/* Queries past the last one repeat it. */
static void copy_queries(const tiled_head *t, int64_t start) {
    const sb_head *h = t->head;
    const int64_t row_bytes = t->steps * 64, last = sb_min(SIDE, h->queries - start) - 1;
    for (int64_t f = 0; f < h->features; f += STEP)
        for (int64_t m = 0; m < SIDE; m++)
            _mm512_storeu_si512((char *)t->queries + m * row_bytes + f * 2,
                                load_step(row_of(h->q, start + sb_min(m, last), h->q_token) + f, h->features - f));
}

/* Whether all powers of two of these queries' scores, and their sums, are normal numbers: |q k| <= |q| |k|. */
static int is_moderate(const tiled_head *t, int64_t start, int64_t queries) {
    const sb_head *h = t->head;
    const float limit = 60.0f / (h->scale * SB_LOG2_E);
    for (int64_t m = start; m < start + queries; m++) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t f = 0; f < h->features; f += STEP) {
            const __m512bh part = (__m512bh)load_step(row_of(h->q, m, h->q_token) + f, h->features - f);
            squares = _mm512_dpbf16_ps(squares, part, part);
        }
        if (!(_mm512_reduce_add_ps(squares) * t->longest_key < limit * limit)) return 0;
    }
    return 1;
}

/* Products of one tile on the left with four on the right. */
typedef struct {
    const char *left, *right[4];
    int64_t steps, left_stride, right_step; /* bytes; a step of the left tile is 64 */
} product;

/* Where the rows of a tile begin, and how many there are; queries count from the run's first. */
typedef struct {
    int64_t query, column, rows;
} tile_rows;

/* One product after the other, each of which stores the last one's sums; what these are for is finished meanwhile. */
typedef struct stream {
    tiled_head *head;
    void (*finish)(const struct stream *, int64_t row, int64_t count);
    fetcher *fetching;
    int number;
    /* Rows are finished a product after their sums are stored: what a tile stores must reach L1 before it can be read. */
    tile_rows now, next;
    int64_t row, pace;         /* the next of them, and how many at a time */
    int64_t start;             /* the run's first query */
    int64_t keys, first, last; /* of this block; whether it is the first one, the last */
    int moderate;
} stream;

SB_INLINE void finish_some(stream *k) {
    const int64_t count = sb_min(k->pace, k->now.rows - k->row);
    if (!count) return;
    plan_fetches(k->fetching, 1);
    k->finish(k, k->row, count);
    fetch(k->fetching);
    k->row += count;
}

#define LEFT _tile_loadd(5, left, p->left_stride);
#define RIGHT(i, tile) _tile_loadd(tile, p->right[i] + at, 64);
#define STREAM_TURN(name, a0, a1, a2, a3, a4)                                             \
    static void name(stream *k, const product *p) {                                       \
        const char *left = p->left;                                                       \
        enum { sums_bytes = ACROSS * 4 };                                                 \
        float *const sums = k->head->sums[1];                                             \
        int64_t at = 0;                                                                   \
        LEFT RIGHT(0, 6) START(a0, 6, a1, 0) RIGHT(1, 7) START(a1, 7, a2, 16)             \
        RIGHT(2, 6) START(a2, 6, a3, 32) RIGHT(3, 7) START(a3, 7, a4, 48)                 \
        finish_some(k);                                                                   \
        for (int64_t step = 1; step < p->steps; step++) {                                 \
            left += 64, at += p->right_step;                                              \
            LEFT RIGHT(0, 6) MORE(a0, 6) RIGHT(1, 7) MORE(a1, 7)                          \
            RIGHT(2, 6) MORE(a2, 6) RIGHT(3, 7) MORE(a3, 7)                               \
            finish_some(k);                                                               \
        }                                                                                 \
    }
#define STREAM_END(name, a0, a1, a2, a3, a4)                                              \
    static void name(const stream *k) {                                                   \
        float *const sums = k->head->sums[1];                                             \
        _tile_stored(a1, sums, ACROSS * 4);                                               \
        _tile_stored(a2, sums + SIDE, ACROSS * 4);                                        \
        _tile_stored(a3, sums + 2 * SIDE, ACROSS * 4);                                    \
        _tile_stored(a4, sums + 3 * SIDE, ACROSS * 4);                                    \
    }
EVERY_TURN(STREAM_TURN, stream)
EVERY_TURN(STREAM_END, end)

static void finish_all(stream *k) {
    k->pace = SIDE;
    finish_some(k);
}

/* What was stored is finished next, and what was multiplied stored. */
static void move_on(stream *k, tile_rows multiplied) {
    float *const finished = k->head->sums[0];
    finish_all(k);
    k->head->sums[0] = k->head->sums[1];
    k->head->sums[1] = finished;
    k->now = k->next;
    k->next = multiplied;
    k->row = 0;
}

static void multiply_next(stream *k, const product *p, tile_rows rows) {
    static void (*const turns[])(stream *, const product *) = TURNS_OF(stream);
    k->pace = sb_ceil_div(k->now.rows, p->steps);
    turns[k->number](k, p);
    k->number = next_turn(k->number);
    move_on(k, rows);
}

/* Nothing follows the last product. */
static void end_stream(stream *k) {
    static void (*const ends[])(const stream *) = TURNS_OF(end);
    ends[k->number](k);
    move_on(k, (tile_rows){0});
    move_on(k, (tile_rows){0});
}

/* The lanes of a half of the last STEP keys that hold any. */
static __mmask16 lanes_of(int64_t keys) { return (__mmask16)(keys >= SIDE ? 0xffff : keys <= 0 ? 0 : (1u << keys) - 1); }

/* The highest scores of some rows so far, by lanes. */
static void raise(const stream *k, int64_t row, int64_t count) {
    const tiled_head *t = k->head;
    const int64_t left = sb_min(ACROSS, k->keys - k->now.column);
    const float *scores = t->sums[0] + row * ACROSS;
    float *lanes = t->lanes + (k->now.query + row) * SIDE;
    for (; count; count--, scores += ACROSS, lanes += SIDE) {
        /* Not -infinity: where all scores of a block are that, a later one still counts. */
        vec highest = k->now.column ? load(lanes) : splat(-FLT_MAX);
        for (int64_t n = 0; n < left; n += SIDE) {
            const __m512 before = (__m512)highest, here = _mm512_loadu_ps(scores + n);
            highest = (vec)_mm512_mask_max_ps(before, lanes_of(left - n), here, before);
        }
        store(lanes, highest);
    }
}

/* By what the scores of a block of keys are lowered, and what that leaves of earlier results. */
static void note_highest(const stream *k, int64_t queries) {
    tiled_head *t = k->head;
    for (int64_t q = 0; q < queries; q++) {
        const float here = k->moderate ? 0.0f : _mm512_reduce_max_ps(_mm512_loadu_ps(t->lanes + q * SIDE)) * t->head->scale * SB_LOG2_E;
        const float before = k->first ? here : t->highest[q];
        t->highest[q] = here > before ? here : before;
        t->kept[q] = k->first || k->moderate ? 1.0f : power_of_two(splat(before - t->highest[q]), 3)[0];
    }
}

/* Scores of some rows to probabilities, not yet divided by their sum: STEP keys, of which `left` exist. What is summed are
 * the rounded ones, so that a share that is nearly all stays so. */
SB_INLINE vec soften_step(const int moderate, const int full, const float *scores, int64_t left, float scale, float top,
                          uint16_t *shares, vec sum) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    const vec first = load(scores), second = load(scores + SIDE);
    vec low = moderate ? moderate_power(first * scale, 3) : power_of_two(first * scale - top, 3);
    vec high = moderate ? moderate_power(second * scale, 3) : power_of_two(second * scale - top, 3);
    if (!full) {
        low = (vec)_mm512_maskz_mov_ps(lanes_of(left), (__m512)low);
        high = (vec)_mm512_maskz_mov_ps(lanes_of(left - SIDE), (__m512)high);
    }
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    _mm512_storeu_si512(shares, (__m512i)both);
    return (vec)_mm512_dpbf16_ps((__m512)sum, both, ones);
}

SB_INLINE void soften_rows(const int moderate, const int full, const stream *k, int64_t row, int64_t count) {
    const tiled_head *t = k->head;
    const int64_t q = k->now.query + row, left = k->keys - k->now.column, share = t->share, column = k->now.column;
    const float *scores = t->sums[0] + row * ACROSS, *top = t->highest + q, scale = t->head->scale * SB_LOG2_E;
    float *lanes = t->lanes + q * SIDE;
    uint16_t *shares = t->shares + q * share + column;
    for (; count; count--, scores += ACROSS, lanes += SIDE, shares += share, top++) {
        vec sum = column ? load(lanes) : splat(0.0f);
        sum = soften_step(moderate, full, scores, left, scale, *top, shares, sum);
        if (full || left > STEP)
            sum = soften_step(moderate, full, scores + STEP, left - STEP, scale, *top, shares + STEP, sum);
        store(lanes, sum);
    }
}

static void soften(const stream *k, int64_t row, int64_t count) {
    const int full = k->keys - k->now.column >= ACROSS;
    if (k->moderate && full) soften_rows(1, 1, k, row, count);
    else if (k->moderate) soften_rows(1, 0, k, row, count);
    else if (full) soften_rows(0, 1, k, row, count);
    else soften_rows(0, 0, k, row, count);
}

static void note_totals(const stream *k, int64_t queries) {
    tiled_head *t = k->head;
    for (int64_t q = 0; q < queries; q++) {
        const float here = sum_of_lanes(load(t->lanes + q * SIDE));
        t->total[q] = k->first ? here : t->total[q] * t->kept[q] + here;
    }
}

/* Sums of one block of keys: added to those before, and of the last one the results. */
SB_INLINE void place_rows(const int only, const stream *k, int64_t row, int64_t count) {
    const tiled_head *t = k->head;
    const sb_head *h = t->head;
    const int64_t end = sb_min(h->features, k->now.column + ACROSS);
    for (; count; count--, row++) {
        const int64_t q = k->now.query + row, at = (k->start + q) * h->y_token;
        const float *sums = t->sums[0] + row * ACROSS;
        float *results = t->results + q * t->columns * SIDE;
        const vec share = splat(1.0f / t->total[q]);
        for (int64_t f = k->now.column; f < end; f += SIDE, sums += SIDE) {
            vec all = load(sums);
            if (!only && !k->first) all += load(results + f) * t->kept[q];
            if (only || k->last) store_part(SB_BFLOAT16, h->y, at + f, h->features - f, all * share);
            else store(results + f, all);
        }
    }
}

static void place(const stream *k, int64_t row, int64_t count) {
    if (k->first && k->last) place_rows(1, k, row, count);
    else place_rows(0, k, row, count);
}

/* The scores of a run of queries against a block of keys, each of which is then finished. */
static void score(stream *k, void (*finish)(const stream *, int64_t, int64_t), int64_t first, int64_t queries) {
    const tiled_head *t = k->head;
    const int64_t column = t->steps * TILE_BYTES;
    k->finish = finish;
    for (int64_t q = 0; q < queries; q += SIDE) {
        copy_queries(t, k->start + q);
        for (int64_t key = 0; key < k->keys; key += ACROSS) {
            const char *right = t->key_tiles + (first + key) / SIDE * column;
            const product p = {.left = (const char *)t->queries,
                               .right = {right, right + column, right + 2 * column, right + 3 * column},
                               .steps = t->steps,
                               .left_stride = t->steps * 64,
                               .right_step = TILE_BYTES};
            multiply_next(k, &p, (tile_rows){q, key, sb_min(SIDE, queries - q)});
        }
    }
    end_stream(k);
}

/* The values of these keys by the probabilities. */
static void gather(stream *k, int64_t first, int64_t queries) {
    const tiled_head *t = k->head;
    const char *values = t->value_tiles + first / STEP * t->columns * TILE_BYTES;
    k->finish = place;
    for (int64_t q = 0; q < queries; q += SIDE)
        for (int64_t column = 0; column < t->columns; column += 4) {
            product p = {.left = (const char *)(t->shares + q * t->share),
                         .steps = sb_ceil_div(k->keys, STEP),
                         .left_stride = t->share * 2,
                         .right_step = t->columns * TILE_BYTES};
            /* Past the last column any tile will do. */
            for (int i = 0; i < 4; i++) p.right[i] = values + (column + i < t->columns ? column + i : column) * TILE_BYTES;
            multiply_next(k, &p, (tile_rows){q, column * SIDE, sb_min(SIDE, queries - q)});
        }
    end_stream(k);
}

static int attend(const sb_head *head, const sb_head *ahead) {
    const int64_t keys = whole(head->keys, ACROSS), steps = sb_ceil_div(head->features, STEP);
    const int64_t columns = sb_ceil_div(head->features, SIDE), blocks = sb_ceil_div(keys, LONGEST_BLOCK);
    const int64_t block = sb_ceil_div(keys / ACROSS, blocks) * ACROSS, run = sb_min(whole(head->queries, SIDE), LONGEST_RUN);
    tiled_head t = {.head = head, .steps = steps, .columns = columns, .share = odd_lines(block / STEP) * STEP};
    const int64_t key_bytes = keys * steps * STEP * 2, value_bytes = keys * columns * SIDE * 2, query_bytes = SIDE * steps * 64;
    const int64_t share_bytes = run * t.share * 2, sum_bytes = SIDE * ACROSS * 4, lane_bytes = run * SIDE * 4;
    const int64_t result_bytes = blocks > 1 ? run * columns * SIDE * 4 : 0;
    t.key_tiles = sb_scratch(SB_ITEM, (size_t)(key_bytes + value_bytes + query_bytes + share_bytes + 2 * sum_bytes +
                                               lane_bytes + result_bytes));
    if (!t.key_tiles) return SB_NO_MEMORY;
    t.value_tiles = t.key_tiles + key_bytes;
    t.queries = (uint16_t *)(t.value_tiles + value_bytes);
    t.shares = (uint16_t *)((char *)t.queries + query_bytes);
    t.sums[0] = (float *)((char *)t.shares + share_bytes);
    t.sums[1] = t.sums[0] + SIDE * ACROSS;
    t.lanes = t.sums[1] + SIDE * ACROSS;
    t.results = t.lanes + run * SIDE;
    pair_keys(&t);
    fetcher fetching;
    const int64_t products = keys / ACROSS * steps + sb_ceil_div(columns, 4) * (keys / STEP); /* of 16 queries */
    fetch_during(&fetching, sb_ceil_div(head->queries, SIDE) * products, ahead);
    prepare(STEP, SB_LONGEST_CHUNK);
    stream k = {.head = &t, .fetching = &fetching};
    for (k.start = 0; k.start < head->queries; k.start += run) {
        const int64_t queries = sb_min(run, head->queries - k.start);
        k.moderate = is_moderate(&t, k.start, queries);
        for (int64_t key = 0; key < head->keys; key += block) {
            k.keys = sb_min(block, head->keys - key);
            k.first = !key;
            k.last = key + block >= head->keys;
            if (!k.moderate) score(&k, raise, key, queries);
            note_highest(&k, queries);
            score(&k, soften, key, queries);
            note_totals(&k, queries);
            if (!k.start && !key) pair_values(&t); /* they have L1 to themselves now */
            gather(&k, key, queries);
        }
    }
    finish();
    return SB_OK;
}

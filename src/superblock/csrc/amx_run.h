/* How AMX walks a layer: one stream of products, in which every tile is finished while the next one multiplies.
 *
 * A tile is wide, 16 tokens by 64 outputs, or tall, 32 by 32. The wide one reads the tokens once, past the weights of
 * its strip in L1, and writes 16 pages at a time, which is what the processor remembers for stores. Where weights come
 * from L2 as well, it would read five tiles for four products: the tall one reads four.
 */

enum { WIDE = 4 * SIDE, TALL = 2 * SIDE };

/* A run of 16, 32 or 64 outputs of one block row, and the tokens of the group. */
typedef struct {
    const char *x, *w;
    const int32_t *cols;
    int64_t blocks, chunks; /* chunks a block */
    int64_t column_bytes;   /* of the weights of 16 outputs */
    int64_t row_bytes;      /* from a token to the next */
} part;

/* The outputs of a tile. */
typedef struct {
    part parts[4];
    int64_t column, outputs; /* the first output, and how many there are: the last strip may not be full */
    int64_t width;           /* how many of them are a part's */
    int64_t steps;           /* chunks that every part has */
} strip;

typedef struct walk {
    const sb_layer *layer;
    const sb_target *target;
    void (*finish)(const struct walk *, int64_t row, int64_t count);
    int64_t outputs; /* of a tile */
    int turn;        /* which register the next tile starts on */
    float *sums;     /* of the last tile, and where it was */
    int64_t column, columns, token, rows;
    int64_t left, pace; /* rows of it to be finished, rows at a time */
    const char *ahead;  /* the next strip's weights, and how many of their lines are fetched a step */
    int64_t ahead_lines;
} walk;

SB_INLINE vec half_line(const void *line, int half) { return load_as(SB_BFLOAT16, line, half * SB_LANES); }

/* Rows of whole strips: whole lines, which the results of two vectors fill. */
SB_INLINE void store_line(const int stream, uint16_t *line, vec low, vec high) {
    const __m512i all = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    if (stream) _mm512_stream_si512((void *)line, all);
    else _mm512_storeu_si512(line, all);
}

SB_INLINE void finish_lines(int activation, const int residual, const int preactivation, const int packed,
                            const int stream, const walk *k, int64_t row, int64_t count) {
    const sb_target *t = k->target;
    const int64_t token = k->token + row;
    for (int64_t line = 0; line < k->outputs; line += 32) {
        const int64_t column = k->column + line, stride = packed ? 32 : t->y_stride;
        const float *sums = k->sums + row * k->outputs + line;
        const uint16_t *bias = t->bias ? (const uint16_t *)t->bias + column : NULL;
        const vec low = bias ? half_line(bias, 0) : splat(0.0f), high = bias ? half_line(bias, 1) : splat(0.0f);
        uint16_t *y = packed ? (uint16_t *)t->next + k->token * t->next_padded + column * t->group + row * 32
                             : (uint16_t *)t->y + token * stride + column;
        uint16_t *z = preactivation ? (uint16_t *)t->preactivation + token * t->y_stride + column : NULL;
        const uint16_t *r = residual ? (const uint16_t *)t->residual + token * t->residual_stride + column : NULL;
        const int64_t ahead = residual ? t->group * t->residual_stride : 0, y_ahead = t->group * stride;
        for (int64_t m = 0; m < count; m++, sums += k->outputs, y += stride) {
            if (residual) __builtin_prefetch(r + ahead);
            if (!stream && !packed) __builtin_prefetch(y + y_ahead, 1);
            vec first = load(sums) + low, second = load(sums + SB_LANES) + high;
            if (residual == RESIDUAL_FIRST) first += half_line(r, 0), second += half_line(r, 1);
            if (preactivation) store_line(stream, z, first, second);
            first = activate(SB_BFLOAT16, activation, first), second = activate(SB_BFLOAT16, activation, second);
            if (residual == RESIDUAL_LAST) first += half_line(r, 0), second += half_line(r, 1);
            store_line(stream && !packed, y, first, second);
            if (preactivation) z += t->y_stride;
            if (residual) r += t->residual_stride;
        }
    }
}

typedef void (*finisher)(const walk *, int64_t row, int64_t count);

#define FINISH_OF(name, activation, ...)                           \
    static void name(const walk *k, int64_t row, int64_t count) { \
        finish_lines(activation, __VA_ARGS__, k, row, count);      \
    }
/* By activation. */
#define FINISH(name, ...)                                                                                           \
    FINISH_OF(name##_none, SB_NONE, __VA_ARGS__)                                                                    \
    FINISH_OF(name##_relu, SB_RELU, __VA_ARGS__)                                                                    \
    FINISH_OF(name##_gelu, SB_GELU, __VA_ARGS__)                                                                    \
    FINISH_OF(name##_tanh, SB_GELU_TANH, __VA_ARGS__)                                                               \
    FINISH_OF(name##_silu, SB_SILU, __VA_ARGS__)                                                                    \
    static const finisher name[] = {[SB_NONE] = name##_none, [SB_RELU] = name##_relu, [SB_GELU] = name##_gelu,      \
                                    [SB_GELU_TANH] = name##_tanh, [SB_SILU] = name##_silu};

FINISH(finish_plain, NO_RESIDUAL, 0, 0, 0)
FINISH(finish_streamed, NO_RESIDUAL, 0, 0, 1)
FINISH(finish_packed, NO_RESIDUAL, 0, 1, 0)
FINISH(finish_packed_training, NO_RESIDUAL, 1, 1, 0)
FINISH(finish_packed_training_streamed, NO_RESIDUAL, 1, 1, 1)
FINISH(finish_training, NO_RESIDUAL, 1, 0, 0)
FINISH(finish_training_streamed, NO_RESIDUAL, 1, 0, 1)
FINISH(finish_residual_first, RESIDUAL_FIRST, 0, 0, 0)
FINISH(finish_residual_last, RESIDUAL_LAST, 0, 0, 0)

/* All rows at once, of strips that are not whole and what is left of the cases. */
static void finish_any(const walk *k, int64_t row, int64_t count) {
    (void)count;
    if (row) return;
    sb_epilogue e = sb_layer_epilogue(k->layer, k->target, k->column, k->columns);
    sb_layer_place(k->layer, k->target, k->token, k->column, &e);
    e.acc = k->sums;
    e.acc_stride = k->outputs;
    e.stream = 0;
    epilogue(&e);
}

static void finish_rows(walk *k) {
    const int64_t count = k->left < k->pace ? k->left : k->pace, row = k->rows - k->left;
    const int64_t end = k->column + k->outputs;
    if (k->columns == k->outputs && end <= k->layer->weight.out_features) k->finish(k, row, count);
    else finish_any(k, row, count);
    k->left -= count;
}

/* What L2 does not hold beside the tokens comes from L3 for every tile of them, while the strip before multiplies. */
SB_INLINE void fetch_weights(walk *k) {
    for (int64_t n = 0; n < k->ahead_lines; n++, k->ahead += 64) __builtin_prefetch(k->ahead, 0, 2);
}

/* The tokens of a half group and part i, and then by them the weights of one sum each. */
#define TOKENS_OF(i, half, load) \
    load(5, p[i].x + p[i].cols[block] * unit_bytes + chunk * chunk_bytes + (half) * SIDE * p[i].row_bytes, p[i].row_bytes);
#define WEIGHTS_OF(i, n, weights) _tile_loadd(weights, p[i].w + at + (n) * p[i].column_bytes, SIDE * 4);

/* The steps that all parts have, the first of them done; the last tile's rows are finished in between. */
#define COMMON_STEPS(products)                        \
    for (int64_t step = 1; step < s->steps; step++) { \
        if (k->left) finish_rows(k);                  \
        fetch_weights(k);                             \
        at += weight_bytes;                           \
        if (++chunk == chunks) block++, chunk = 0;    \
        products                                      \
    }
/* Those that part i has beyond. */
#define OTHER_STEPS(i, products)                                                                  \
    block = s->steps / p[i].chunks, chunk = s->steps % p[i].chunks, at = s->steps * weight_bytes; \
    for (; block < p[i].blocks; at += weight_bytes) {                                             \
        products                                                                                  \
        if (++chunk == p[i].chunks) block++, chunk = 0;                                           \
    }

#define TURN(name, tile_outputs, body)                                                                        \
    static void name(walk *k, const strip *s) {                                                               \
        enum { outputs = tile_outputs, sums_bytes = outputs * 4 };                                            \
        const part *p = s->parts;                                                                             \
        float *const sums = k->sums;                                                                          \
        const int64_t weight_bytes = k->layer->chunk / 2 * SIDE * 4;                                          \
        const int64_t chunk_bytes = k->target->x.chunk_stride * 2, chunks = p[0].chunks;                      \
        const int64_t unit_bytes = k->target->x.column_stride * 2; /* of what columns count in */               \
        int64_t block = 0, chunk = 0, at = 0;                                                                 \
        body                                                                                                  \
        while (k->left) finish_rows(k);                                                                       \
    }

/* Sums are in a0 to a3; those of the last tile are in a1 to a4. */
#define WIDE_4(use0, use1, use2, use3)                                                    \
    TOKENS_OF(0, 0, _tile_stream_loadd) WEIGHTS_OF(0, 0, 6) use0 WEIGHTS_OF(0, 1, 7) use1 \
    WEIGHTS_OF(0, 2, 6) use2 WEIGHTS_OF(0, 3, 7) use3
#define WIDE_2(i, use0, use1) \
    TOKENS_OF(i, 0, _tile_stream_loadd) WEIGHTS_OF(i, 0, 6) use0 WEIGHTS_OF(i, 1, 7) use1
#define WIDE_1(i, weights, use) TOKENS_OF(i, 0, _tile_loadd) WEIGHTS_OF(i, 0, weights) use
#define WIDE_TURN(name, a0, a1, a2, a3, a4)                                                                   \
    TURN(name, WIDE, if (s->width == 4 * SIDE) {                                                              \
        WIDE_4(START(a0, 6, a1, 0), START(a1, 7, a2, 16), START(a2, 6, a3, 32), START(a3, 7, a4, 48))         \
        COMMON_STEPS(WIDE_4(MORE(a0, 6), MORE(a1, 7), MORE(a2, 6), MORE(a3, 7)))                              \
    } else if (s->width == 2 * SIDE) {                                                                        \
        WIDE_2(0, START(a0, 6, a1, 0), START(a1, 7, a2, 16))                                                  \
        WIDE_2(1, START(a2, 6, a3, 32), START(a3, 7, a4, 48))                                                 \
        COMMON_STEPS(WIDE_2(0, MORE(a0, 6), MORE(a1, 7)) WIDE_2(1, MORE(a2, 6), MORE(a3, 7)))                 \
        OTHER_STEPS(0, WIDE_2(0, MORE(a0, 6), MORE(a1, 7)))                                                   \
        OTHER_STEPS(1, WIDE_2(1, MORE(a2, 6), MORE(a3, 7)))                                                   \
    } else {                                                                                                  \
        WIDE_1(0, 6, START(a0, 6, a1, 0)) WIDE_1(1, 7, START(a1, 7, a2, 16))                                  \
        WIDE_1(2, 6, START(a2, 6, a3, 32)) WIDE_1(3, 7, START(a3, 7, a4, 48))                                 \
        COMMON_STEPS(WIDE_1(0, 6, MORE(a0, 6)) WIDE_1(1, 7, MORE(a1, 7))                                      \
                     WIDE_1(2, 6, MORE(a2, 6)) WIDE_1(3, 7, MORE(a3, 7)))                                     \
        OTHER_STEPS(0, WIDE_1(0, 6, MORE(a0, 6)))                                                             \
        OTHER_STEPS(1, WIDE_1(1, 7, MORE(a1, 7)))                                                             \
        OTHER_STEPS(2, WIDE_1(2, 6, MORE(a2, 6)))                                                             \
        OTHER_STEPS(3, WIDE_1(3, 7, MORE(a3, 7)))                                                             \
    })

#define TALL_2(use0, use1, use2, use3)                                                    \
    TOKENS_OF(0, 0, _tile_stream_loadd) WEIGHTS_OF(0, 0, 6) use0 WEIGHTS_OF(0, 1, 7) use1 \
    TOKENS_OF(0, 1, _tile_stream_loadd) use2 use3
#define TALL_1(i, weights, use0, use1) \
    TOKENS_OF(i, 0, _tile_loadd) WEIGHTS_OF(i, 0, weights) use0 TOKENS_OF(i, 1, _tile_loadd) use1
#define BELOW (SIDE * TALL)
#define TALL_TURN(name, a0, a1, a2, a3, a4)                                                                   \
    TURN(name, TALL, if (s->width == 2 * SIDE) {                                                              \
        TALL_2(START(a0, 6, a1, 0), START(a1, 7, a2, 16), START(a2, 6, a3, BELOW), START(a3, 7, a4, BELOW + 16)) \
        COMMON_STEPS(TALL_2(MORE(a0, 6), MORE(a1, 7), MORE(a2, 6), MORE(a3, 7)))                              \
    } else {                                                                                                  \
        TALL_1(0, 6, START(a0, 6, a1, 0), START(a1, 6, a2, BELOW))                                            \
        TALL_1(1, 7, START(a2, 7, a3, 16), START(a3, 7, a4, BELOW + 16))                                      \
        COMMON_STEPS(TALL_1(0, 6, MORE(a0, 6), MORE(a1, 6)) TALL_1(1, 7, MORE(a2, 7), MORE(a3, 7)))           \
        OTHER_STEPS(0, TALL_1(0, 6, MORE(a0, 6), MORE(a1, 6)))                                                \
        OTHER_STEPS(1, TALL_1(1, 7, MORE(a2, 7), MORE(a3, 7)))                                                \
    })

EVERY_TURN(WIDE_TURN, wide)
EVERY_TURN(TALL_TURN, tall)

static const char nothing[SIDE * WIDE * 4];

/* A row without blocks is one block of zeros. */
static part empty_part(void) {
    static const int32_t nowhere[] = {0};
    return (part){.x = nothing, .w = nothing, .cols = nowhere, .blocks = 1, .chunks = 1, .row_bytes = SIDE * 4};
}

/* Multiplies `rows` tokens from `token` on and finishes the tile before. */
static void next_tile(walk *k, const strip *s, int64_t token, int64_t rows) {
    static void (*const wide[])(walk *, const strip *) = TURNS_OF(wide), (*const tall[])(walk *, const strip *) = TURNS_OF(tall);
    k->left = k->rows;
    k->pace = sb_ceil_div(k->rows, sb_max(s->steps - 1, 1));
    (k->outputs == WIDE ? wide : tall)[k->turn](k, s);
    k->turn = next_turn(k->turn);
    k->column = s->column;
    k->columns = s->outputs;
    k->token = token;
    k->rows = rows;
}

/* Arranged weights lie in the order in which strips are multiplied: those of the next one after this one's. */
static void set_weights_ahead(walk *k, const strip *s, int64_t parts) {
    enum { MOST = 8 };
    const sb_target *t = k->target;
    k->ahead_lines = 0;
    if (!t->following || !k->layer->arranged) return;
    int64_t bytes = 0;
    for (const part *p = s->parts; p < s->parts + parts; p++) {
        if (p->x == nothing) continue;
        const int64_t own = s->width / SIDE * p->column_bytes;
        k->ahead = p->w + own;
        bytes += own;
    }
    const int64_t steps = sb_max(s->steps - 1, 1);
    k->ahead_lines = sb_min(sb_ceil_div(bytes, 64 * steps * sb_count_groups(t)), MOST);
}

static void run_strip(walk *k, strip *s) {
    const sb_target *t = k->target;
    const int64_t parts = k->outputs / s->width;
    s->steps = INT64_MAX;
    for (int i = 0; i < parts; i++) s->steps = sb_min(s->steps, s->parts[i].blocks * s->parts[i].chunks);
    set_weights_ahead(k, s, parts);
    for (int64_t group = 0; group < sb_count_groups(t); group++) {
        const int64_t token = sb_first_token(t, group);
        for (int i = 0; i < parts; i++)
            if (s->parts[i].x != nothing) {
                s->parts[i].x = sb_group_features(k->layer, t, group);
                s->parts[i].row_bytes = sb_group_stride(t, group) * 2;
            }
        next_tile(k, s, token, sb_min(t->group, t->tokens - token));
    }
}

/* `column`: the first one; a strip apart from the next, all others lie in their lines as it does. */
static finisher finisher_of(const sb_target *t, int64_t column) {
    if ((t->next && t->next_chunk != 32) || (t->preactivation && t->residual)) return finish_any;
    if (t->next && !t->preactivation) return finish_packed[t->activation];
    const int whole = (t->y_stride | column) % 32 == 0 && ((uintptr_t)t->y | (uintptr_t)t->preactivation) % 64 == 0;
    const int stream = t->stream && whole;
    if (t->next) return (stream ? finish_packed_training_streamed : finish_packed_training)[t->activation];
    if (t->preactivation) return (stream ? finish_training_streamed : finish_training)[t->activation];
    if (t->residual) return (t->residual_first ? finish_residual_first : finish_residual_last)[t->activation];
    return (stream ? finish_streamed : finish_plain)[t->activation];
}

/* The most outputs of one block row that a tile takes at once. */
static int64_t width_of(int64_t block_out, int64_t outputs) {
    while (block_out % outputs) outputs /= 2;
    return outputs;
}

static part part_of(const sb_layer *layer, const sb_target *t, int64_t row, int64_t offset, int64_t width, char **room) {
    const sb_tile tile = sb_layer_tile(layer, row, offset, width, SIDE, room);
    if (!tile.blocks) return empty_part();
    const int64_t column_bytes = tile.blocks * layer->weight.block_in * SIDE * 2;
    return (part){t->x.features, tile.w, tile.cols, tile.blocks, tile.chunks, column_bytes, t->x.token_stride * 2};
}

static int skips(const walk *k, const strip *s) {
    float acc[SB_ACC_BYTES / sizeof(float)] __attribute__((aligned(64))); /* the walk's still has the last tile's sums */
    int living = 0;
    for (int i = 0; i < k->outputs / s->width; i++) living |= s->parts[i].x != nothing;
    return sb_layer_skips(k->layer, k->target, s->column, s->outputs, !living, acc);
}

static void run(const sb_layer *layer, const sb_target *t, int64_t first, int64_t last, float *acc) {
    const int64_t block_out = layer->weight.block_out;
    const int64_t columns = t->next ? t->next_padded : layer->weight.out_features;
    walk k = {.layer = layer,
              .target = t,
              .sums = acc,
              .outputs = t->group > SIDE ? TALL : WIDE,
              .finish = finisher_of(t, first * block_out)};
    strip s = {.width = width_of(block_out, k.outputs)};
    char *room = NULL;
    prepare(SIDE, layer->chunk);
    for (int64_t row = first; row < last; row++)
        for (int64_t offset = 0; offset < block_out && row * block_out + offset < columns; offset += s.width) {
            if (!s.outputs) s.column = row * block_out + offset, room = t->strip;
            s.parts[s.outputs / s.width] = part_of(layer, t, row, offset, s.width, &room);
            s.outputs += s.width;
            if (s.outputs == k.outputs) {
                if (!skips(&k, &s)) run_strip(&k, &s);
                s.outputs = 0;
            }
        }
    if (s.outputs) {
        for (int64_t i = s.outputs / s.width; i < k.outputs / s.width; i++) s.parts[i] = empty_part();
        run_strip(&k, &s);
    }
    /* Nothing follows the last tile. */
    for (int i = 0; i < 4; i++) s.parts[i] = empty_part();
    s.steps = 1;
    next_tile(&k, &s, 0, 0);
    finish();
}

/* A self-check of the core without Python: random products on two threads against a plain double loop.
 *
 * Built by the tests for other machines (under emulation) and with ThreadSanitizer. Its own GOMP_parallel, on plain
 * threads, stands in for the OpenMP runtime, which ThreadSanitizer cannot see through.
 */
#include "superblock.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct call {
    void (*body)(void *);
    void *data;
};

static void *run(void *call) {
    ((struct call *)call)->body(((struct call *)call)->data);
    return NULL;
}

static int parallel_calls;

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    parallel_calls++;
    pthread_t others[8];
    struct call call = {body, data};
    for (unsigned i = 1; i < threads; i++) pthread_create(&others[i], NULL, run, &call);
    body(data);
    for (unsigned i = 1; i < threads; i++) pthread_join(others[i], NULL);
}

static uint32_t state = 12345;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u; }
static int64_t below(int64_t n) { return (int64_t)((next() >> 8) % (uint32_t)n); }
static double uniform(void) { return (double)(next() >> 8) / (1 << 23) - 1.0; }

static uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (uint16_t)(bits >> 16);
}
static float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
/* Normal numbers only, which is all that this program stores. */
static float from_f16(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x8000) << 16;
    if (h & 0x7fff) bits |= (((uint32_t)(h & 0x7fff) << 13) + 0x38000000);
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static uint16_t to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (fabsf(f) < 0x1p-14f) return (uint16_t)((bits >> 16) & 0x8000);
    return (uint16_t)(((bits >> 16) & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
}

static void put(void *base, int dtype, int64_t i, double v) {
    if (dtype == SB_FLOAT32) ((float *)base)[i] = (float)v;
    else ((uint16_t *)base)[i] = dtype == SB_BFLOAT16 ? to_bf16((float)v) : to_f16((float)v);
}
static double get(const void *base, int dtype, int64_t i) {
    if (dtype == SB_FLOAT32) return ((const float *)base)[i];
    uint16_t h = ((const uint16_t *)base)[i];
    return dtype == SB_BFLOAT16 ? from_bf16(h) : from_f16(h);
}

static void *room(int64_t count, int dtype) {
    void *base = malloc((size_t)(count + 1) * (dtype == SB_FLOAT32 ? 4 : 2)); /* + 1: never empty */
    for (int64_t i = 0; i < count; i++) put(base, dtype, i, uniform());
    return base;
}

static double activate(int activation, double z) {
    switch (activation) {
    case SB_RELU: return z > 0 ? z : 0;
    case SB_GELU: return z * 0.5 * (1 + erf(z / sqrt(2)));
    case SB_GELU_TANH: return z * 0.5 * (1 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)));
    case SB_SILU: return z / (1 + exp(-z));
    default: return z;
    }
}

/* The slope of `activate`, by its central difference. */
static double slope(int activation, double z) {
    if (activation == SB_RELU) return z > 0;
    return (activate(activation, z + 1e-5) - activate(activation, z - 1e-5)) / 2e-5;
}

/* dz and dbias of y's gradient `grad` and z, both [tokens][features]. */
static int check_gradient(int dtype, int activation, int64_t tokens, int64_t features, const void *grad, const void *z) {
    void *dz = room(tokens * features, dtype), *dbias = room(features, dtype);
    const sb_gradient g = {grad, z, dz, dbias, tokens, features, features, dtype, activation, 2};
    int bad = sb_run_activation_gradient(&g) != SB_OK;
    const double tolerance = dtype == SB_FLOAT32 ? 1e-5 : 0.01;
    for (int64_t n = 0; n < features; n++) {
        double sum = 0;
        for (int64_t at = n; at < tokens * features; at += features) {
            const double want = get(grad, dtype, at) * slope(activation, get(z, dtype, at));
            if (!(fabs(get(dz, dtype, at) - want) < tolerance)) bad = 1;
            sum += want;
        }
        if (!(fabs(get(dbias, dtype, n) - sum) < tolerance * (10 + fabs(sum)))) bad = 1;
    }
    free(dz), free(dbias);
    return bad;
}

/* The product of tokens that it normalizes itself, against that of tokens normalized before. */
static int check_normalized(sb_product p, double tolerance) {
    const int64_t in = p.weight.in_features, out = p.weight.out_features;
    void *weight = room(in, p.dtype), *bias = room(in, p.dtype), *x = room(p.tokens * in, p.dtype);
    void *y = room(p.tokens * out, p.dtype);
    for (int64_t t = 0; t < p.tokens; t++) {
        double mean = 0, variance = 0;
        for (int64_t k = 0; k < in; k++) mean += get(p.x, p.dtype, t * in + k) / in;
        for (int64_t k = 0; k < in; k++) variance += pow(get(p.x, p.dtype, t * in + k) - mean, 2) / in;
        for (int64_t k = 0; k < in; k++) {
            const double z = (get(p.x, p.dtype, t * in + k) - mean) / sqrt(variance + 1e-3);
            put(x, p.dtype, t * in + k, z * get(weight, p.dtype, k) + get(bias, p.dtype, k));
        }
    }
    p.norm = (sb_norm){weight, bias, 1e-3f, 1};
    int bad = sb_run_product(&p) != SB_OK;
    sb_product before = p;
    before.norm = (sb_norm){0};
    before.x = x, before.y = y;
    bad |= sb_run_product(&before) != SB_OK;
    for (int64_t at = 0; at < p.tokens * out; at++) {
        const double want = get(y, p.dtype, at);
        if (!(fabs(get(p.y, p.dtype, at) - want) < tolerance * (1 + fabs(want)))) bad = 1;
    }
    free(weight), free(bias), free(x), free(y);
    return bad;
}

/* y = softmax(scale q kT) v, all [heads][tokens][features], against sums in double. */
static int check_attention(int dtype) {
    const int64_t heads = 1 + below(5), queries = 1 + below(60), features = 8 * (1 + below(5));
    const int64_t keys = 1 + below(next() & 0x10000 ? 600 : 60);
    void *q = room(heads * queries * features, dtype), *y = room(heads * queries * features, dtype);
    void *k = room(heads * keys * features, dtype), *v = room(heads * keys * features, dtype);
    double *p = malloc((size_t)keys * sizeof *p);
    const sb_attention a = {
        .q = q, .k = k, .v = v, .y = y, .batch = 1, .heads = heads, .queries = queries, .keys = keys, .features = features,
        .q_head = queries * features, .k_head = keys * features, .v_head = keys * features, .y_head = queries * features,
        .q_token = features, .k_token = features, .v_token = features, .y_token = features,
        .scale = 0.5f, .dtype = dtype, .threads = 2,
    };
    int bad = sb_run_attention(&a) != SB_OK;
    const double tolerance = dtype == SB_FLOAT32 ? 1e-5 : dtype == SB_BFLOAT16 ? 0.01 : 0.002;
    for (int64_t m = 0; m < heads * queries; m++) {
        const int64_t first = m / queries * keys;
        double total = 0;
        for (int64_t n = 0; n < keys; n++) {
            double score = 0;
            for (int64_t f = 0; f < features; f++)
                score += get(q, dtype, m * features + f) * get(k, dtype, (first + n) * features + f);
            total += p[n] = exp(0.5 * score);
        }
        for (int64_t f = 0; f < features; f++) {
            double want = 0;
            for (int64_t n = 0; n < keys; n++) want += p[n] / total * get(v, dtype, (first + n) * features + f);
            if (!(fabs(get(y, dtype, m * features + f) - want) < tolerance)) bad = 1;
        }
    }
    free(q), free(k), free(v), free(y), free(p);
    return bad;
}

/* Values of blocks [nnz][side][side], all alive. */
static sb_weight whole_weight(void *values, int32_t *crow, int32_t *cols, int64_t out, int64_t in, int64_t side) {
    const int64_t rows = out / side, columns = in / side;
    for (int64_t r = 0; r <= rows; r++) crow[r] = (int32_t)(r * columns);
    for (int64_t e = 0; e < rows * columns; e++) cols[e] = (int32_t)(e % columns);
    return (sb_weight){values, crow, cols, NULL, out, in, side, side, 1, side, side * side};
}

/* Self-attention as one, against its products and its attention one after the other. */
static int check_self_attention(int dtype) {
    const int64_t side = 8 * (1 + below(3)), features = below(2) ? side : 8, heads = side / features * (1 + below(3));
    const int64_t inner = heads * features, sequences = 1 + below(3), tokens = 1 + below(50), all = sequences * tokens;
    void *x = room(all * inner, dtype), *bias = room(3 * inner, dtype), *y = room(all * inner, dtype);
    void *first = room(3 * inner * inner, dtype), *second = room(inner * inner, dtype), *want = room(all * inner, dtype);
    void *qkv = room(all * 3 * inner, dtype), *attended = room(all * inner, dtype);
    int32_t *index = malloc((size_t)(8 * (inner / side + 1) * (inner / side + 1)) * sizeof *index);
    int32_t *others = malloc((size_t)(8 * (inner / side + 1) * (inner / side + 1)) * sizeof *others);
    const int64_t size = dtype == SB_FLOAT32 ? 4 : 2;
    sb_product p = {.weight = whole_weight(first, index, index + 3 * inner / side + 1, 3 * inner, inner, side),
                    .x = x, .bias = bias, .y = qkv, .tokens = all, .x_stride = inner, .y_stride = 3 * inner,
                    .dtype = dtype, .threads = 2};
    sb_product o = {.weight = whole_weight(second, others, others + inner / side + 1, inner, inner, side),
                    .x = attended, .residual = x, .y = want, .tokens = all, .x_stride = inner, .y_stride = inner,
                    .residual_stride = inner, .dtype = dtype, .threads = 2};
    const sb_attention a = {
        .q = qkv, .k = (char *)qkv + inner * size, .v = (char *)qkv + 2 * inner * size, .y = attended,
        .batch = sequences, .heads = heads, .queries = tokens, .keys = tokens, .features = features,
        .q_batch = tokens * 3 * inner, .k_batch = tokens * 3 * inner, .v_batch = tokens * 3 * inner, .y_batch = tokens * inner,
        .q_head = features, .k_head = features, .v_head = features, .y_head = features,
        .q_token = 3 * inner, .k_token = 3 * inner, .v_token = 3 * inner, .y_token = inner,
        .scale = 0.25f, .dtype = dtype, .threads = 2,
    };
    int bad = sb_run_product(&p) != SB_OK || sb_run_attention(&a) != SB_OK || sb_run_product(&o) != SB_OK;
    sb_self_attention s = {p, o, sequences, heads, features, 0.25f, 2};
    s.projection.y = NULL, s.output.x = NULL, s.output.y = y;
    const int status = sb_run_self_attention(&s); /* unsupported: what two threads cannot share */
    bad |= status != SB_OK && (status != SB_UNSUPPORTED || sequences == 2);
    for (int64_t at = 0; status == SB_OK && at < all * inner; at++) {
        const double expected = get(want, dtype, at);
        if (!(fabs(get(y, dtype, at) - expected) < (dtype == SB_FLOAT32 ? 1e-4 : 0.02) * (1 + fabs(expected)))) bad = 1;
    }
    free(x), free(bias), free(y), free(first), free(second), free(want), free(qkv), free(attended), free(index), free(others);
    return bad;
}

/* The same values, read the other way around. */
static sb_weight transposed(const sb_weight *w, int32_t *index) {
    const int64_t rows = w->out_features / w->block_out, columns = w->in_features / w->block_in;
    int32_t *crow = index, *cols = crow + columns + 1, *ids = cols + rows * columns;
    for (int64_t c = 0; c <= columns; c++) crow[c] = (int32_t)(c * rows);
    for (int64_t e = 0; e < rows * columns; e++) {
        cols[e] = (int32_t)(e % rows);
        ids[e] = (int32_t)(e % rows * columns + e / rows);
    }
    return (sb_weight){w->values,    crow,        cols,         ids,           w->in_features, w->out_features,
                       w->block_in,  w->block_out, w->in_stride, w->out_stride, w->block_stride};
}

/* Relative to the largest: sums of hundreds of products whose factors are rounded here and there. */
static int differ(const void *got, const void *want, int dtype, int64_t count) {
    double largest = 1;
    for (int64_t at = 0; at < count; at++) largest = fmax(largest, fabs(get(want, dtype, at)));
    const double tolerance = largest * (dtype == SB_FLOAT32 ? 1e-5 : 0.02);
    for (int64_t at = 0; at < count; at++)
        if (!(fabs(get(got, dtype, at) - get(want, dtype, at)) < tolerance)) return 1;
    return 0;
}

/* A feed-forward that keeps its preactivations and the way back through it, against one product after the other. */
static int check_feed_forward(int dtype, int activation) {
    const int64_t side = 8 * (1 + below(4)), in = side * (1 + below(4)), hidden = side * (1 + below(6)), tokens = below(90);
    void *x = room(tokens * in, dtype), *y = room(tokens * in, dtype), *dx = room(tokens * in, dtype);
    void *wanted[] = {room(tokens * hidden, dtype), room(tokens * hidden, dtype), room(tokens * in, dtype)};
    void *z = room(tokens * hidden, dtype), *dz = room(tokens * hidden, dtype), *dbias = room(hidden, dtype);
    void *first = room(hidden * in, dtype), *second = room(hidden * in, dtype), *bias = room(hidden, dtype);
    void *sum = room(hidden, dtype);
    int32_t index[4][128];
    sb_product up = {.weight = whole_weight(first, index[0], index[0] + 8, hidden, in, side), .x = x, .bias = bias,
                     .tokens = tokens, .x_stride = in, .y_stride = hidden, .dtype = dtype, .activation = activation, .threads = 2};
    sb_product down = {.weight = whole_weight(second, index[1], index[1] + 8, in, hidden, side), .x = wanted[0],
                       .residual = x, .tokens = tokens, .x_stride = hidden, .y_stride = in, .residual_stride = in,
                       .dtype = dtype, .threads = 2};
    sb_feed_forward f = {.first = up, .second = down};
    f.first.preactivation = z, f.second.y = y;
    up.y = wanted[0], up.preactivation = wanted[1], down.y = wanted[2];
    int bad = sb_run_feed_forward(&f) != SB_OK || sb_run_product(&up) != SB_OK || sb_run_product(&down) != SB_OK;
    bad |= differ(z, wanted[1], dtype, tokens * hidden) || differ(y, wanted[2], dtype, tokens * in);
    sb_feed_forward back = {.first = down, .second = up, .z = z, .dbias = dbias};
    back.first.weight = transposed(&down.weight, index[2]), back.second.weight = transposed(&up.weight, index[3]);
    back.first.x = x, back.first.residual = NULL, back.first.x_stride = in, back.first.y_stride = hidden;
    back.second.bias = NULL, back.second.activation = SB_NONE, back.second.x_stride = hidden, back.second.y_stride = in;
    up = back.second, down = back.first;
    back.first.activation = activation, back.first.preactivation = dz, back.first.y = NULL;
    back.second.preactivation = NULL, back.second.y = dx;
    down.y = wanted[0], up.preactivation = NULL, up.x = wanted[1], up.y = wanted[2];
    const sb_gradient g = {wanted[0], z, wanted[1], sum, tokens, hidden, hidden, dtype, activation, 2};
    bad |= sb_run_feed_forward(&back) != SB_OK || sb_run_product(&down) != SB_OK;
    bad |= sb_run_activation_gradient(&g) != SB_OK || sb_run_product(&up) != SB_OK;
    bad |= differ(dz, wanted[1], dtype, tokens * hidden) || differ(dx, wanted[2], dtype, tokens * in);
    bad |= dtype == SB_FLOAT32 && differ(dbias, sum, dtype, hidden); /* the others round what is summed in other places */
    free(x), free(y), free(dx), free(wanted[0]), free(wanted[1]), free(wanted[2]), free(z), free(dz), free(dbias);
    free(first), free(second), free(bias), free(sum);
    return bad;
}

static int check(int round) {
    const int dtype = round % SB_DTYPES, activation = round % SB_ACTIVATIONS, turned = round & 1;
    const int64_t tokens = below(70), out = 1 + below(100), in = 1 + below(100);
    const int64_t bh = 8 * (1 + below(6)), bw = 8 * (1 + below(6));
    const int64_t rows = (out + bh - 1) / bh, columns = (in + bw - 1) / bw;
    int32_t *crow = calloc((size_t)rows + 1, 4), *cols = calloc((size_t)(rows * columns), 4);
    int32_t nnz = 0;
    for (int64_t r = 0; r < rows; r++, crow[r] = nnz)
        for (int32_t c = 0; c < columns; c++)
            if (next() & 0x10000) cols[nnz++] = c;
    void *values = room(nnz * bh * bw, dtype), *x = room(tokens * in, dtype), *bias = room(out, dtype);
    void *residual = room(tokens * out, dtype), *y = room(tokens * out, dtype), *gradient = room(nnz * bh * bw, dtype);
    const int64_t out_stride = turned ? bw : 1, in_stride = turned ? 1 : bh;
    for (int64_t r = 0; r < rows; r++)
        for (int32_t b = crow[r]; b < crow[r + 1]; b++)
            for (int64_t i = 0; i < bh; i++)
                for (int64_t j = 0; j < bw; j++)
                    if (r * bh + i >= out || cols[b] * bw + j >= in)
                        put(values, dtype, b * bh * bw + i * out_stride + j * in_stride, 0);
    sb_product p = {
        .weight = {values, crow, cols, NULL, out, in, bh, bw, out_stride, in_stride, bh * bw},
        .x = x, .bias = bias, .residual = residual, .y = y,
        .tokens = tokens, .x_stride = in, .y_stride = out, .residual_stride = out,
        .dtype = dtype, .activation = activation, .threads = 2,
    };
    const sb_rows given = {x, residual, y, NULL, tokens, in, out, 2};
    const sb_product prepared = {.weight = p.weight, .bias = bias, .dtype = dtype, .activation = activation};
    int bad = (round & 4 ? sb_run_rows(&prepared, &given) : sb_run_product(&p)) != SB_OK;
    const int taken = activation == SB_RELU ? SB_RELU : SB_NONE;
    sb_sampled s = {.weight = p.weight,
                    .grad = residual,
                    .x = x,
                    .tokens = tokens,
                    .grad_stride = out,
                    .x_stride = in,
                    .dtype = dtype,
                    .activation = taken,
                    .threads = 2};
    s.weight.values = gradient;
    bad |= sb_run_sampled(&s) != SB_OK;
    bad |= check_attention(dtype);
    bad |= check_self_attention(dtype);
    bad |= check_feed_forward(dtype, activation);
    bad |= check_gradient(dtype, activation, tokens, out, residual, y);
    /* Relative to sums of up to 100 products below 1: the dtype's own rounding of results up to about 10. */
    const double tolerance = dtype == SB_FLOAT32 ? 1e-4 : dtype == SB_BFLOAT16 ? 0.15 : 0.02;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < bh && r * bh + i < out; i++) {
                double z = get(bias, dtype, r * bh + i);
                for (int32_t b = crow[r]; b < crow[r + 1]; b++)
                    for (int64_t j = 0; j < bw && cols[b] * bw + j < in; j++)
                        z += get(x, dtype, t * in + cols[b] * bw + j) *
                             get(values, dtype, b * bh * bw + i * out_stride + j * in_stride);
                const int64_t at = t * out + r * bh + i;
                const double want = activate(activation, z) + get(residual, dtype, at);
                if (!(fabs(get(y, dtype, at) - want) < tolerance)) bad = 1;
            }
    for (int64_t r = 0; r < rows; r++)
        for (int32_t b = crow[r]; b < crow[r + 1]; b++)
            for (int64_t i = 0; i < bh; i++)
                for (int64_t j = 0; j < bw; j++) {
                    double want = 0;
                    for (int64_t t = 0; t < tokens && r * bh + i < out && cols[b] * bw + j < in; t++)
                        want += get(residual, dtype, t * out + r * bh + i) * activate(taken, get(x, dtype, t * in + cols[b] * bw + j));
                    if (!(fabs(get(gradient, dtype, b * bh * bw + i * out_stride + j * in_stride) - want) < tolerance)) bad = 1;
                }
    bad |= check_normalized(p, tolerance);
    free(crow), free(cols), free(values), free(x), free(bias), free(residual), free(y), free(gradient);
    return bad;
}

int main(int argc, char **argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 60;
    char names[64];
    strncpy(names, sb_available(), sizeof names - 1);
    names[sizeof names - 1] = 0;
    for (char *name = strtok(names, " "); name; name = strtok(NULL, " ")) {
        if (sb_select(name) != SB_OK) return 1;
        for (int round = 0; round < rounds; round++)
            if (check(round)) {
                printf("%s: round %d is wrong\n", name, round);
                return 1;
            }
        printf("%s: %d rounds agree\n", name, rounds);
    }
    if (!parallel_calls) puts("the core never ran in parallel");
    return !parallel_calls;
}

/* What an instruction set provides besides its tiles: conversion, packing, the epilogue, its gradient and outer
 * products. */

SB_INLINE int64_t size_of(int dtype) { return dtype == SB_FLOAT32 ? 4 : 2; }

/* `count` elements as floats; lanes past the end are zero. */
SB_INLINE vec load_part(int dtype, const void *base, int64_t index, int64_t count) {
    if (count >= SB_LANES) return load_as(dtype, base, index);
    float part[SB_LANES] = {0};
    memcpy(part, (const char *)base + index * size_of(dtype), (size_t)(count * size_of(dtype)));
    return load_as(dtype, part, 0);
}

SB_INLINE void store_part(int dtype, void *base, int64_t index, int64_t count, vec v) {
    if (count >= SB_LANES) {
        store_as(dtype, base, index, v);
        return;
    }
    float part[SB_LANES];
    store_as(dtype, part, 0, v);
    memcpy((char *)base + index * size_of(dtype), part, (size_t)(count * size_of(dtype)));
}

static void widen(int dtype, const void *source, int64_t count, float *target) {
    for (int64_t i = 0; i < count; i += SB_LANES)
        store_part(SB_FLOAT32, target, i, count - i, load_part(dtype, source, i, count - i));
}

static void narrow(int dtype, const float *source, int64_t count, void *target) {
    for (int64_t i = 0; i < count; i += SB_LANES)
        store_part(dtype, target, i, count - i, load_part(SB_FLOAT32, source, i, count - i));
}

/* Rows of tokens into chunks; a NULL row, and what lies past `features`, become zeros. */
SB_INLINE void pack_chunks(const int chunk, int dtype, const void *const *rows, int64_t group, int64_t features,
                           int64_t padded, void *packed) {
    enum { RUN = 256 }; /* features a row before the next row's turn: reads stay sequential, writes stay in L1 */
    const int64_t size = SB_DOT(dtype) ? 2 : 4;
    for (int64_t start = 0; start < padded; start += RUN) {
        const int64_t length = padded - start < RUN ? padded - start : RUN;
        for (int64_t m = 0; m < group; m++) {
            const int64_t valid = rows[m] == NULL || features < start ? 0 : features - start;
            const char *run = (const char *)rows[m] + start * size_of(dtype);
            float copy[RUN];
            if (valid < length || size != size_of(dtype)) {
                memset(copy, 0, sizeof copy);
                const int64_t count = valid < length ? valid : length;
                if (size == size_of(dtype)) {
                    if (count > 0) memcpy(copy, run, (size_t)(count * size));
                } else {
                    widen(dtype, run, count, copy);
                }
                run = (const char *)copy;
            }
            char *out = (char *)packed + (start * group + m * chunk) * size;
            for (int64_t k = 0; k < length; k += chunk, out += group * chunk * size) {
                if (size == 4) memcpy(out, run + k * 4, (size_t)chunk * 4);
                else memcpy(out, run + k * 2, (size_t)chunk * 2);
            }
        }
    }
}

static void pack(int dtype, const void *const *rows, int64_t group, int64_t features, int64_t padded, int64_t chunk,
                 void *packed) {
    if (chunk == 8) pack_chunks(8, dtype, rows, group, features, padded, packed);
    else if (chunk == 16) pack_chunks(16, dtype, rows, group, features, padded, packed);
    else pack_chunks(32, dtype, rows, group, features, padded, packed);
}

/* Outputs n to `end`, at most a vector, of token m as packed activations of the next product. */
SB_INLINE void store_packed(int dtype, void *packed, int64_t group, int64_t chunk, int64_t m, int64_t n, int64_t end,
                            vec v) {
    enum { STEP = SB_LANES < SB_CHUNK ? SB_LANES : SB_CHUNK };
    const int out = SB_DOT(dtype) ? dtype : SB_FLOAT32;
    if (chunk % SB_LANES == 0 && n % SB_LANES == 0 && n + SB_LANES <= end) {
        store_as(out, packed, ((n & -chunk) * group + m * chunk) + (n & (chunk - 1)), v);
        return;
    }
    float lanes[SB_LANES];
    store_as(out, lanes, 0, v);
    for (int64_t i = 0; i < SB_LANES && n + i < end; i += STEP) {
        const int64_t index = ((n + i) & -chunk) * group + m * chunk + ((n + i) & (chunk - 1));
        if (out == SB_FLOAT32) memcpy((float *)packed + index, lanes + i, STEP * 4);
        else memcpy((uint16_t *)packed + index, (uint16_t *)lanes + i, STEP * 2);
    }
}

enum { NO_RESIDUAL, RESIDUAL_FIRST, RESIDUAL_LAST };

/* The fields are copied to locals: the compiler must assume that storing y changes `*e`. With the flags constant, the
 * usual cases are a load, an add and a store a vector; this pass costs as much as a tenth of the products otherwise. */
SB_INLINE void epilogue_rows(int dtype, int activation, const int residual, const int preactivation, const int whole,
                             const int stream, const float *bias, const sb_epilogue *e) {
    const sb_epilogue l = *e;
    for (int64_t m = 0; m < l.rows; m++)
        for (int64_t n = 0; n < (whole ? l.panel : l.columns); n += SB_LANES) {
            const int64_t left = whole ? SB_LANES : l.columns - n;
            vec z = load(l.acc + m * l.acc_stride + n) + load(bias + n), r = splat(0.0f);
            if (residual) r = load_part(dtype, l.residual, m * l.residual_stride + n, left);
            if (residual == RESIDUAL_FIRST) z += r;
            if (preactivation) store_part(dtype, l.preactivation, m * l.y_stride + n, left, z);
            vec y = activate(activation, z);
            if (residual == RESIDUAL_LAST) y += r;
            if (stream) stream_as(dtype, l.y, m * l.y_stride + n, y);
            else store_part(dtype, l.y, m * l.y_stride + n, left, y);
        }
}

SB_INLINE void epilogue_of(int dtype, int activation, const sb_epilogue *e) {
    float bias[SB_MAX_PANEL] = {0};
    if (e->bias) widen(dtype, e->bias, e->columns, bias);
    const int whole = e->columns == e->panel && e->panel % SB_LANES == 0;
    const int residual = !e->residual ? NO_RESIDUAL : e->residual_first ? RESIDUAL_FIRST : RESIDUAL_LAST;
    if (e->packed) {
        const sb_epilogue l = *e;
        for (int64_t m = 0; m < l.rows; m++)
            for (int64_t n = 0; n < l.panel; n += SB_LANES) {
                vec z = load(l.acc + m * l.acc_stride + n) + load(bias + n);
                store_packed(dtype, l.packed, l.group, l.chunk, m, l.packed_from + n, l.packed_from + l.packed_columns,
                             activate(activation, z));
            }
    } else if (!whole) {
        epilogue_rows(dtype, activation, residual, e->preactivation != NULL, 0, 0, bias, e);
    } else if (e->preactivation) {
        epilogue_rows(dtype, activation, residual, 1, 1, 0, bias, e);
    } else if (residual == RESIDUAL_FIRST) {
        epilogue_rows(dtype, activation, RESIDUAL_FIRST, 0, 1, 0, bias, e);
    } else if (residual == RESIDUAL_LAST) {
        epilogue_rows(dtype, activation, RESIDUAL_LAST, 0, 1, 0, bias, e);
    } else if (e->stream) {
        epilogue_rows(dtype, activation, 0, 0, 1, 1, bias, e);
    } else {
        epilogue_rows(dtype, activation, 0, 0, 1, 0, bias, e);
    }
}

/* function(dtype, activation, ...) with both of them constant. */
#define SB_CASE(dtype, activation, function, ...) \
    case (dtype) * SB_ACTIVATIONS + (activation): function(dtype, activation, __VA_ARGS__); break;
#define SB_CASES(dtype, ...)                                                                            \
    SB_CASE(dtype, SB_NONE, __VA_ARGS__) SB_CASE(dtype, SB_RELU, __VA_ARGS__)                           \
    SB_CASE(dtype, SB_GELU, __VA_ARGS__) SB_CASE(dtype, SB_GELU_TANH, __VA_ARGS__)                      \
    SB_CASE(dtype, SB_SILU, __VA_ARGS__)
#define SB_SPECIALIZE(dtype, activation, ...)                                                           \
    switch ((dtype) * SB_ACTIVATIONS + (activation)) {                                                  \
        SB_CASES(SB_FLOAT32, __VA_ARGS__)                                                               \
        SB_CASES(SB_BFLOAT16, __VA_ARGS__)                                                              \
        SB_CASES(SB_FLOAT16, __VA_ARGS__)                                                               \
    }

static void epilogue(const sb_epilogue *e) { SB_SPECIALIZE(e->dtype, e->activation, epilogue_of, e) }

SB_INLINE void gradient_of(int dtype, int activation, const sb_gradient *gradient, int64_t start, int64_t stop,
                           float *sums) {
    const sb_gradient g = *gradient;
    for (int64_t t = start; t < stop; t++)
        for (int64_t n = 0; n < g.features; n += SB_LANES) {
            const int64_t at = t * g.features + n, left = g.features - n;
            vec z = load_part(dtype, g.z, at, left);
            vec dz = load_part(dtype, g.grad, t * g.grad_stride + n, left) * slope(activation, z);
            store_part(dtype, g.dz, at, left, dz);
            store(sums + n, load(sums + n) + dz);
        }
}

static void gradient(const sb_gradient *g, int64_t start, int64_t stop, float *sums) {
    SB_SPECIALIZE(g->dtype, g->activation, gradient_of, g, start, stop, sums)
}

#define SB_TRANSPOSE(type)                                                                                   \
    for (int64_t i = 0; i < rows; i += 8)                                                                    \
        for (int64_t j = 0; j < columns; j += 8) {                                                           \
            const type *from = (const type *)in + i * in_stride + j;                                         \
            type *to = (type *)out + j * rows + i;                                                           \
            SB_UNROLL for (int k = 0; k < 8; k++)                                                            \
                SB_UNROLL for (int l = 0; l < 8; l++) to[k * rows + l] = from[l * in_stride + k];            \
        }

static void transpose(int size, const void *in, int64_t in_stride, int64_t rows, int64_t columns, void *out) {
    if (size == 4) {
        SB_TRANSPOSE(uint32_t)
    } else {
        SB_TRANSPOSE(uint16_t)
    }
}

/* A register tile of the outer products: `rows` x `vectors` accumulators over all tokens of the tile. */
SB_INLINE void outer_tile(const int rows, const int vectors, const int half, const sb_outer *o) {
    vec acc[8][2];
    SB_UNROLL for (int i = 0; i < rows; i++)
        SB_UNROLL for (int v = 0; v < vectors; v++) acc[i][v] = splat(0.0f);
    const float *a = o->a, *b = o->b;
    for (int64_t t = 0; t < o->tokens; t++, a += o->a_stride, b += o->b_stride) {
        vec right[2];
        SB_UNROLL for (int v = 0; v < vectors; v++) right[v] = load_weights(SB_FLOAT32, b, v * SB_LANES, half);
        SB_UNROLL for (int i = 0; i < rows; i++) {
            vec left = splat(a[i]);
            SB_UNROLL for (int v = 0; v < vectors; v++) acc[i][v] += left * right[v];
        }
    }
    const int64_t width = half ? SB_LANES / 2 : SB_LANES;
    SB_UNROLL for (int i = 0; i < rows; i++)
        SB_UNROLL for (int v = 0; v < vectors; v++) {
            float *out = o->out + i * o->out_stride + v * SB_LANES;
            store_part(SB_FLOAT32, out, 0, width, acc[i][v] + load_part(SB_FLOAT32, out, 0, width));
        }
}

/* out [8, columns] += aᵀ b, columns a multiple of 8. */
static void outer(const sb_outer *whole) {
    enum { ROWS = SB_LANES == 16 ? 8 : 4 };
    for (int64_t i = 0; i < 8; i += ROWS) {
        for (int64_t j = 0; j < whole->columns;) {
            sb_outer o = *whole;
            o.a += i;
            o.b += j;
            o.out += i * o.out_stride + j;
            if (o.columns - j >= 2 * SB_LANES) {
                outer_tile(ROWS, 2, 0, &o);
                j += 2 * SB_LANES;
            } else if (o.columns - j >= SB_LANES) {
                outer_tile(ROWS, 1, 0, &o);
                j += SB_LANES;
            } else {
                outer_tile(ROWS, 1, 1, &o);
                j += SB_LANES / 2;
            }
        }
    }
}

#ifndef SB_OWN_ATTENTION
#include "attention_impl.h"
#endif

#ifndef SB_OWN_PEAK
/* The ceiling that benchmarks compare with: multiply-adds on registers alone. Returns how many operations it did. */
static double peak(int dtype, int64_t iterations) {
    (void)dtype;
    enum { CHAINS = SB_LANES == 16 ? 24 : 12 };
    static volatile float factor = 0.5f;
    vec acc[CHAINS], x = splat(factor), y = splat(factor);
    SB_UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = splat(factor);
    if (SB_DOT(dtype)) {
#ifdef SB_DOT_BFLOAT16
        for (int64_t n = 0; n < iterations; n++)
            SB_UNROLL for (int i = 0; i < CHAINS; i++)
                acc[i] = (vec)_mm512_dpbf16_ps((__m512)acc[i], (__m512bh)x, (__m512bh)y);
#endif
    } else {
        for (int64_t n = 0; n < iterations; n++)
            SB_UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * x + y;
    }
    SB_UNROLL for (int i = 1; i < CHAINS; i++) acc[0] += acc[i];
    factor = acc[0][0] < 0 ? 0.25f : 0.5f; /* so that the sum is needed */
    return (double)iterations * CHAINS * SB_LANES * 2 * (SB_DOT(dtype) ? 2 : 1);
}
#endif

/* What every instruction set takes from this template. */
#ifndef SB_LONGEST_CHUNK
#define SB_LONGEST_CHUNK SB_CHUNK
#endif
#define SB_COMMON_KERNELS                                                                                          \
    .supported = supported, .longest_chunk = SB_LONGEST_CHUNK, .lanes = SB_LANES, .tile = tile,                    \
    .epilogue = epilogue, .pack = pack, .widen = widen, .narrow = narrow, .attend = attend, .transpose = transpose, .outer = outer,    \
    .gradient = gradient, .peak = peak

/* What an instruction set provides besides its tiles: conversion, packing, the epilogue and transposition; the rest is
 * included at the end. */

/* function(dtype, ...) with the dtype constant. */
#define SB_OF_DTYPE(dtype, function, ...)                            \
    if ((dtype) == SB_FLOAT32) function(SB_FLOAT32, __VA_ARGS__);    \
    else if ((dtype) == SB_BFLOAT16) function(SB_BFLOAT16, __VA_ARGS__); \
    else function(SB_FLOAT16, __VA_ARGS__);

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
SB_INLINE void pack_chunks(const int chunk, int dtype, const void *const *rows, int64_t tokens, int64_t stride,
                           int64_t features, int64_t padded, void *packed) {
    enum { RUN = 256 }; /* features a row before the next row's turn: reads stay sequential, writes stay in L1 */
    const int64_t size = SB_DOT(dtype) ? 2 : 4;
    for (int64_t start = 0; start < padded; start += RUN) {
        const int64_t length = padded - start < RUN ? padded - start : RUN;
        for (int64_t m = 0; m < tokens; m++) {
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
            char *out = (char *)packed + (start * stride + m * chunk) * size;
            for (int64_t k = 0; k < length; k += chunk, out += stride * chunk * size) {
                if (size == 4) memcpy(out, run + k * 4, (size_t)chunk * 4);
                else memcpy(out, run + k * 2, (size_t)chunk * 2);
            }
        }
    }
}

static void pack(int dtype, const void *const *rows, int64_t tokens, int64_t stride, int64_t features, int64_t padded,
                 int64_t chunk, void *packed) {
    if (chunk == 8) pack_chunks(8, dtype, rows, tokens, stride, features, padded, packed);
    else if (chunk == 16) pack_chunks(16, dtype, rows, tokens, stride, features, padded, packed);
    else pack_chunks(32, dtype, rows, tokens, stride, features, padded, packed);
}

/* A vector of outputs of every token, from column n of the panel on, as packed activations of the next product: in runs
 * of `step` lanes, as many as the chunks there allow. Where a run lies does not depend on the token but for one product. */
SB_INLINE void pack_column(int dtype, int activation, const int step, const float *bias, const sb_epilogue *e, int64_t n) {
    const sb_epilogue l = *e;
    const int out = SB_DOT(dtype) ? dtype : SB_FLOAT32;
    const int64_t size = out == SB_FLOAT32 ? 4 : 2, left = l.packed_columns - n;
    char *runs[SB_LANES];
    SB_UNROLL for (int i = 0; i < SB_LANES; i += step) {
        const int64_t column = l.packed_from + n + i;
        runs[i] = (char *)l.packed + ((column & -l.chunk) * l.group + (column & (l.chunk - 1))) * size;
    }
    const vec start = load(bias + n);
    for (int64_t m = 0; m < l.rows; m++) {
        char lanes[SB_LANES * sizeof(float)];
        store_as(out, lanes, 0, activate(dtype, activation, load(l.acc + m * l.acc_stride + n) + start));
        SB_UNROLL for (int i = 0; i < SB_LANES; i += step)
            if (i < left) memcpy(runs[i] + m * l.chunk * size, lanes + i * size, (size_t)(step * size));
    }
}

SB_INLINE void pack_results(int dtype, int activation, const float *bias, const sb_epilogue *e) {
    enum { SHORT = SB_LANES < SB_CHUNK ? SB_LANES : SB_CHUNK };
    for (int64_t n = 0; n < e->packed_columns; n += SB_LANES) {
        const int whole = e->chunk % SB_LANES == 0 && (e->packed_from + n) % SB_LANES == 0;
        if (whole && n + SB_LANES <= e->packed_columns) pack_column(dtype, activation, SB_LANES, bias, e, n);
        else pack_column(dtype, activation, SHORT, bias, e, n);
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
            if (preactivation && stream) stream_as(dtype, l.preactivation, m * l.y_stride + n, z);
            else if (preactivation) store_part(dtype, l.preactivation, m * l.y_stride + n, left, z);
            vec y = activate(dtype, activation, z);
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
        pack_results(dtype, activation, bias, e);
    } else if (!whole) {
        epilogue_rows(dtype, activation, residual, e->preactivation != NULL, 0, 0, bias, e);
    } else if (e->preactivation && e->stream && !residual) {
        epilogue_rows(dtype, activation, NO_RESIDUAL, 1, 1, 1, bias, e);
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

static void epilogue(const sb_epilogue *e) {
    if (e->packed && e->preactivation) {
        sb_epilogue kept = *e; /* what would be y without an activation */
        kept.y = e->preactivation;
        kept.preactivation = kept.packed = NULL;
        kept.rows = e->present;
        SB_SPECIALIZE(e->dtype, SB_NONE, epilogue_of, &kept)
    }
    SB_SPECIALIZE(e->dtype, e->activation, epilogue_of, e)
}

#define SB_TRANSPOSE(type)                                                                                   \
    for (int64_t i = 0; i < rows; i += 8)                                                                    \
        for (int64_t j = 0; j < columns; j += 8) {                                                           \
            const type *from = (const type *)in + i * in_stride + j;                                         \
            type *to = (type *)out + j * rows + i;                                                           \
            SB_UNROLL for (int k = 0; k < 8; k++)                                                            \
                SB_UNROLL for (int l = 0; l < 8; l++) to[k * rows + l] = from[l * in_stride + k];            \
        }

#if SB_LANES == 16
/* 32 rows, 16 columns from `column` on: pairs of rows are interleaved, and the pairs transposed. */
SB_INLINE void transpose_32_by_16(const uint16_t *const *rows, int64_t column, uint16_t *out, int64_t out_stride) {
    __m512i a[16], b[16];
    SB_UNROLL for (int i = 0; i < 16; i++) {
        const __m256i even = _mm256_loadu_si256((const __m256i *)(rows[2 * i] + column));
        const __m256i odd = _mm256_loadu_si256((const __m256i *)(rows[2 * i + 1] + column));
        a[i] = pair_rows(even, odd);
    }
    SB_UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    SB_UNROLL for (int i = 0; i < 16; i += 4)
        SB_UNROLL for (int k = 0; k < 2; k++) {
            a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
            a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
        }
    SB_UNROLL for (int k = 0; k < 4; k++) { /* a[4 i + k]: columns k, 4 + k, 8 + k, 12 + k of four pairs of rows */
        const __m512i first = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x88);
        const __m512i second = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xdd);
        const __m512i third = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x88);
        const __m512i fourth = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xdd);
        _mm512_storeu_si512(out + k * out_stride, _mm512_shuffle_i32x4(first, third, 0x88));
        _mm512_storeu_si512(out + (4 + k) * out_stride, _mm512_shuffle_i32x4(second, fourth, 0x88));
        _mm512_storeu_si512(out + (8 + k) * out_stride, _mm512_shuffle_i32x4(first, third, 0xdd));
        _mm512_storeu_si512(out + (12 + k) * out_stride, _mm512_shuffle_i32x4(second, fourth, 0xdd));
    }
}
#endif

static void transpose(int size, const void *in, int64_t in_stride, int64_t rows, int64_t columns, void *out) {
#if SB_LANES == 16
    if (size == 2 && rows % 32 == 0 && columns % 16 == 0) {
        for (int64_t i = 0; i < rows; i += 32) {
            const uint16_t *each[32];
            for (int m = 0; m < 32; m++) each[m] = (const uint16_t *)in + (i + m) * in_stride;
            for (int64_t j = 0; j < columns; j += 16) transpose_32_by_16(each, j, (uint16_t *)out + j * rows + i, rows);
        }
        return;
    }
#endif
    if (size == 4) {
        SB_TRANSPOSE(uint32_t)
    } else {
        SB_TRANSPOSE(uint16_t)
    }
}

#include "gradient_impl.h"
#include "normalize_impl.h"
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
    .epilogue = epilogue, .pack = pack, .lay_out = lay_out, .narrow = narrow, .activate = activate_all,           \
    .normalize = normalize, .attend = attend, .transpose = transpose, .outer = outer, .gradient = gradient,        \
    .slope = slope_all, .peak = peak

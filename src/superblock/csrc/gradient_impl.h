/* What an instruction set provides for gradients: of activations, and the operands and products of those of values. */

/* Bytes: the hardware's own fetches end at pages (a gradient of 3072 features: 5.0 -> 3.1 ms). */
enum { FETCHED_AHEAD = 2048 };

SB_INLINE void gradient_of(int dtype, int activation, const sb_gradient *gradient, int64_t start, int64_t stop,
                           int stream, float *sums) {
    const sb_gradient g = *gradient;
    const char *z_ahead = (const char *)g.z + FETCHED_AHEAD, *grad_ahead = (const char *)g.grad + FETCHED_AHEAD;
    for (int64_t t = start; t < stop; t++)
        for (int64_t n = 0; n < g.features; n += SB_LANES) {
            const int64_t at = t * g.features + n, from = t * g.grad_stride + n, left = g.features - n;
            __builtin_prefetch(z_ahead + at * size_of(dtype));
            __builtin_prefetch(grad_ahead + from * size_of(dtype));
            vec z = activation == SB_NONE ? splat(0.0f) : load_part(dtype, g.z, at, left); /* there may be none */
            vec dz = load_part(dtype, g.grad, from, left) * slope(dtype, activation, z);
            if (stream) stream_as(dtype, g.dz, at, dz);
            else if (g.dz) store_part(dtype, g.dz, at, left, dz);
            store(sums + n, load(sums + n) + dz);
        }
}

static void gradient(const sb_gradient *g, int64_t start, int64_t stop, int stream, float *sums) {
    SB_SPECIALIZE(g->dtype, g->activation, gradient_of, g, start, stop, stream, sums)
}

/* A vector of packed activations, of two chunks where those are shorter. */
SB_INLINE vec load_packed(int dtype, const int halves, const char *low, const char *high) {
#if SB_LANES == 16
    if (halves && dtype == SB_FLOAT32) {
        const __m512 first = _mm512_castps256_ps512(_mm256_loadu_ps((const float *)low));
        return (vec)_mm512_insertf32x8(first, _mm256_loadu_ps((const float *)high), 1);
    }
    if (halves) {
        const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low));
        return from_bfloat16((hvec)_mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)high), 1));
    }
#endif
    (void)halves, (void)high;
    return load_as(dtype, low, 0);
}

SB_INLINE void store_packed(int dtype, const int halves, char *low, char *high, vec v) {
    char lanes[SB_LANES * sizeof(float)];
    const size_t half = (size_t)(SB_LANES / 2 * size_of(dtype));
    if (!halves) {
        store_as(dtype, low, 0, v);
        return;
    }
    store_as(dtype, lanes, 0, v);
    memcpy(high, lanes + half, half);
    memcpy(low, lanes, half);
}

/* Row by row, as z and dz lie: in the products' epilogues their lines would come from 14 pages at a time (768 -> 3072,
 * 1576 tokens, 90 %: the gradient of a feed-forward in 19.4 ms of one thread instead of 16.6). */
SB_INLINE void slope_rows(int dtype, int activation, const int halves, const sb_slope *slopes) {
    const sb_slope s = *slopes;
    const int packed_dtype = SB_DOT(dtype) ? dtype : SB_FLOAT32;
    const int64_t size = size_of(packed_dtype);
    for (int64_t m = 0; m < s.tokens; m++)
        for (int64_t n = 0; n < s.features; n += SB_LANES) {
            const int64_t at = m * s.stride + n, left = s.features - n;
            char *low = (char *)s.packed + ((n & -s.chunk) * s.group + m * s.chunk + (n & (s.chunk - 1))) * size;
            char *high = left > SB_CHUNK ? low + s.group * SB_CHUNK * size : low; /* of halves, if it has any */
            vec dz = splat(0.0f);
            if (!s.reads || s.reads[n / SB_CHUNK]) {
                __builtin_prefetch((const char *)s.z + at * size_of(dtype) + FETCHED_AHEAD);
                const vec z = load_part(dtype, s.z, at, left);
                dz = load_packed(packed_dtype, halves, low, high) * slope(dtype, activation, z);
                store_packed(packed_dtype, halves, low, high, dz);
            }
            if (s.stream) stream_as(dtype, s.dz, at, dz);
            else if (s.dz) store_part(dtype, s.dz, at, left, dz);
            if (s.totals) store(s.totals + n, m ? load(s.totals + n) + dz : dz);
        }
}

static void slope_all(const sb_slope *s) {
    if (s->chunk < SB_LANES) {
        SB_SPECIALIZE(s->dtype, s->activation, slope_rows, 1, s)
    } else {
        SB_SPECIALIZE(s->dtype, s->activation, slope_rows, 0, s)
    }
}

SB_INLINE void activate_rows(int dtype, int activation, const void *in, int64_t in_stride, int64_t rows, int64_t columns,
                             void *out, int64_t out_stride) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < columns; n += SB_LANES) {
            const vec y = activate(dtype, activation, load_part(dtype, in, m * in_stride + n, columns - n));
            store_part(dtype, out, m * out_stride + n, columns - n, y);
        }
}

static void activate_all(int dtype, int activation, const void *in, int64_t in_stride, int64_t rows, int64_t columns,
                         void *out, int64_t out_stride) {
    SB_SPECIALIZE(dtype, activation, activate_rows, in, in_stride, rows, columns, out, out_stride)
}

SB_INLINE void lay_out_of(int dtype, int activation, const int whole, const sb_panels *panels) {
    const sb_panels p = *panels;
    for (int64_t t = 0; t < p.tokens; t++) {
        const void *const row = p.rows[t];
        /* A cell's part of a row is too short for the hardware (768 of 3072: 10.8 -> 8.0 ms). */
        const char *const ahead = p.rows[t + SB_ROWS_AHEAD];
        for (int64_t i = 0; i < p.count; i++) {
            const int64_t first = (p.panels[i] - p.first) * p.width;
            float *out = p.out + i * p.out_stride + t * p.width;
            for (int64_t n = 0; n < p.width; n += SB_LANES) {
                const int64_t left = p.features - first - n, valid = left < 0 ? 0 : left;
                __builtin_prefetch(ahead + (first + n) * size_of(dtype));
                if (whole && left >= SB_LANES) {
                    store(out + n, activate(dtype, activation, load_as(dtype, row, first + n)));
                    continue;
                }
                const vec part = activate(dtype, activation, load_part(dtype, row, first + n, valid));
                store_part(SB_FLOAT32, out, n, p.width - n, part);
            }
        }
    }
}

static void lay_out(const sb_panels *p) {
    if (p->width % SB_LANES == 0) {
        SB_SPECIALIZE(p->dtype, p->activation, lay_out_of, 1, p)
    } else {
        SB_SPECIALIZE(p->dtype, p->activation, lay_out_of, 0, p)
    }
}

/* A register tile of the outer products: `rows` x `vectors` accumulators over all tokens of the tile. */
SB_INLINE void outer_tile(const int rows, const int vectors, const int half, const sb_outer *o, int64_t row,
                          int64_t column) {
    vec acc[16][4];
    const int64_t height = o->height, width = o->width;
    const float *a = o->a + row, *b = o->b + column;
    float *out = o->out + row * width + column;
    SB_UNROLL for (int i = 0; i < rows; i++)
        SB_UNROLL for (int v = 0; v < vectors; v++) acc[i][v] = load_weights(SB_FLOAT32, out, i * width + v * SB_LANES, half);
    int64_t left = o->tokens;
    do {
        vec right[4];
        SB_UNROLL for (int v = 0; v < vectors; v++) right[v] = load_weights(SB_FLOAT32, b, v * SB_LANES, half);
        SB_UNROLL for (int i = 0; i < rows; i++) {
            const vec all = splat(a[i]);
            SB_UNROLL for (int v = 0; v < vectors; v++) acc[i][v] = accumulate(acc[i][v], all, right[v]);
        }
        a += height;
        b += width;
    } while (--left > 0);
    SB_UNROLL for (int i = 0; i < rows; i++)
        SB_UNROLL for (int v = 0; v < vectors; v++) store_sums(half, out + i * width + v * SB_LANES, acc[i][v]);
}

/* Columns of a block in tiles of `most` rows; heights are multiples of 8, what is left one of `least`. */
SB_INLINE void outer_columns(const int most, const int least, const int vectors, const int half, const sb_outer *o,
                             int64_t column) {
    int64_t i = 0;
    for (; i + most <= o->height; i += most) outer_tile(most, vectors, half, o, i, column);
    for (; i < o->height; i += least) outer_tile(least, vectors, half, o, i, column);
}

static void outer(const sb_outer *o) {
    enum { WIDE = SB_LANES == 16 ? 4 : 2 };
    for (int64_t j = 0; j < o->width;) {
        const int64_t vectors = (o->width - j) / SB_LANES;
#if SB_LANES == 16
        if (vectors >= 4) outer_columns(6, 2, 4, 0, o, j);
        else if (vectors >= 2) outer_columns(12, 4, 2, 0, o, j);
        else if (vectors) outer_columns(16, 8, 1, 0, o, j);
        else outer_columns(16, 8, 1, 1, o, j);
#else
        if (vectors >= 2) outer_columns(4, 4, 2, 0, o, j);
        else if (vectors) outer_columns(4, 4, 1, 0, o, j);
        else outer_columns(4, 4, 1, 1, o, j);
#endif
        j += (vectors >= WIDE ? WIDE : vectors >= 2 ? 2 : 1) * SB_LANES;
    }
}

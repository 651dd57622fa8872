/* The register-tiled product, written once and unrolled for every (vectors, tokens) the accumulators allow.
 *
 * A tile keeps `group * vectors` accumulators in registers across a whole block row. Each feature costs `vectors`
 * loads of weights and one broadcast a token, so wide panels spare the load ports and narrow ones spare nothing:
 * 28 x 1 vector needs 29 loads for 28 multiply-adds, 12 x 2 needs 14 for 24.
 */

/* Weights of feature k, lanes past the panel left zero when only half a vector belongs to it. */
SB_INLINE vec load_weights(int dtype, const void *w, ptrdiff_t index, int half) {
#if SB_LANES == 16
    if (half) {
        __mmask16 low = 0xff;
        if (dtype == SB_FLOAT32) return (vec)_mm512_maskz_loadu_ps(low, (const float *)w + index);
        __m256i h = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)((const uint16_t *)w + index)));
        h = _mm256_inserti128_si256(_mm256_setzero_si256(), _mm256_castsi256_si128(h), 0);
        return dtype == SB_BFLOAT16 ? from_bfloat16((hvec)h) : from_float16((hvec)h);
    }
#endif
    (void)half;
    return load_as(dtype, w, index);
}

/* What lies past half a vector belongs to the next panel. */
SB_INLINE void store_sums(const int half, float *out, vec sums) {
    if (half) memcpy(out, &sums, sizeof sums / 2);
    else store(out, sums);
}

/* The sums of a tile, or finished results, to where they belong. */
SB_INLINE void store_tile(const int vectors, const int group, const int half, const sb_tile *t, float *out,
                          const float *residual, vec sums[][4]) {
    const int64_t stride = t->acc_stride, step = t->residual_stride;
    const int stream = t->stream;
    SB_UNROLL for (int m = 0; m < group; m++)
        SB_UNROLL for (int v = 0; v < vectors; v++) {
            if (residual) sums[m][v] += load(residual + m * step + v * SB_LANES);
            if (half) store_sums(half, out + m * stride, sums[m][v]);
            else if (stream) stream_as(SB_FLOAT32, out + m * stride, v * SB_LANES, sums[m][v]);
            else store(out + m * stride + v * SB_LANES, sums[m][v]);
        }
}

/* Few accumulators would wait for the multiply-add's latency: split them over features. */
#define SB_SPLIT(vectors, group) ((vectors) * (group) >= 8 ? 1 : (vectors) * (group) >= 4 ? 2 : 4)

/* A tile's activations come from L2, and the next block's from somewhere the hardware cannot guess. */
SB_INLINE void fetch_chunk(const char *chunk, const int bytes) {
    SB_UNROLL for (int at = 0; at < bytes; at += 64) __builtin_prefetch(chunk + at, 0);
}

/* sums[0]: of one group, from `start`. Returns how far what is fetched ahead has come. */
SB_INLINE const char *multiply_widened(int dtype, const int vectors, const int group, const int half, const sb_tile *t,
                                       const float *packed, const float *later, const char *ahead, const vec start[4],
                                       vec sums[][SB_MAX_GROUP][4]) {
    const int split = SB_SPLIT(vectors, group);
    SB_UNROLL for (int s = 0; s < split; s++)
        SB_UNROLL for (int m = 0; m < group; m++)
            SB_UNROLL for (int v = 0; v < vectors; v++) sums[s][m][v] = s ? splat(0.0f) : start[v];
    const size_t size = dtype == SB_FLOAT32 ? 4 : 2;
    const ptrdiff_t row = t->row_stride;
    for (int64_t b = 0; b < t->blocks; b++) {
        const char *w = (const char *)t->w + (size_t)((t->ids ? t->ids[b] : b) * t->block_stride) * size;
        const float *x = packed + t->cols[b] * t->column_stride;
        const int last = b + 1 == t->blocks;
        const float *next = (last ? later : packed) + t->cols[last ? 0 : b + 1] * t->column_stride;
        for (int64_t c = 0; c < t->chunks; c++) {
            fetch_chunk((const char *)next, group * SB_CHUNK * 4);
            next += t->chunk_stride;
            for (int64_t line = 0; line < t->ahead_lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            SB_UNROLL for (int k = 0; k < SB_CHUNK; k++) {
                vec weights[4];
                SB_UNROLL for (int v = 0; v < vectors; v++)
                    weights[v] = load_weights(dtype, w, v * SB_LANES, half);
                SB_UNROLL for (int m = 0; m < group; m++) {
                    const float *token = x + m * SB_CHUNK + k;
                    vec *sum = sums[k % split][m];
                    if (vectors == 1) {
                        *sum = accumulate_splat(*sum, weights[0], token);
                        continue;
                    }
                    vec all = splat(*token);
                    SB_UNROLL for (int v = 0; v < vectors; v++) sum[v] = accumulate(sum[v], all, weights[v]);
                }
                w += row * (ptrdiff_t)size;
            }
            x += t->chunk_stride;
        }
    }
    SB_UNROLL for (int s = 1; s < split; s++)
        SB_UNROLL for (int m = 0; m < group; m++)
            SB_UNROLL for (int v = 0; v < vectors; v++) sums[0][m][v] += sums[s][m][v];
    return ahead;
}

SB_INLINE void tile_widened(int dtype, const int vectors, const int group, const int half, const sb_tile *t) {
    enum { SPLIT_MAX = 4 };
    vec sums[SPLIT_MAX][SB_MAX_GROUP][4], start[4];
    SB_UNROLL for (int v = 0; v < vectors; v++) start[v] = t->bias ? load(t->bias + v * SB_LANES) : splat(0.0f);
    const char *x = t->x, *ahead = t->ahead;
    float *out = t->acc;
    const float *residual = t->residual;
    int64_t left = t->groups;
    do {
        ahead = multiply_widened(dtype, vectors, group, half, t, (const float *)x, (const float *)(x + t->group_bytes), ahead, start, sums);
        store_tile(vectors, group, half, t, out, residual, sums[0]);
        x += t->group_bytes;
        out += group * t->acc_stride;
        residual = residual ? residual + group * t->residual_stride : NULL;
    } while (--left > 0);
}

#ifdef SB_DOT_BFLOAT16
/* Two features at a time: vdpbf16ps wants the pair of one output side by side, so two rows of weights are interleaved
 * in registers, once for all tokens of the group, and no second copy of the weights is kept. */
SB_INLINE void load_pairs(const uint16_t *w, ptrdiff_t row, const int vectors, const int half, __m512i pairs[4]) {
    if (vectors == 1) {
        if (half) {
            __m128i even = _mm_loadu_si128((const __m128i *)w), odd = _mm_loadu_si128((const __m128i *)(w + row));
            __m256i low = _mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd));
            pairs[0] = _mm512_zextsi256_si512(low);
            return;
        }
        pairs[0] = pair_rows(_mm256_loadu_si256((const __m256i *)w), _mm256_loadu_si256((const __m256i *)(w + row)));
        return;
    }
    SB_UNROLL for (int v = 0; v < vectors; v += 2) {
        __m512i even = _mm512_loadu_si512(w + v * SB_LANES), odd = _mm512_loadu_si512(w + row + v * SB_LANES);
        pairs[v] = _mm512_unpacklo_epi16(even, odd);
        pairs[v + 1] = _mm512_unpackhi_epi16(even, odd);
    }
}

SB_INLINE void tile_dot(const int vectors, const int group, const int half, const sb_tile *t) {
    enum { SPLIT_MAX = 4 };
    const int split = SB_SPLIT(vectors, group);
    __m512 acc[SPLIT_MAX][SB_MAX_GROUP][4];
    SB_UNROLL for (int s = 0; s < split; s++)
        SB_UNROLL for (int m = 0; m < group; m++)
            SB_UNROLL for (int v = 0; v < vectors; v++) acc[s][m][v] = _mm512_setzero_ps();
    const ptrdiff_t row = t->row_stride;
    for (int64_t b = 0; b < t->blocks; b++) {
        const uint16_t *w = (const uint16_t *)t->w + (t->ids ? t->ids[b] : b) * t->block_stride;
        const uint16_t *x = (const uint16_t *)t->x + t->cols[b] * t->column_stride;
        const uint16_t *next = (const uint16_t *)t->x + t->cols[b + 1 < t->blocks ? b + 1 : 0] * t->column_stride;
        for (int64_t c = 0; c < t->chunks; c++) {
            fetch_chunk((const char *)next, group * SB_CHUNK * 2);
            next += t->chunk_stride;
            SB_UNROLL for (int k = 0; k < SB_CHUNK / 2; k++) {
                __m512i pairs[4];
                load_pairs(w, row, vectors, half, pairs);
                SB_UNROLL for (int m = 0; m < group; m++) {
                    int32_t two;
                    memcpy(&two, x + m * SB_CHUNK + 2 * k, sizeof two);
                    __m512bh token = (__m512bh)_mm512_set1_epi32(two);
                    SB_UNROLL for (int v = 0; v < vectors; v++)
                        acc[k % split][m][v] = _mm512_dpbf16_ps(acc[k % split][m][v], token, (__m512bh)pairs[v]);
                }
                w += 2 * row;
            }
            x += t->chunk_stride;
        }
    }
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    SB_UNROLL for (int m = 0; m < group; m++) {
        __m512 sum[4];
        SB_UNROLL for (int v = 0; v < vectors; v++) {
            sum[v] = acc[0][m][v];
            SB_UNROLL for (int s = 1; s < split; s++) sum[v] = _mm512_add_ps(sum[v], acc[s][m][v]);
        }
        float *out = t->acc + m * t->acc_stride;
        if (vectors == 1) {
            store_sums(half, out, (vec)sum[0]);
            continue;
        }
        SB_UNROLL for (int v = 0; v < vectors; v += 2) {
            _mm512_storeu_ps(out + v * SB_LANES, _mm512_permutex2var_ps(sum[v], first, sum[v + 1]));
            _mm512_storeu_ps(out + (v + 1) * SB_LANES, _mm512_permutex2var_ps(sum[v], second, sum[v + 1]));
        }
    }
}
#endif

/* Rows of y lie far apart, so each store would wait for its line: asking for all of them before the products hides
 * that (2.5 of 4.9 ms at 768 x 3072, 1576 tokens, 95 % sparsity). */
SB_INLINE void fetch_target(const int group, const sb_tile *t) {
    for (int64_t at = 0; at < t->target_bytes; at += 64)
        for (int m = 0; m < group; m++) __builtin_prefetch(t->target + m * t->target_stride + at, 1);
}

SB_INLINE void tile_of(int dtype, const int vectors, const int group, const int half, const sb_tile *t) {
    fetch_target(group, t);
#ifdef SB_DOT_BFLOAT16
    if (dtype == SB_BFLOAT16) {
        tile_dot(vectors, group, half, t);
        return;
    }
#endif
    tile_widened(dtype, vectors, group, half, t);
}

/* One function for every (dtype, vectors, group), so that each holds its accumulators in registers. */
typedef void (*tile_fn)(const sb_tile *);
#define SB_TILE_NAME(dtype, vectors, group, half) tile_##dtype##_##vectors##_##group##_##half
#define SB_DEFINE(vectors, group, half)                                                                       \
    static void SB_TILE_NAME(0, vectors, group, half)(const sb_tile *t) { tile_of(0, vectors, group, half, t); } \
    static void SB_TILE_NAME(1, vectors, group, half)(const sb_tile *t) { tile_of(1, vectors, group, half, t); } \
    static void SB_TILE_NAME(2, vectors, group, half)(const sb_tile *t) { tile_of(2, vectors, group, half, t); }
#define SB_ENTRY(vectors, group, half)                                                       \
    {SB_TILE_NAME(0, vectors, group, half), SB_TILE_NAME(1, vectors, group, half),           \
     SB_TILE_NAME(2, vectors, group, half)},
#define SB_GROUPS_6(each, v, h) each(v, 1, h) each(v, 2, h) each(v, 3, h) each(v, 4, h) each(v, 5, h) each(v, 6, h)
#define SB_GROUPS_12(each, v, h)                                                                                 \
    SB_GROUPS_6(each, v, h)                                                                                      \
    each(v, 7, h) each(v, 8, h) each(v, 9, h) each(v, 10, h) each(v, 11, h) each(v, 12, h)
#define SB_GROUPS_14(each, v, h) SB_GROUPS_12(each, v, h) each(v, 13, h) each(v, 14, h)
#define SB_GROUPS_28(each, v, h)                                                                                 \
    SB_GROUPS_14(each, v, h)                                                                                     \
    each(v, 15, h) each(v, 16, h) each(v, 17, h) each(v, 18, h) each(v, 19, h)     \
    each(v, 20, h) each(v, 21, h) each(v, 22, h) each(v, 23, h) each(v, 24, h) each(v, 25, h) each(v, 26, h)     \
    each(v, 27, h) each(v, 28, h)

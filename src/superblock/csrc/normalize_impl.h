/* What an instruction set provides for layer norms: one token, normalized. */

/* The sum of all lanes. */
SB_INLINE float sum_of(vec v) {
    float all = v[0];
    for (int i = 1; i < SB_LANES; i++) all += v[i];
    return all;
}

/* A vector of a row less the mean; what lies past the features is zero. */
SB_INLINE vec deviation(int dtype, const void *row, int64_t n, int64_t features, float mean) {
    static const int32_t order[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (features - n >= SB_LANES) return load_as(dtype, row, n) - mean;
    ivec lane;
    memcpy(&lane, order, sizeof lane);
    return choose(lane < (int32_t)(features - n), load_part(dtype, row, n, features - n) - mean, splat(0.0f));
}

/* Four chains of sums, so that none waits for the one before. */
SB_INLINE void normalize_of(int dtype, const sb_norm *norm, const void *row, int64_t features, void *out) {
    enum { CHAINS = 4 };
    const sb_norm l = *norm;
    const int64_t whole = features / (CHAINS * SB_LANES) * (CHAINS * SB_LANES);
    vec total[CHAINS], squares[CHAINS];
    SB_UNROLL for (int c = 0; c < CHAINS; c++) total[c] = squares[c] = splat(0.0f);
    for (int64_t n = 0; n < whole; n += CHAINS * SB_LANES)
        SB_UNROLL for (int c = 0; c < CHAINS; c++) total[c] += load_as(dtype, row, n + c * SB_LANES);
    for (int64_t n = whole; n < features; n += SB_LANES) total[0] += load_part(dtype, row, n, features - n);
    const float mean = sum_of((total[0] + total[1]) + (total[2] + total[3])) / (float)features;
    for (int64_t n = 0; n < whole; n += CHAINS * SB_LANES)
        SB_UNROLL for (int c = 0; c < CHAINS; c++) {
            const vec d = load_as(dtype, row, n + c * SB_LANES) - mean;
            squares[c] += d * d;
        }
    for (int64_t n = whole; n < features; n += SB_LANES) {
        const vec d = deviation(dtype, row, n, features, mean);
        squares[0] += d * d;
    }
    const float variance = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)features;
    const float scale = 1.0f / sqrtf(variance + l.epsilon);
    for (int64_t n = 0; n < features; n += SB_LANES) {
        vec y = deviation(dtype, row, n, features, mean) * scale;
        if (l.weight) y *= load_part(dtype, l.weight, n, features - n);
        if (l.bias) y += load_part(dtype, l.bias, n, features - n);
        store_part(dtype, out, n, features - n, y);
    }
}

static void normalize(int dtype, const sb_norm *norm, const void *row, int64_t features, void *out) {
    SB_OF_DTYPE(dtype, normalize_of, norm, row, features, out)
}

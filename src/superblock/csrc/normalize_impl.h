/* What an instruction set provides for layer norms: tokens, normalized. */

enum { NORM_CHAINS = 4, NORM_STEP = NORM_CHAINS * SB_LANES };

SB_INLINE float sum_of(const vec sums[NORM_CHAINS]) {
    return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* A vector of a row less `center`; what lies past the features is zero. */
SB_INLINE vec deviation(int dtype, const void *row, int64_t n, int64_t features, float center) {
    static const int32_t order[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (features - n >= SB_LANES) return load_as(dtype, row, n) - center;
    ivec lane;
    memcpy(&lane, order, sizeof lane);
    return choose(lane < (int32_t)(features - n), load_part(dtype, row, n, features - n) - center, splat(0.0f));
}

/* The mean of the first features, at most a step of them. */
SB_INLINE float center_of(int dtype, const void *row, int64_t features) {
    vec sums[NORM_CHAINS];
    SB_UNROLL for (int c = 0; c < NORM_CHAINS; c++)
        sums[c] = c * SB_LANES < features ? load_part(dtype, row, c * SB_LANES, features - c * SB_LANES) : splat(0.0f);
    return sum_of(sums) / (float)(features < NORM_STEP ? features : NORM_STEP);
}

/* (x - mean) / sqrt(variance + epsilon) is x * scale + offset. */
typedef struct {
    float scale, offset;
} moments;

/* Both sums in one pass, of deviations from the mean of s features: the square of what that is off the mean of all n is
 * at most n / s of the variance, so that little is lost when the one is taken from the other. Four chains, so that none
 * waits for the one before; the next row is fetched meanwhile. */
SB_INLINE moments moments_of(int dtype, const char *row, const char *next, int64_t features, float epsilon) {
    const int64_t whole = features / NORM_STEP * NORM_STEP, size = size_of(dtype);
    const float center = center_of(dtype, row, features);
    vec total[NORM_CHAINS], squares[NORM_CHAINS];
    SB_UNROLL for (int c = 0; c < NORM_CHAINS; c++) total[c] = squares[c] = splat(0.0f);
    for (int64_t n = 0; n < whole; n += NORM_STEP) {
        SB_UNROLL for (int64_t line = 0; line < NORM_STEP * size; line += 64) __builtin_prefetch(next + n * size + line);
        SB_UNROLL for (int c = 0; c < NORM_CHAINS; c++) {
            const vec d = load_as(dtype, row, n + c * SB_LANES) - center;
            total[c] += d;
            squares[c] += d * d;
        }
    }
    for (int64_t n = whole; n < features; n += SB_LANES) {
        const vec d = deviation(dtype, row, n, features, center);
        total[0] += d;
        squares[0] += d * d;
    }
    const float off = sum_of(total) / (float)features, variance = sum_of(squares) / (float)features - off * off;
    const float scale = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + epsilon);
    return (moments){scale, -(center + off) * scale};
}

SB_INLINE void normalize_row(int dtype, const void *row, int64_t features, moments of, const float *weight,
                             const float *bias, void *out) {
    const int64_t whole = features / NORM_STEP * NORM_STEP;
    for (int64_t n = 0; n < whole; n += NORM_STEP)
        SB_UNROLL for (int64_t i = n; i < n + NORM_STEP; i += SB_LANES)
            store_as(dtype, out, i, (load_as(dtype, row, i) * of.scale + of.offset) * load(weight + i) + load(bias + i));
    for (int64_t n = whole; n < features; n += SB_LANES)
        store_part(dtype, out, n, features - n,
                   (load_part(dtype, row, n, features - n) * of.scale + of.offset) * load(weight + n) + load(bias + n));
}

/* A parameter of every feature, up to a whole vector. */
SB_INLINE void widen_or_fill(int dtype, const void *parameter, float value, int64_t features, float *out) {
    for (int64_t n = 0; n < features; n += SB_LANES)
        store(out + n, parameter ? load_part(dtype, parameter, n, features - n) : splat(value));
}

SB_INLINE void normalize_of(int dtype, const sb_norm *norm, const void **rows, int64_t count, int64_t features,
                            float *room, char *out) {
    const int64_t padded = (features + SB_LANES - 1) / SB_LANES * SB_LANES, row_bytes = features * size_of(dtype);
    float *weight = room, *bias = weight + padded;
    widen_or_fill(dtype, norm->weight, 1.0f, features, weight);
    widen_or_fill(dtype, norm->bias, 0.0f, features, bias);
    for (int64_t m = 0; m < count; m++, out += row_bytes) {
        const moments of = moments_of(dtype, rows[m], rows[m + 1 < count ? m + 1 : m], features, norm->epsilon);
        normalize_row(dtype, rows[m], features, of, weight, bias, out);
        rows[m] = out;
    }
}

static void normalize(int dtype, const sb_norm *norm, const void **rows, int64_t count, int64_t features, float *room,
                      char *out) {
    SB_OF_DTYPE(dtype, normalize_of, norm, rows, count, features, room, out)
}

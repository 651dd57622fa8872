/* Vectorised activations. NaN stays NaN. */

/* e^x, to 2 ulp: 2^n from the exponent bits times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
SB_INLINE vec exponential(vec x) {
    x = clamp(x, -87.0f, 88.0f);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are round(x / ln 2) */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

SB_INLINE vec polynomial(const float *coefficients, const int terms, vec s) {
    vec p = splat(coefficients[terms - 1]);
    SB_UNROLL for (int i = terms - 2; i >= 0; i--) p = p * s + coefficients[i];
    return p;
}

/* The same in four chains of products: one as long as it has terms fills the scheduler before the next vector's starts
 * (GELU of 768 x 3072, 1576 tokens, while it is laid out: 8.0 -> 6.7 ms with the products that follow). */
SB_INLINE vec long_polynomial(const float *coefficients, const int terms, vec s) {
    const vec square = s * s, fourth = square * square;
    vec parts[4];
    SB_UNROLL for (int i = terms - 1; i >= 0; i--)
        parts[i & 3] = i >= terms - 4 ? splat(coefficients[i]) : parts[i & 3] * fourth + coefficients[i];
    return (parts[0] + parts[1] * s) + (parts[2] + parts[3] * s) * square;
}

#define SB_LOG2_E 1.44269504f

/* 2^r on [-1/2, 1/2], to 2e-7 of it with 5 terms and 1e-4 with 3, exactly 1 for 0: minimax in the relative error. */
SB_INLINE vec fraction_power(vec r, const int terms) {
    static const float three[] = {6.932829274e-1f, 2.422109622e-1f, 5.500893142e-2f};
    static const float five[] = {6.931469776e-1f, 2.402224208e-1f, 5.550733744e-2f, 9.671512688e-3f, 1.326472725e-3f};
    return 1.0f + r * polynomial(terms == 3 ? three : five, terms, r);
}

/* 2^x, x <= 0, as exactly; 0 below 2^-126. */
SB_INLINE vec power_of_two(vec x, const int terms) {
#if SB_LANES == 16
    const vec r = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (vec)_mm512_maskz_scalef_ps(normal, (__m512)fraction_power(r, terms), (__m512)(x - r));
#else
    const vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
    return below(x, -126.0f, splat(0.0f), (vec)((ivec)fraction_power(r, terms) + ((ivec)shifted << 23)));
#endif
}

#if SB_LANES == 16
/* 2^x where that is a normal number. */
SB_INLINE vec moderate_power(vec x, const int terms) {
    const vec r = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    return (vec)_mm512_scalef_ps((__m512)fraction_power(r, terms), (__m512)(x - r));
}
#endif

SB_INLINE vec silu(vec x) { return x / (1.0f + exponential(-x)); }

/* x/2 (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3). */
SB_INLINE vec gelu_tanh(vec x) {
    return x / (1.0f + exponential(x * (-1.5957691216f - 0.0713548163f * x * x)));
}

/* x Phi(x). Phi(c) - 1/2 = c P(c^2) on [-5.25, 5.25], weighted minimax in s = 2 c^2 / 5.25^2 - 1: absolute error of
 * the result below 1e-6, which is 14 multiply-adds where a division and an exponential cost twice that. */
SB_INLINE vec gelu(vec x) {
    static const float coefficients[] = {
        1.346593515e-01f, -6.712658215e-02f, 4.964500671e-02f, -3.977141935e-02f, 3.204847271e-02f,
        -2.496526391e-02f, 1.840616407e-02f, -1.308362187e-02f, 8.890172597e-03f, -4.855696285e-03f,
        2.052947941e-03f, -1.578817173e-03f, 1.387552580e-03f, -4.701936467e-04f};
    const vec low = at_least(x, -5.25f), c = at_most(low, 5.25f);
    return low * (0.5f + c * long_polynomial(coefficients, 14, c * c * 0.0725623583f - 1.0f));
}

/* The same for what becomes bfloat16, half of whose last place is this error, 9e-5, at 0.04: P is minimax in c^2 on
 * [-4.125, 4.125], with Phi 0 and 1 at the ends. One chain: powers of c^2 of the tiny biases that layers begin with
 * would be subnormal numbers, which took four times as long. */
SB_INLINE vec gelu_short(vec x) {
    static const float coefficients[] = {3.98500979e-1f,  -6.56577349e-2f, 9.37844813e-3f, -9.7156089e-4f,
                                         6.96895659e-5f, -3.24030248e-6f, 8.69273293e-8f, -1.01412545e-9f};
    const vec low = at_least(x, -4.125f), c = at_most(low, 4.125f);
    return low * (0.5f + c * polynomial(coefficients, 8, c * c));
}

SB_INLINE vec activate(int dtype, int activation, vec x) {
    switch (activation) {
    case SB_RELU: return below(x, 0.0f, splat(0.0f), x);
    case SB_GELU: return dtype == SB_BFLOAT16 ? gelu_short(x) : gelu(x);
    case SB_GELU_TANH: return gelu_tanh(x);
    case SB_SILU: return silu(x);
    default: return x;
    }
}

/* The derivatives. Inputs are clamped to where these have reached their limits, so that infinities stay finite. */

/* s (1 + x (1 - s)), s = 1 / (1 + e^-x). */
SB_INLINE vec silu_slope(vec x) {
    vec c = clamp(x, -87.0f, 87.0f), e = exponential(-c), s = 1.0f / (1.0f + e);
    return s + c * (e * s) * s;
}

/* s (1 + x (1 - s) u'), s = 1 / (1 + e^-u), u = 2 sqrt(2/pi) (x + 0.044715 x^3). */
SB_INLINE vec gelu_tanh_slope(vec x) {
    vec c = clamp(x, -10.0f, 10.0f), q = c * c;
    vec e = exponential(c * (-1.5957691216f - 0.0713548163f * q)), s = 1.0f / (1.0f + e);
    return s + c * (1.5957691216f + 0.2140644489f * q) * (e * s) * s;
}

/* Phi(x) + x phi(x). As for gelu: less 1/2 it is c P(c^2) on [-5.5, 5.5], with s = 2 c^2 / 5.5^2 - 1; absolute error
 * below 1e-6, without an exponential. */
SB_INLINE vec gelu_slope(vec x) {
    static const float coefficients[] = {
        1.287591755e-01f, -6.574013829e-02f, 5.367087200e-02f, -5.372582376e-02f, 6.018722802e-02f,
        -6.885715574e-02f, 7.533518970e-02f, -7.291948050e-02f, 6.065639481e-02f, -5.308612064e-02f,
        4.956649616e-02f, -2.782363072e-02f, 4.100670107e-03f, -6.424903404e-03f, 1.212025899e-02f,
        -4.909866955e-03f};
    vec c = clamp(x, -5.5f, 5.5f);
    return 0.5f + c * long_polynomial(coefficients, 16, c * c * 0.0661157025f - 1.0f);
}

/* The same for gradients that become bfloat16, to 3e-4: minimax in c^2 on [-4.375, 4.375], 0 and 1 at the ends. */
SB_INLINE vec gelu_slope_short(vec x) {
    static const float coefficients[] = {7.97088027e-1f,  -2.63194561e-1f, 5.69921471e-2f, -8.13410152e-3f, 7.85676646e-4f,
                                         -5.06390315e-5f, 2.07350490e-6f,  -4.85328151e-8f, 4.92551500e-10f};
    const vec c = clamp(x, -4.375f, 4.375f);
    return 0.5f + c * polynomial(coefficients, 9, c * c);
}

SB_INLINE vec slope(int dtype, int activation, vec x) {
    switch (activation) {
    case SB_RELU: return below(-x, 0.0f, splat(1.0f), splat(0.0f));
    case SB_GELU: return dtype == SB_BFLOAT16 ? gelu_slope_short(x) : gelu_slope(x);
    case SB_GELU_TANH: return gelu_tanh_slope(x);
    case SB_SILU: return silu_slope(x);
    default: return splat(1.0f);
    }
}

/* Vectors of SB_LANES floats on the compiler's own vector types, so that one template serves every instruction set. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SB_INLINE static inline __attribute__((always_inline))
#define SB_UNROLL _Pragma("GCC unroll 32")

typedef float vec __attribute__((vector_size(4 * SB_LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * SB_LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * SB_LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * SB_LANES)));

SB_INLINE vec splat(float value) { return value - (vec){0}; }
SB_INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
SB_INLINE vec larger(vec a, vec b) {
#if SB_LANES == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}
/* `yes` where x is below the limit, else, and for NaN, `no`. */
SB_INLINE vec below(vec x, float limit, vec yes, vec no) {
#if SB_LANES == 16
    return (vec)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_LT_OQ), (__m512)no, (__m512)yes);
#else
    return choose(x < limit, yes, no);
#endif
}
/* NaN stays NaN: the second operand of the instructions. */
SB_INLINE vec at_least(vec x, float low) {
#if SB_LANES == 16
    return (vec)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#else
    return choose(x < low, splat(low), x);
#endif
}
SB_INLINE vec at_most(vec x, float high) {
#if SB_LANES == 16
    return (vec)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#else
    return choose(x > high, splat(high), x);
#endif
}
SB_INLINE vec clamp(vec x, float low, float high) { return at_least(at_most(x, high), low); }
SB_INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
SB_INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

SB_INLINE float sum_of_lanes(vec v) {
#if SB_LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float all = v[0];
    for (int i = 1; i < SB_LANES; i++) all += v[i];
    return all;
#endif
}

/* sum + a * b in the register of the sum: left to itself, gcc lets the result take over a factor's register and, with 28
 * sums, spills ten of them. A factor used once is read from memory by the product itself. */
SB_INLINE vec accumulate(vec sum, vec a, vec b) {
#if SB_LANES == 16
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#else
    return sum + a * b;
#endif
}
SB_INLINE vec accumulate_splat(vec sum, vec a, const float *b) {
#if SB_LANES == 16
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
    return sum;
#else
    return sum + a * splat(*b);
#endif
}

/* The lanes of a's lower half and b's, or the upper ones', in turn. */
#if SB_LANES == 16
#define SB_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SB_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif SB_LANES == 8
#define SB_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define SB_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define SB_LOWER 0, 4, 1, 5
#define SB_UPPER 2, 6, 3, 7
#endif
#ifdef __clang__
#define SB_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

#ifdef __AVX512BW__
/* Two rows of 16 half-width elements, one after the other, as pairs. */
SB_INLINE __m512i pair_rows(__m256i even, __m256i odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
}
#endif

/* Transposes a square of vectors: interleaving the halves moves one bit of the row number into the lane's. */
SB_INLINE void turn(vec square[SB_LANES]) {
    SB_UNROLL for (int moved = 1; moved < SB_LANES; moved *= 2) {
        vec next[SB_LANES];
        SB_UNROLL for (int i = 0; i < SB_LANES / 2; i++) {
            next[2 * i] = SB_SHUFFLE(square[i], square[i + SB_LANES / 2], SB_LOWER);
            next[2 * i + 1] = SB_SHUFFLE(square[i], square[i + SB_LANES / 2], SB_UPPER);
        }
        SB_UNROLL for (int i = 0; i < SB_LANES; i++) square[i] = next[i];
    }
}

SB_INLINE vec from_bfloat16(hvec h) {
#if SB_LANES == 16 /* gcc widens the halves apart */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
}

#ifdef SB_DOT_BFLOAT16
SB_INLINE hvec to_bfloat16(vec v) { return (hvec)_mm512_cvtneps_pbh((__m512)v); }
#else
/* To nearest even; a NaN keeps its quiet bit instead of rounding up to infinity. */
SB_INLINE hvec to_bfloat16(vec v) {
    uvec bits = (uvec)v, nan = (uvec)(v != v);
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & rounded), hvec);
}
#endif

#if defined(__AVX512F__)
SB_INLINE vec from_float16(hvec h) { return (vec)_mm512_cvtph_ps((__m256i)h); }
SB_INLINE hvec to_float16(vec v) { return (hvec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
SB_INLINE vec from_float16(hvec h) { return (vec)_mm256_cvtph_ps((__m128i)h); }
SB_INLINE hvec to_float16(vec v) { return (hvec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
/* Multiplying by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal. */
SB_INLINE vec from_float16(hvec h) {
    uvec wide = __builtin_convertvector(h, uvec);
    uvec magnitude = (wide & 0x7fff) << 13;
    uvec special = (uvec)(magnitude >= 0x0f800000) & 0x7f800000;
    return (vec)((uvec)((vec)magnitude * 0x1p112f) | special | (wide & 0x8000) << 16);
}
/* Adding 2^(e+13) to a float of exponent e lets its own rounding, to nearest even, drop 13 bits. */
SB_INLINE hvec to_float16(vec v) {
    uvec bits = (uvec)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uvec tiny = (uvec)((vec)magnitude + 0.5f) - 0x3f000000; /* below 2^-14: the sum's bits are the result */
    uvec normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    uvec is_tiny = (uvec)(magnitude < 0x38800000), is_large = (uvec)(magnitude >= 0x477ff000);
    uvec is_nan = (uvec)(magnitude > 0x7f800000);
    uvec large = 0x7c00 | (is_nan & 0x200);
    uvec result = (is_tiny & tiny) | (~is_tiny & ((is_large & large) | (~is_large & normal)));
    return __builtin_convertvector(result | sign, hvec);
}
#endif

SB_INLINE hvec load16(const uint16_t *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return h;
}
SB_INLINE vec load_as(int dtype, const void *base, ptrdiff_t index) {
    if (dtype == SB_FLOAT32) return load((const float *)base + index);
    hvec h = load16((const uint16_t *)base + index);
    return dtype == SB_BFLOAT16 ? from_bfloat16(h) : from_float16(h);
}
SB_INLINE void store_as(int dtype, void *base, ptrdiff_t index, vec v) {
    if (dtype == SB_FLOAT32) {
        store((float *)base + index, v);
        return;
    }
    hvec h = dtype == SB_BFLOAT16 ? to_bfloat16(v) : to_float16(v);
    memcpy((uint16_t *)base + index, &h, sizeof h);
}

/* Past the caches, where the instruction set can; the address is aligned to a vector. */
SB_INLINE void stream_as(int dtype, void *base, ptrdiff_t index, vec v) {
#if SB_LANES == 16
    if (dtype == SB_FLOAT32) {
        _mm512_stream_ps((float *)base + index, (__m512)v);
        return;
    }
    hvec h = dtype == SB_BFLOAT16 ? to_bfloat16(v) : to_float16(v);
    _mm256_stream_si256((__m256i *)((uint16_t *)base + index), (__m256i)h);
#else
    store_as(dtype, base, index, v);
#endif
}

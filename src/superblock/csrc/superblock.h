/* The plain C interface of the native core: what Python calls, and what every instruction set provides.
 *
 * Strides and sizes count elements, never bytes. No function keeps a pointer after it returns.
 */
#ifndef SUPERBLOCK_H
#define SUPERBLOCK_H

#include <stdint.h>

#if defined(_WIN32)
#define SB_API __declspec(dllexport)
#else
#define SB_API __attribute__((visibility("default")))
#endif

enum sb_dtype { SB_FLOAT32, SB_BFLOAT16, SB_FLOAT16, SB_DTYPES };
enum sb_activation { SB_NONE, SB_RELU, SB_GELU, SB_GELU_TANH, SB_SILU, SB_ACTIVATIONS };
enum sb_status { SB_OK, SB_NO_MEMORY, SB_UNSUPPORTED };

/* A block-sparse weight. Element (o, k) of a block is at `o * out_stride + k * in_stride`; one of the two is 1.
 * `ids` says where the values of each entry lie (a transposed index does not move them); NULL: in order. */
typedef struct {
    const void *values;
    const int32_t *crow, *cols, *ids;
    int64_t out_features, in_features;
    int64_t block_out, block_in, out_stride, in_stride, block_stride;
} sb_weight;

/* What a layer norm makes of each token of x before it is multiplied: (x - mean) / sqrt(variance + epsilon) * weight + bias,
 * rounded to the dtype; weight and bias may be NULL. */
typedef struct {
    const void *weight, *bias;
    float epsilon;
    int32_t enabled;
} sb_norm;

/* The window of a convolution over channels-last images; `kernel_h == 0` means a plain linear product. */
typedef struct {
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    int64_t height, width, out_height, out_width, image_stride, row_stride, pixel_stride;
    int64_t channels; /* of x, at every kernel position; the weight's in_features counts whole blocks of them */
} sb_window;

typedef struct {
    sb_weight weight;
    sb_window window;
    sb_norm norm; /* of a plain linear product */
    const void *x, *bias, *residual; /* bias and residual may be NULL */
    void *y, *preactivation;         /* preactivation may be NULL; it has the strides of y */
    int64_t tokens, x_stride, y_stride, residual_stride;
    int32_t dtype, activation, threads;
    int32_t residual_first; /* y = act(z + residual), as residual networks have it, not act(z) + residual */
} sb_product;

/* What changes from call to call, with the meaning it has in a product; y is dense. Of two products in turn x and the
 * preactivations are the first's, the residual and y the second's. What is prepared may serve many threads at once. */
typedef struct {
    const void *x, *residual;
    void *y, *preactivation;
    int64_t tokens, x_stride, residual_stride;
    int32_t threads, sequences; /* the latter of self-attention */
} sb_rows;

/* A prepared product and the rows of one call of it. */
typedef struct {
    const sb_product *product;
    sb_rows rows;
} sb_step;

/* Two products whose hidden activations stay in the core's cache. */
typedef struct {
    sb_product first; /* y is ignored */
    sb_product second; /* x is ignored */
    /* NULL; or the first's results r are multiplied instead of activated: by the activation's slope at z, which has the
     * strides of y. So the transposed products go back from dy to dx, past dz = r act'(z), which is then what the
     * `preactivation` keeps, and whose sum over the tokens `dbias`, unless NULL, becomes. */
    const void *z;
    void *dbias;
} sb_feed_forward;

/* dvalues[b] = dy[:, rows of b]ᵀ act(x[:, columns of b]), blocks in order that lie as the weight's strides say. Of a
 * convolution, columns are those of the windows, and there is no activation. */
typedef struct {
    sb_weight weight; /* values are the result */
    sb_window window; /* kernel_h 0: x has a row a token; else x_stride is ignored */
    const void *grad, *x;
    int64_t tokens, grad_stride, x_stride;
    int32_t dtype, activation, threads;
} sb_sampled;

/* dz = dy act'(z) and its sum over the tokens; z and dz are dense. Without an activation z may be NULL, and dz too,
 * which leaves the sum. */
typedef struct {
    const void *grad, *z;
    void *dz, *dbias;
    int64_t tokens, features, grad_stride;
    int32_t dtype, activation, threads;
} sb_gradient;

/* y = softmax(scale q kᵀ) v by head; the features of a head are dense and a multiple of 8, its keys
 * at least one, and `scale` is positive. */
typedef struct {
    const void *q, *k, *v;
    void *y;
    int64_t batch, heads, queries, keys, features;
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, y_batch, y_head, y_token;
    float scale;
    int32_t dtype, threads;
} sb_attention;

/* y = residual + out-projection(attention(projection(x))): queries, keys and values of all heads from one product, then
 * every token of a sequence with every other. `sequences` of equal length follow one another in x. */
typedef struct {
    sb_product projection; /* [3][heads][features] outputs; y is ignored */
    sb_product output;     /* x is ignored */
    int64_t sequences, heads, features;
    float scale;
    int32_t threads;
} sb_self_attention;

/* z = y + feed_forward(y), y = x + attention(x): a block of an encoder. */
typedef struct {
    const sb_self_attention *attention;
    const sb_feed_forward *feed_forward;
} sb_encoder_block;

SB_API int sb_run_product(const sb_product *product);
SB_API int sb_run_rows(const sb_product *product, const sb_rows *rows);
SB_API int sb_run_feed_forward(const sb_feed_forward *ff);
SB_API int sb_run_feed_forward_rows(const sb_feed_forward *ff, const sb_rows *rows);
SB_API int sb_run_sampled(const sb_sampled *sampled);
SB_API int sb_run_activation_gradient(const sb_gradient *gradient);
SB_API int sb_run_attention(const sb_attention *attention);
/* SB_UNSUPPORTED unless blocks of the projection and heads cover each other whole; and where the three steps take less
 * time: of long sequences, and where neither sequences nor heads can be shared out to the threads. */
SB_API int sb_run_self_attention(const sb_self_attention *attention);
SB_API int sb_run_self_attention_rows(const sb_self_attention *attention, const sb_rows *rows);
/* So many products in turn, each of which may read what those before gave. */
SB_API int sb_run_in_turn(const sb_step *steps, int64_t count);
/* So many blocks in turn, each as wide as the next; `between` has room for as much as y. Residuals and preactivations of
 * `rows` are ignored. SB_UNSUPPORTED as above, before anything has run. */
SB_API int sb_run_encoder_rows(const sb_encoder_block *blocks, int64_t count, void *between, const sb_rows *rows);
/* The gradients of a feed-forward in turn: `back` as above, then those of both values and of the second bias, unless NULL. */
SB_API int sb_run_feed_forward_gradients(const sb_feed_forward *back, const sb_sampled *first, const sb_sampled *second,
                                         const sb_gradient *bias);
/* Weights larger than the caches are read page by page: moved to pages of 2 MB, they wait for fewer translations (one token,
 * 4096 -> 4096, 90 %: 225 -> 200 us in float32, 135 -> 121 in bfloat16). Pages shared with another process are copied. */
SB_API void sb_move_to_huge_pages(const void *memory, int64_t bytes);
/* The instruction sets of this build, best first, as "avx512bf16 avx512 ..."; those the machine lacks are left out. */
SB_API const char *sb_available(void);
/* The one in use. */
SB_API const char *sb_current_name(void);
/* Use the named instruction set; SB_UNSUPPORTED, and no change, unless it is available. */
SB_API int sb_select(const char *name);
/* Multiply-adds in registers on every thread, as many operations as it returns: the machine's ceiling. */
SB_API double sb_run_peak(int32_t dtype, int64_t iterations, int32_t threads);
/* Run on the calling thread only, from now on: OpenMP's pool does not survive fork. */
SB_API void sb_disable_threads(void);

#endif

/* What one instruction set provides to the drivers. */
#ifndef SUPERBLOCK_KERNELS_H
#define SUPERBLOCK_KERNELS_H

#include "superblock.h"

/* Packed activations are chunks of 8 features: [features / 8][group of tokens][8], so that a group's tile of any
 * block is one contiguous run, whatever the stride of x (a power of two would thrash the cache's sets); of rows of images
 * [features / 8][positions][8], of which a group's tile is a run a chunk. An instruction set may prefer chunks of 16 or 32
 * where they divide the block, or take rows as they are. */
enum { SB_CHUNK = 8, SB_MAX_GROUP = 32, SB_MAX_PANEL = 64 };

/* acc[m][n] = sum over blocks of x[m][k] * w[k][n], for one group of tokens and one panel of outputs. */
typedef struct {
    const void *x, *w;
    const int32_t *cols, *ids; /* ids NULL: blocks lie in order from w */
    int64_t blocks, chunks, chunk; /* chunks a block, features a chunk */
    int64_t block_stride, row_stride;
    int64_t chunk_stride, column_stride; /* elements of x: from a chunk to the next, and what cols count in */
    float *acc;
    int64_t acc_stride;
    char *target; /* what the epilogue will write: `target_bytes` a token, fetched while the tile multiplies */
    int64_t target_stride, target_bytes;
    const char *ahead; /* fetched into L2 meanwhile, for later tiles: `ahead_lines` a chunk */
    int64_t ahead_lines;
    /* Of float32 tiles of whole vectors, all zero otherwise: results that need no epilogue, acc[m][n] = bias[n] + the sum
     * + residual[m][n], for `groups` of tokens one after the other. */
    const float *bias, *residual; /* residual may be NULL */
    int64_t groups, group_bytes, residual_stride; /* group_bytes: of packed tokens */
    int32_t stream;                               /* write around the caches */
} sb_tile;

/* y = act(acc + bias) + residual for a tile, or act(acc + bias + residual); or, with `packed`, into the packed activations
 * of a next product, with the preactivations of those rows that are tokens. */
typedef struct {
    const float *acc;
    const void *bias, *residual;
    void *y, *preactivation, *packed;
    int64_t rows, present; /* present: those that are tokens */
    int64_t panel, columns; /* columns: what the matrix has of the panel */
    int64_t packed_columns;       /* of the panel, what the next product reads */
    int64_t packed_from, chunk;   /* the panel's first column there, and the next product's chunk */
    int64_t group, acc_stride, y_stride, residual_stride;
    int32_t dtype, activation, residual_first;
    int32_t stream; /* write around the caches where whole lines allow */
} sb_epilogue;

/* Tokens by block, activated, as floats: out[i][t][n] is feature n of panel `panels[i]` of rows[t], whose features begin
 * with panel `first`; zero past the last feature. SB_ROWS_AHEAD more rows are listed, to be fetched. */
enum { SB_ROWS_AHEAD = 2 };
typedef struct {
    const void *const *rows;
    float *out;
    const int32_t *panels;
    int64_t count, first, tokens, features, width, out_stride;
    int32_t dtype, activation;
} sb_panels;

/* out[i][j] += sum over tokens of a[t][i] * b[t][j], all dense; height and width are multiples of 8. */
typedef struct {
    const float *a, *b;
    float *out;
    int64_t tokens, height, width;
} sb_outer;

/* Packed activations of a group times the slope of an activation at z, in place, which dz keeps and `totals` adds up over
 * the tokens; both may be NULL. Rows of z and dz are `stride` apart, which are whole lines if dz is to be streamed. Features
 * that are not read (see reads.h) become zero, in runs of whole vectors. */
typedef struct {
    void *packed, *dz;
    const void *z;
    const uint8_t *reads;
    float *totals;
    int64_t tokens, group, features, chunk, stride;
    int32_t dtype, activation, stream;
} sb_slope;

struct sb_layer;
struct sb_target;

/* y = softmax(scale q kᵀ) v of one head: rows of `features`, `*_token` apart. `scale` is positive. */
typedef struct {
    const void *q, *k, *v;
    void *y;
    int64_t queries, keys, features, q_token, k_token, v_token, y_token;
    float scale;
    int32_t dtype;
} sb_head;

typedef struct sb_kernels {
    const char *name;
    int (*supported)(void);
    const struct sb_kernels *base; /* multiplies what this one leaves: see sb_kernels_for; NULL: it leaves nothing */
    int32_t longest_chunk;         /* features */
    int32_t lanes;                 /* floats a vector */
    int32_t groups[5];             /* the most tokens a group by vectors a panel; 0: no such tile */
    int32_t small_group;           /* the most where a strip's weights stay in L1; 0: as many as elsewhere */
    int32_t packed_size[SB_DTYPES]; /* bytes of a packed activation */
    void (*tile)(int dtype, int64_t panel, int64_t group, const sb_tile *tile);
    void (*epilogue)(const sb_epilogue *epilogue);
    /* `count` tokens of chunks that have room for `stride` of them. */
    void (*pack)(int dtype, const void *const *rows, int64_t count, int64_t stride, int64_t features, int64_t padded,
                 int64_t chunk, void *packed);
    /* Values as this one's tiles want them, panels of [features / 2][panel][2] `panel_stride` apart; NULL: feature-major,
     * as they are. */
    void (*pair)(const uint16_t *in, int64_t out_stride, int64_t in_stride, int64_t outputs, int64_t features,
                 int64_t panel, uint16_t *out, int64_t panel_stride);
    /* Before and after a thread's run of tiles of one shape; NULL: they need nothing. */
    void (*prepare)(int64_t panel, int64_t chunk);
    void (*finish)(void);
    /* sb_layer_run, where these kernels walk a layer in a way of their own: one whose blocks' heights `run_outputs` divides.
     * NULL: none. */
    void (*run)(const struct sb_layer *layer, const struct sb_target *target, int64_t first, int64_t last, float *acc);
    int32_t run_outputs;
    void (*lay_out)(const sb_panels *panels);
    void (*narrow)(int dtype, const float *source, int64_t count, void *target);
    void (*activate)(int dtype, int activation, const void *in, int64_t in_stride, int64_t rows, int64_t columns,
                     void *out, int64_t out_stride);
    /* `rows` become normalized ones, one after the other from `out` on; `room` is for the parameters as floats. */
    void (*normalize)(int dtype, const sb_norm *norm, const void **rows, int64_t count, int64_t features, float *room,
                      char *out);
    /* `ahead`, or NULL, is what the thread will probably attend to next: it may be fetched. Returns a status. */
    int (*attend)(const sb_head *head, const sb_head *ahead);
    /* `rows` x `columns` elements of `size` bytes to `columns` x `rows`, dense; both are multiples of 8. */
    void (*transpose)(int size, const void *in, int64_t in_stride, int64_t rows, int64_t columns, void *out);
    /* dz for tokens `start` to `stop`, written around the caches to `stream`, where rows are whole lines; added to
     * `sums` too, which reach a whole vector. */
    void (*gradient)(const sb_gradient *gradient, int64_t start, int64_t stop, int stream, float *sums);
    void (*slope)(const sb_slope *slope);
    void (*outer)(const sb_outer *outer);
    /* out [height][width] += dyᵀ x for operands laid out as [tokens / 32][height][32] and [tokens / 32][16][width][2],
     * sides multiples of 16, once prepared for a panel and chunk of 32; NULL: only the above. The next two lay out
     * `width` features from `feature` on of 32 rows in these ways. */
    void (*outer_pairs)(const uint16_t *dy, const uint16_t *x, float *out, int64_t tokens, int64_t height,
                        int64_t width);
    void (*turn_tokens)(const uint16_t *const *rows, int64_t feature, int64_t width, uint16_t *out);
    void (*pair_tokens)(const uint16_t *const *rows, int64_t feature, int64_t width, uint16_t *out);
    double (*peak)(int dtype, int64_t iterations);
} sb_kernels;

extern const sb_kernels sb_portable;
#ifdef SB_X86 /* set by the build where it compiles these */
extern const sb_kernels sb_avx2, sb_avx512, sb_avx512bf16;
#endif
#ifdef SB_AMX /* likewise */
extern const sb_kernels sb_amx;
#endif

const sb_kernels *sb_current(void);
/* Those of the current instruction set, or of its base, that suit a product of this many tokens. */
const sb_kernels *sb_kernels_for(int32_t dtype, int64_t tokens);

#endif

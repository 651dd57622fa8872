/* Fetching the next head while this one is computed: its rows lie far apart, where the hardware does not look ahead.
 *
 * The lines are asked for a few at a time, between products: a burst of them fills the core's queue of misses, and all
 * else waits: 22 of 106 us a head in float32, at the shape of ViT-B/16 and batch 16. There this takes a layer from 19.5
 * to 15.6 ms of one thread.
 */
#include "layer.h"

enum { FETCH_QUEUE = 128 };

typedef struct {
    const sb_head *head;
    int64_t each;            /* lines a call */
    int tensor;              /* of those of fetch_row; the last one will be written */
    int64_t row, rows;       /* of that tensor: the next one, and how many */
    const char *line, *end;  /* of the current row */
    int write;               /* what is queued */
    int64_t next, queued;
    const char *queue[FETCH_QUEUE];
} fetcher;

/* For a head that calls `fetch` about `calls` times; `ahead` may be NULL. */
static void fetch_during(fetcher *f, int64_t calls, const sb_head *ahead) {
    memset(f, 0, offsetof(fetcher, queue));
    if (!ahead) return;
    f->head = ahead;
    f->tensor = -1;
    const int64_t lines = ahead->features * size_of(ahead->dtype) / 64 + 1;
    f->each = 1 + lines * 2 * (ahead->keys + ahead->queries) / calls;
}

/* On to the next row of the keys, values, queries and results; 0 after the last. */
static int fetch_row(fetcher *f) {
    const sb_head *h = f->head;
    const void *const tensors[] = {h->k, h->v, h->q, h->y};
    const int64_t strides[] = {h->k_token, h->v_token, h->q_token, h->y_token};
    if (f->row == f->rows) {
        if (f->tensor == 3) return 0;
        f->tensor++;
        f->row = 0;
        f->rows = f->tensor < 2 ? h->keys : h->queries;
    }
    const int64_t size = size_of(h->dtype);
    const char *start = (const char *)tensors[f->tensor] + f->row++ * strides[f->tensor] * size;
    f->line = start - (uintptr_t)start % 64;
    f->end = start + h->features * size;
    return 1;
}

/* Choose the lines of the next `calls` calls: loops whose sums fill the registers have none to spare for this. */
static void plan_fetches(fetcher *f, int64_t calls) {
    const int64_t count = calls * f->each < FETCH_QUEUE ? calls * f->each : FETCH_QUEUE;
    f->next = 0;
    f->write = f->tensor == 3;
    for (f->queued = 0; f->queued < count; f->line += 64) {
        if (f->line >= f->end && !fetch_row(f)) return;
        f->queue[f->queued++] = f->line;
    }
}

SB_INLINE void fetch(fetcher *f) {
    for (int64_t i = 0; i < f->each && f->next < f->queued; i++) {
        const char *line = f->queue[f->next++];
        if (f->write) __builtin_prefetch(line, 1);
        else __builtin_prefetch(line, 0, 2);
    }
}

/* Threads and scratch memory.
 *
 * The OpenMP runtime is whichever one the process already has, torch's own, found by name at run time: linking one
 * would bring a second pool that fights the first for the cores.
 */
#define _GNU_SOURCE
#include "parallel.h"
#include "superblock.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef void (*gomp_parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

/* Looked for until it is there. */
static gomp_parallel find_parallel(void) {
    static _Atomic(gomp_parallel) found;
    gomp_parallel parallel = atomic_load(&found);
    if (!parallel) atomic_store(&found, parallel = (gomp_parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return parallel;
}

static atomic_int threads_disabled;

SB_API void sb_disable_threads(void) { atomic_store(&threads_disabled, 1); }

typedef struct {
    int (*item)(const void *, int64_t);
    const void *context;
    int64_t items;
    _Atomic int64_t next;
    atomic_int status;
} job;

static void work(void *data) {
    job *j = data;
    for (;;) {
        int64_t i = atomic_fetch_add(&j->next, 1);
        if (i >= j->items) return;
        int status = j->item(j->context, i);
        if (status != SB_OK) atomic_store(&j->status, status);
    }
}

int sb_parallel(int32_t threads, int64_t items, int (*item)(const void *, int64_t), const void *context) {
    job j = {.item = item, .context = context, .items = items};
    if (threads > items) threads = (int32_t)items;
    gomp_parallel parallel = threads > 1 && !atomic_load(&threads_disabled) ? find_parallel() : NULL;
    if (parallel) parallel(work, &j, (unsigned)threads, 0);
    else work(&j);
    return atomic_load(&j.status);
}

typedef struct {
    void *memory;
    size_t bytes;
} buffer;

static pthread_key_t key;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;
static int key_failed;

static void release(void *data) {
    for (int use = 0; use < SB_USES; use++) free(((buffer *)data)[use].memory);
    free(data);
}

static void make_key(void) { key_failed = pthread_key_create(&key, release); }

void *sb_scratch(enum sb_scratch_use use, size_t bytes) {
    pthread_once(&key_once, make_key);
    if (key_failed) return NULL;
    buffer *own = pthread_getspecific(key);
    if (!own) {
        own = calloc(SB_USES, sizeof *own);
        if (!own || pthread_setspecific(key, own)) {
            free(own);
            return NULL;
        }
    }
    own += use;
    if (own->bytes < bytes) {
        free(own->memory);
        own->bytes = 0;
        own->memory = NULL;
        if (posix_memalign(&own->memory, 64, bytes)) {
            own->memory = NULL;
            return NULL;
        }
        own->bytes = bytes;
    }
    return own->memory;
}

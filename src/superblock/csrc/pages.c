#include "pages.h"
#include "superblock.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

/* Whether memory has been written before: of pages as large as these results the kernel gives fresh ones otherwise. */
static int is_resident(const void *memory) {
#if defined(__linux__)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    unsigned char resident = 0;
    return mincore((void *)((uintptr_t)memory / page * page), 1, &resident) == 0 && (resident & 1);
#else
    (void)memory;
    return 0;
#endif
}

int sb_streams(const void *results, int64_t bytes) {
    enum { STREAMED_BYTES = 8 << 20 };
    return bytes > STREAMED_BYTES && is_resident((const char *)results + bytes / 2);
}

#if defined(__linux__)
/* The 2 MB pages that lie wholly in `memory` are to be huge: at their first fault, or at once. */
static void advise(const void *memory, int64_t bytes, int advice) {
    enum { HUGE = 2 << 20 };
    const uintptr_t start = ((uintptr_t)memory + HUGE - 1) / HUGE * HUGE;
    const uintptr_t end = ((uintptr_t)memory + (size_t)bytes) / HUGE * HUGE;
    if (start < end) madvise((void *)start, end - start, advice); /* refused where the kernel has none */
}
#endif

void sb_prefer_huge_pages(const void *memory, int64_t bytes) {
#if defined(__linux__)
    if (bytes > SB_REUSED_BYTES) advise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

SB_API void sb_move_to_huge_pages(const void *memory, int64_t bytes) {
#if defined(__linux__)
    enum { COLLAPSE = 25 }; /* since Linux 6.1; its name is unknown to older headers */
    enum { CACHED_BYTES = 4 << 20 };
    if (bytes > CACHED_BYTES) advise(memory, bytes, COLLAPSE);
#else
    (void)memory, (void)bytes;
#endif
}

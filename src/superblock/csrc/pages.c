#include "pages.h"

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

void sb_prefer_huge_pages(const void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    enum { HUGE = 2 << 20 };
    const uintptr_t start = ((uintptr_t)memory + HUGE - 1) / HUGE * HUGE;
    const uintptr_t end = ((uintptr_t)memory + (size_t)bytes) / HUGE * HUGE;
    if (bytes > SB_REUSED_BYTES) madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

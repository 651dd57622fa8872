/* The choice of the instruction set, once at run time. */
#include "kernels.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

static const sb_kernels *const all[] = {
#ifdef SB_AMX
    &sb_amx,
#endif
#ifdef SB_X86
    &sb_avx512bf16, &sb_avx512, &sb_avx2,
#endif
    &sb_portable,
};
enum { COUNT = sizeof all / sizeof *all };

static _Atomic(const sb_kernels *) chosen;

const sb_kernels *sb_current(void) {
    const sb_kernels *kernels = atomic_load(&chosen);
    for (int i = 0; !kernels; i++)
        if (all[i]->supported()) kernels = all[i];
    atomic_store(&chosen, kernels);
    return kernels;
}

/* An instruction set with a base is one for bfloat16 tiles, which few tokens would leave mostly empty. */
enum { LEAST_TOKENS = 16 };

const sb_kernels *sb_kernels_for(int32_t dtype, int64_t tokens) {
    const sb_kernels *kernels = sb_current();
    return kernels->base && (dtype != SB_BFLOAT16 || tokens < LEAST_TOKENS) ? kernels->base : kernels;
}

SB_API const char *sb_available(void) {
    static _Thread_local char names[64];
    size_t used = 0;
    for (int i = 0; i < COUNT; i++)
        if (all[i]->supported())
            used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? " " : "", all[i]->name);
    return names;
}

SB_API const char *sb_current_name(void) { return sb_current()->name; }

SB_API int sb_select(const char *name) {
    for (int i = 0; i < COUNT; i++)
        if (strcmp(all[i]->name, name) == 0 && all[i]->supported()) {
            atomic_store(&chosen, all[i]);
            return SB_OK;
        }
    return SB_UNSUPPORTED;
}

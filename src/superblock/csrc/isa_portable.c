/* The compiler's own 4-lane vectors: SSE2, NEON or whatever the target has. Two vectors make 8 outputs; 32 registers
 * (aarch64) would hold more tokens than 6, but 16 (x86) do not. */
#define SB_LANES 4
#define SB_DOT(dtype) 0
#include "kernels.h"
#include "simd.h"
#include "activations.h"
#include "tile.h"
#include "kernels_impl.h"

#if defined(__aarch64__)
SB_GROUPS_6(SB_DEFINE, 4, 0)
#endif
SB_GROUPS_6(SB_DEFINE, 2, 0)

static void tile(int dtype, int64_t panel, int64_t group, const sb_tile *t) {
    static const tile_fn twos[][SB_DTYPES] = {SB_GROUPS_6(SB_ENTRY, 2, 0)};
#if defined(__aarch64__)
    static const tile_fn fours[][SB_DTYPES] = {SB_GROUPS_6(SB_ENTRY, 4, 0)};
    if (panel == 16) {
        fours[group - 1][dtype](t);
        return;
    }
#else
    (void)panel;
#endif
    twos[group - 1][dtype](t);
}

static int supported(void) { return 1; }

#if defined(__aarch64__)
#define SB_GROUPS {0, 0, 6, 0, 6}
#else
#define SB_GROUPS {0, 0, 6, 0, 0}
#endif
const sb_kernels sb_portable = {
    .name = "portable", .groups = SB_GROUPS, .packed_size = {4, 4, 4}, SB_COMMON_KERNELS};

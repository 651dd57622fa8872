/* AVX2 with FMA and F16C: 8 lanes, 16 registers, so 6 x 16 and 12 x 8. */
#define SB_LANES 8
#define SB_DOT(dtype) 0
#include "kernels.h"
#include "simd.h"
#include "activations.h"
#include "tile.h"
#include "kernels_impl.h"

SB_GROUPS_12(SB_DEFINE, 1, 0)
SB_GROUPS_6(SB_DEFINE, 2, 0)

static void tile(int dtype, int64_t panel, int64_t group, const sb_tile *t) {
    static const tile_fn ones[][SB_DTYPES] = {SB_GROUPS_12(SB_ENTRY, 1, 0)};
    static const tile_fn twos[][SB_DTYPES] = {SB_GROUPS_6(SB_ENTRY, 2, 0)};
    (panel == 8 ? ones[group - 1] : twos[group - 1])[dtype](t);
}

static int supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const sb_kernels sb_avx2 = {
    .name = "avx2", .groups = {0, 12, 6, 0, 0}, .packed_size = {4, 4, 4}, SB_COMMON_KERNELS};

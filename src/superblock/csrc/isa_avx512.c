/* AVX-512: 16 lanes, 32 registers. */
#define SB_LANES 16
#define SB_DOT(dtype) 0
#include "kernels.h"
#include "simd.h"
#include "activations.h"
#include "tile.h"
#include "kernels_impl.h"
#include "isa_avx512.h"

static int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

const sb_kernels sb_avx512 = SB_KERNELS("avx512", 4);

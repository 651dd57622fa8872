/* AVX-512 with vdpbf16ps: as AVX-512, with bfloat16 products at twice the rate. */
#define SB_LANES 16
#define SB_DOT(dtype) ((dtype) == SB_BFLOAT16)
#define SB_DOT_BFLOAT16
#include "kernels.h"
#include "simd.h"
#include "activations.h"
#include "tile.h"
#include "kernels_impl.h"
#include "isa_avx512.h"

static int supported(void) { return sb_avx512.supported() && __builtin_cpu_supports("avx512bf16"); }

const sb_kernels sb_avx512bf16 = SB_KERNELS("avx512bf16", 2);

/* The tiles of both AVX-512 variants: 28 x 16, 14 x 32 and 6 x 64 fill 28 or 24 of the 32 registers. */
SB_GROUPS_28(SB_DEFINE, 1, 1)
SB_GROUPS_28(SB_DEFINE, 1, 0)
SB_GROUPS_14(SB_DEFINE, 2, 0)
SB_GROUPS_6(SB_DEFINE, 4, 0)

static void tile(int dtype, int64_t panel, int64_t group, const sb_tile *t) {
    static const tile_fn halves[][SB_DTYPES] = {SB_GROUPS_28(SB_ENTRY, 1, 1)};
    static const tile_fn ones[][SB_DTYPES] = {SB_GROUPS_28(SB_ENTRY, 1, 0)};
    static const tile_fn twos[][SB_DTYPES] = {SB_GROUPS_14(SB_ENTRY, 2, 0)};
    static const tile_fn fours[][SB_DTYPES] = {SB_GROUPS_6(SB_ENTRY, 4, 0)};
    const tile_fn *one = panel == 8    ? halves[group - 1]
                         : panel == 16 ? ones[group - 1]
                         : panel == 32 ? twos[group - 1]
                                       : fours[group - 1];
    one[dtype](t);
}

#define SB_KERNELS(isa, bfloat16_size) \
    {.name = isa, .groups = {28, 28, 14, 0, 6}, .packed_size = {4, bfloat16_size, 4}, SB_COMMON_KERNELS}

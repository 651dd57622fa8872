"""``y = act(x Wᵀ + b) + r`` for a few tokens: bound by reading the weight, so it is read once, in wide rows.

A program takes a few outputs of one block row, which gives enough programs to fill a device without cutting the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from superblock.ops.triton.configs import Config
from superblock.ops.triton.epilogue import finish
from superblock.ops.triton.launch import Launch
from superblock.ops.triton.plans import Operand


@triton.jit(do_not_specialize=["tokens", "panels"])
def decode_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    z_ptr,
    starts_ptr,
    cols_ptr,
    ids_ptr,
    tokens,
    out_features,
    in_features,
    panels,
    x_stride,
    residual_stride,
    w_block_stride,
    w_out_stride,
    w_in_stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """``BLOCK_N`` outputs of all ``TOKENS`` tokens, in float32, ``BLOCK_K`` stored columns at a time."""
    PARTS: tl.constexpr = BLOCK_OUT // BLOCK_N
    panel = tl.program_id(0) // PARTS
    rows = tl.arange(0, TOKENS)
    n = tl.program_id(0) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    begin = tl.load(starts_ptr + panel)
    end = tl.load(starts_ptr + panel + 1)
    acc = tl.zeros((TOKENS, BLOCK_N, BLOCK_K), dtype=tl.float32)
    for step in range(0, (end - begin) * BLOCK_IN, BLOCK_K):
        places = begin + (step + k) // BLOCK_IN
        inner = (step + k) % BLOCK_IN
        living = places < end
        x_cols = tl.load(cols_ptr + places, mask=living, other=0) * BLOCK_IN + inner
        x_cols = tl.max_contiguous(tl.multiple_of(x_cols, BLOCK_IN), BLOCK_IN)
        ids = places
        if ids_ptr is not None:
            ids = tl.load(ids_ptr + places, mask=living, other=0)
        w_places = (ids.to(tl.int64) * w_block_stride + inner * w_in_stride)[None, :] + n[:, None] * w_out_stride
        # Asked for before the columns are known: reading the weight is all the time there is.
        w = tl.load(w_ptr + w_places, mask=living[None, :], other=0.0).to(tl.float32)
        x_mask = (rows < tokens)[:, None] & (living & (x_cols < in_features))[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + x_cols[None, :], mask=x_mask, other=0.0).to(tl.float32)
        acc += x[:, None, :] * w[None, :, :]
    cols = panel * BLOCK_OUT + n
    stored = (rows < tokens)[:, None] & (cols < out_features)[None, :]
    finish(
        tl.sum(acc, 2), 0, rows, cols, stored, bias_ptr, residual_ptr, y_ptr, z_ptr, out_features, residual_stride,
        ACTIVATION,
    )  # fmt: skip


def launches(
    x: Tensor,
    operand: Operand,
    y: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    config: Config,
) -> list[Launch]:
    """The launch that fills ``y [tokens, out]``, and ``z`` where it is kept, from ``x [tokens, in]``."""
    walk = operand.walk(1)
    arguments = {
        "x_ptr": x,
        "w_ptr": operand.values,
        "bias_ptr": bias,
        "residual_ptr": residual,
        "y_ptr": y,
        "z_ptr": z,
        "starts_ptr": walk.starts,
        "cols_ptr": walk.cols,
        "ids_ptr": walk.ids,
        "tokens": x.shape[0],
        "out_features": operand.out_features,
        "in_features": operand.in_features,
        "panels": walk.panels,
        "x_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        **operand.strides,
        "BLOCK_OUT": operand.block_out,
        "BLOCK_IN": operand.block_in,
        "TOKENS": config.m,
        "BLOCK_N": config.n,
        "BLOCK_K": config.k,
        "ACTIVATION": activation,
    }
    programs = walk.panels * (operand.block_out // config.n)
    return [Launch(decode_kernel, (programs,), arguments, config.warps, config.stages)]

"""What follows a product's sum, in float32 registers: bias, activation, residual, and the rounding to the output."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from superblock.ops.triton.launch import Launch


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """``none``, ``relu``, ``gelu`` (exact), ``gelu_tanh`` or ``silu``, element by element in float32."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # Not a maximum, which would turn NaN into zero.
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # (1 + tanh u) / 2 = sigmoid 2u
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def finish(
    z,
    first_row,
    rows,
    cols,
    stored,
    bias_ptr,
    residual_ptr,
    y_ptr,
    z_ptr,
    features,
    residual_stride,
    ACTIVATION: tl.constexpr,
):
    """``y = act(z + b) + r`` at ``[first_row + rows, cols]`` where ``stored``, and ``z + b`` where it is kept."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < features, other=0.0).to(tl.float32)[None, :]
    places = rows[:, None] * features + cols[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + first_row * features + places, z.to(z_ptr.dtype.element_ty), mask=stored)
    y = activate(z, ACTIVATION)
    if residual_ptr is not None:
        residual = residual_ptr + first_row * residual_stride + rows[:, None] * residual_stride + cols[None, :]
        y += tl.load(residual, mask=stored, other=0.0).to(tl.float32)
    tl.store(y_ptr + first_row * features + places, y.to(y_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["tokens", "splits"])
def combine_kernel(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    z_ptr,
    tokens,
    features,
    residual_stride,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """``y = act(Σ partial + b) + r``: the parts of a sum, ``[splits, tokens, features]``, always in the same order."""
    across = tl.cdiv(features, BLOCK_N)
    first_row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = (first_row + rows < tokens)[:, None] & (cols < features)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in range(splits):
        part_ptr = partial_ptr + (first_row + tl.cast(split, tl.int64) * tokens) * features
        acc += tl.load(part_ptr + rows[:, None] * features + cols[None, :], mask=stored, other=0.0)
    finish(
        acc, first_row, rows, cols, stored, bias_ptr, residual_ptr, y_ptr, z_ptr, features, residual_stride, ACTIVATION
    )


def combine(
    partial: Tensor, y: Tensor, z: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Launch:
    """The launch that sums ``partial [splits, tokens, features]`` into ``y [tokens, features]``."""
    splits, tokens, features = partial.shape
    block_m, block_n = (4, 256) if features >= 256 else (16, 64)
    return Launch(
        combine_kernel,
        (-(-tokens // block_m) * -(-features // block_n),),
        {
            "partial_ptr": partial,
            "bias_ptr": bias,
            "residual_ptr": residual,
            "y_ptr": y,
            "z_ptr": z,
            "tokens": tokens,
            "features": features,
            "residual_stride": 0 if residual is None else residual.stride(0),
            "splits": splits,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "ACTIVATION": activation,
        },
        warps=4,
        stages=2,
    )

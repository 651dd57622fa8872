"""What follows a product's sum, in float32 registers: bias, activation, residual, and the rounding to the output."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from superblock.ops.triton.launch import Launch


@triton.jit
def gelu_for_16_bits(z):
    """``z Φ(z)``, off by less than 1.6e-5 or 1e-5 of itself, at a third of what the error function costs.

    ``Φ(c) - 1/2 = c P(c²)`` on [-4.5, 4.5], weighted minimax in ``s = 2 c² / 4.5² - 1``.
    """
    c = tl.minimum(tl.maximum(z, -4.5), 4.5)
    s = c * c * 0.09876543209876543 - 1.0
    p = s * -0.001565671982 + 0.00465532237
    p = p * s - 0.006682840005
    p = p * s + 0.01014045764
    p = p * s - 0.01815922349
    p = p * s + 0.02862396905
    p = p * s - 0.04029578785
    p = p * s + 0.05467185073
    p = p * s - 0.07718336993
    p = p * s + 0.1569053007
    return tl.where(z < -4.5, 0.0, z * (0.5 + c * p))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, HALF: tl.constexpr):
    """``none``, ``relu``, ``gelu`` (exact to what ``HALF`` holds), ``gelu_tanh`` or ``silu``, in float32."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # Not a maximum, which would turn NaN into zero.
    elif ACTIVATION == "gelu" and HALF:
        z = gelu_for_16_bits(z)
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
    y = activate(z, ACTIVATION, y_ptr.dtype.element_ty.primitive_bitwidth == 16)
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

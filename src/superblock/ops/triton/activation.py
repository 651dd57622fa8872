"""``dz = dy · act'(z)`` and ``db = Σ dz`` over the tokens, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from superblock.ops.triton.epilogue import combine
from superblock.ops.triton.launch import Launch, device_of

BLOCK_M, BLOCK_N = 32, 128


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative of an activation at ``z``, in float32."""
    if ACTIVATION == "relu":
        found = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        found = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        found = gate + z * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(z)
        found = gate + z * gate * (1.0 - gate)
    else:
        found = z * 0.0 + 1.0
    return found


@triton.jit(do_not_specialize=["tokens"])
def activation_gradient_kernel(
    grad_ptr,
    z_ptr,
    dz_ptr,
    dbias_ptr,
    tokens,
    features,
    grad_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """``BLOCK_N`` features over this program's share of the tokens, whose sums go to ``dbias [shares, features]``."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(tokens, tl.num_programs(1)), BLOCK_M) * BLOCK_M
    first = tl.program_id(1) * share
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for step in range(first, tl.minimum(first + share, tokens), BLOCK_M):
        rows = (step + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        living = (rows < tokens) & (cols < features)[None, :]
        z = tl.load(z_ptr + rows * features + cols[None, :], mask=living, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows * grad_stride + cols[None, :], mask=living, other=0.0).to(tl.float32)
        dz = (grad * slope(z, ACTIVATION)).to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + rows * features + cols[None, :], dz, mask=living)
        sums += tl.sum(dz.to(tl.float32), 0)
    tl.store(dbias_ptr + tl.program_id(1).to(tl.int64) * features + cols, sums, mask=cols < features)


def launches(grad: Tensor, z: Tensor, dz: Tensor, dbias: Tensor, activation: str) -> list[Launch]:
    """The launches that fill ``dz [tokens, features]`` and ``dbias [features]``; shares are summed in order."""
    tokens, features = z.shape
    across = -(-features // BLOCK_N)
    shares = max(1, min(4 * device_of(z.device).multiprocessors // across, -(-tokens // BLOCK_M)))
    partial = torch.empty(shares, 1, features, dtype=torch.float32, device=z.device)
    arguments = {
        "grad_ptr": grad,
        "z_ptr": z,
        "dz_ptr": dz,
        "dbias_ptr": partial,
        "tokens": tokens,
        "features": features,
        "grad_stride": grad.stride(0),
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "ACTIVATION": activation,
    }
    first = Launch(activation_gradient_kernel, (across, shares), arguments, 4, 1)
    return [first, combine(partial, dbias.view(1, -1), None, None, None, "none")]

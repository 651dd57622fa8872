"""``dW = dyᵀ x`` at the stored blocks: several blocks of one block row share each tile of ``dy``.

The columns of ``x`` that those blocks need are gathered side by side on the tensor core's M axis, so blocks of 16 fill
it as well as blocks of 128 do, and nothing is multiplied that is not stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from superblock.ops.triton.configs import Config
from superblock.ops.triton.epilogue import combine
from superblock.ops.triton.launch import Launch, device_of, precision_of, splits_for
from superblock.ops.triton.plans import Plan


@triton.jit(do_not_specialize=["tokens"])
def sampled_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    starts_ptr,
    rows_ptr,
    cols_ptr,
    tokens,
    out_features,
    in_features,
    nnz,
    grad_stride,
    x_stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The blocks of one group, over this program's share of the tokens: ``[BLOCK_M / BLOCK_IN, bh, bw]``.

    ``starts [groups + 1]`` are stored blocks, ``rows [groups]`` their block row. ``WHOLE``: no block is cut by the
    matrix's edge.
    """
    group = tl.program_id(0)
    start = tl.load(starts_ptr + group)
    end = tl.load(starts_ptr + group + 1)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_OUT)
    t = tl.arange(0, BLOCK_T)
    blocks = start + m // BLOCK_IN
    living = blocks < end
    x_cols = tl.load(cols_ptr + blocks, mask=living, other=0) * BLOCK_IN + m % BLOCK_IN
    x_cols = tl.max_contiguous(tl.multiple_of(x_cols, BLOCK_IN), BLOCK_IN)
    grad_cols = tl.load(rows_ptr + group) * BLOCK_OUT + n

    share = tl.cdiv(tl.cdiv(tokens, tl.num_programs(1)), BLOCK_T) * BLOCK_T
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    whole = first + tl.maximum(last - first, 0) // BLOCK_T * BLOCK_T
    if not WHOLE:
        living &= x_cols < in_features
    x_tile = t[:, None] * x_stride + x_cols[None, :]
    grad_tile = t[:, None] * grad_stride + grad_cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=tl.float32)
    # Only the step after the loop asks which of its tokens are there.
    for step in range(first, whole, BLOCK_T):
        row = tl.cast(step, tl.int64)
        x = tl.load(x_ptr + row * x_stride + x_tile, mask=living[None, :], other=0.0)
        if WHOLE:
            grad = tl.load(grad_ptr + row * grad_stride + grad_tile)
        else:
            grad = tl.load(
                grad_ptr + row * grad_stride + grad_tile, mask=(grad_cols < out_features)[None, :], other=0.0
            )
        acc = tl.dot(tl.trans(x), grad, acc, input_precision=PRECISION)
    if whole < last:
        row = tl.cast(whole, tl.int64)
        there = (whole + t < last)[:, None]
        x = tl.load(x_ptr + row * x_stride + x_tile, mask=there & living[None, :], other=0.0)
        grad_mask = there & (grad_cols < out_features)[None, :]
        grad = tl.load(grad_ptr + row * grad_stride + grad_tile, mask=grad_mask, other=0.0)
        acc = tl.dot(tl.trans(x), grad, acc, input_precision=PRECISION)

    block_places = (tl.program_id(1).to(tl.int64) * nnz + blocks) * (BLOCK_OUT * BLOCK_IN) + m % BLOCK_IN
    places = block_places[:, None] + n[None, :] * BLOCK_IN
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=(blocks < end)[:, None])


def launches(grad: Tensor, x: Tensor, out: Tensor, plan: Plan, shape: tuple[int, int], config: Config) -> list[Launch]:
    """The launches that fill ``out [nnz, bh, bw]`` from ``grad [tokens, out]`` and ``x [tokens, in]``.

    Where few blocks leave most of a device idle, tokens are cut in shares, whose sums a second launch adds in order:
    no atomics, so the result is the same at every run.
    """
    device = device_of(x.device)
    nnz, block_out, block_in = out.shape
    groups = plan.groups(config.m // block_in)
    splits = splits_for(groups.groups, -(-x.shape[0] // config.k), device)
    target = out if splits == 1 else out.new_empty(splits, nnz * block_out, block_in, dtype=torch.float32)
    first = Launch(
        sampled_kernel,
        (groups.groups, splits),
        {
            "grad_ptr": grad,
            "x_ptr": x,
            "out_ptr": target,
            "starts_ptr": groups.starts,
            "rows_ptr": groups.rows,
            "cols_ptr": plan.walk(1, False).cols,
            "tokens": x.shape[0],
            "out_features": shape[0],
            "in_features": shape[1],
            "nnz": nnz,
            "grad_stride": grad.stride(0),
            "x_stride": x.stride(0),
            "BLOCK_OUT": block_out,
            "BLOCK_IN": block_in,
            "BLOCK_M": config.m,
            "BLOCK_T": config.k,
            "WHOLE": shape[0] % block_out == 0 and shape[1] % block_in == 0,
            "PRECISION": precision_of(x.dtype, device.capability),
        },
        config.warps,
        config.stages,
    )
    if splits == 1:
        return [first]
    return [first, combine(target, out.view(-1, block_in), None, None, None, "none")]

"""``y = act(x Wᵀ + b) + r`` on tensor cores: tokens on one of their axes, one or several block rows on the other.

A *panel* is what one program covers of the outputs: a part of a block row, a block row, or several block rows that
walk the union of their columns, so that a tile of ``x`` is loaded once for all of them. Blocks that a row of the panel
lacks are masked loads, which move no bytes.

With tokens on M a tile may be as narrow as a block of 16. With outputs on M (``turned``), 64 or more of them, wgmma
reads less of shared memory: a 64 × 16 piece of weights serves 256 tokens, where 64 tokens serve 64 outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from superblock.ops.triton.configs import Config
from superblock.ops.triton.descriptors import describe
from superblock.ops.triton.epilogue import combine, finish
from superblock.ops.triton.launch import Launch, device_of, precision_of, splits_for
from superblock.ops.triton.plans import Operand


@triton.jit
def load_index(index_ptr, place, end, missing: tl.constexpr):
    """``index[place]``, and ``missing`` from ``end`` on."""
    return tl.load(index_ptr + place, mask=place < end, other=missing)


@triton.jit(do_not_specialize=["tokens", "panels"])
def product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    z_ptr,
    starts_ptr,
    cols_ptr,
    ids_ptr,
    rows_ptr,
    order_ptr,
    x_tiles,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    WHOLE: tl.constexpr,
    TURNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One ``[BLOCK_M tokens, BLOCK_N outputs]`` tile of ``y``, or one float32 part of its sum where ``PARTIAL``.

    ``starts [panels + 1]``, ``cols [steps]`` and ``ids [steps, merged rows]`` list the block columns that each panel
    walks and the block that each of its rows has there, -1 for none; without ``ids`` step and block are one.
    ``rows [panels, merged rows]`` are the block rows of a panel, ``order`` the panels, longest first. ``x_tiles``
    describes ``x`` where its tiles are fetched that way. ``WHOLE``: the last block column is not cut by the edge.
    """
    MERGED: tl.constexpr = BLOCK_N // BLOCK_OUT if BLOCK_N > BLOCK_OUT else 1
    PARTS: tl.constexpr = BLOCK_OUT // BLOCK_N if BLOCK_N < BLOCK_OUT else 1
    GATHERED: tl.constexpr = BLOCK_K // BLOCK_IN if BLOCK_K > BLOCK_IN else 1
    CHUNKS: tl.constexpr = BLOCK_IN // BLOCK_K if BLOCK_K < BLOCK_IN else 1

    # Neighbours in launch order share tokens: a tile of x comes from memory once, then from L2.
    pid = tl.program_id(0)
    across = panels * PARTS
    panel = tl.load(order_ptr + pid % across // PARTS)
    part = pid % PARTS
    # Offsets within a tile fit 32 bits; only where a tile starts needs 64.
    first_row = (pid // across).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    last_row = tl.minimum(tokens - first_row, BLOCK_M).to(tl.int32) - 1
    begin = tl.load(starts_ptr + panel)
    end = tl.load(starts_ptr + panel + 1)
    if PARTIAL:
        length = tl.cdiv(end - begin, tl.num_programs(1))
        begin = tl.minimum(begin + tl.program_id(1) * length, end)
        end = tl.minimum(begin + length, end)

    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    lane = k // BLOCK_IN if GATHERED > 1 else 0
    # Rows beyond the last token repeat it: no mask is needed, and they are never stored.
    x_rows = x_ptr + first_row * x_stride + tl.minimum(rows, last_row)[:, None] * x_stride
    w_tile = w_ptr + ((part * BLOCK_N + n) % BLOCK_OUT)[None, :] * w_out_stride
    w_tile += (k % BLOCK_IN)[:, None] * w_in_stride

    acc = tl.zeros((BLOCK_N, BLOCK_M) if TURNED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Indices are loaded one step ahead of their use, so that no tile waits for its address.
    col = load_index(cols_ptr, begin + lane, end, 0)
    if MERGED > 1:
        ids = load_index(ids_ptr, begin * MERGED + n // BLOCK_OUT, end * MERGED, -1)
    elif ids_ptr is not None:
        ids = load_index(ids_ptr, begin + lane, end, 0)
    for step in range(begin * CHUNKS, end * CHUNKS, GATHERED):
        block = step // CHUNKS
        first = step % CHUNKS * BLOCK_K
        x_cols = col * BLOCK_IN + first + k % BLOCK_IN
        if GATHERED > 1:
            x_cols = tl.max_contiguous(tl.multiple_of(x_cols, BLOCK_IN), BLOCK_IN)
        if MERGED == 1 and ids_ptr is None:
            ids = block + lane
        w_places = ids.to(tl.int64)
        if MERGED > 1:
            w_places = w_places[None, :]
        elif GATHERED > 1:
            w_places = w_places[:, None]
        w_places = w_tile + (w_places * w_block_stride + first * w_in_stride)

        if GATHERED > 1:
            living = block + lane < end
            x = tl.load(x_rows + x_cols[None, :], mask=(living & (x_cols < in_features))[None, :], other=0.0)
            w = tl.load(w_places, mask=living[:, None], other=0.0)
        else:
            if x_tiles is not None:
                x = x_tiles.load([first_row.to(tl.int32), col * BLOCK_IN + first])
            elif WHOLE:
                x = tl.load(x_rows + x_cols[None, :])
            else:
                x = tl.load(x_rows + x_cols[None, :], mask=(x_cols < in_features)[None, :], other=0.0)
            if MERGED > 1:
                w = tl.load(w_places, mask=(ids >= 0)[None, :], other=0.0)
            else:
                w = tl.load(w_places)
        if TURNED:
            acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)

        ahead = (step + GATHERED) // CHUNKS
        col = load_index(cols_ptr, ahead + lane, end, 0)
        if MERGED > 1:
            ids = load_index(ids_ptr, ahead * MERGED + n // BLOCK_OUT, end * MERGED, -1)
        elif ids_ptr is not None:
            ids = load_index(ids_ptr, ahead + lane, end, 0)

    if TURNED:
        acc = tl.trans(acc)
    if MERGED > 1:
        cols = tl.load(rows_ptr + panel * MERGED + n // BLOCK_OUT) * BLOCK_OUT + n % BLOCK_OUT
    else:
        cols = panel * BLOCK_OUT + part * BLOCK_N + n
    stored = (rows <= last_row)[:, None] & (cols < out_features)[None, :]
    if PARTIAL:
        part_ptr = y_ptr + (tl.program_id(1).to(tl.int64) * tokens + first_row) * out_features
        tl.store(part_ptr + rows[:, None] * out_features + cols[None, :], acc, mask=stored)
    else:
        finish(
            acc, first_row, rows, cols, stored, bias_ptr, residual_ptr, y_ptr, z_ptr, out_features, residual_stride,
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
    """The launches that fill ``y [tokens, out]``, and ``z`` where it is kept, from ``x [tokens, in]``.

    Few tokens leave most of a device idle, so their sums are cut in parts, which a second launch adds in order.
    """
    device = device_of(x.device)
    merged = max(1, config.n // operand.block_out)
    walk = operand.walk(merged)
    tokens = x.shape[0]
    programs = walk.panels * max(1, operand.block_out // config.n) * -(-tokens // config.m)
    splits = splits_for(programs, walk.steps // max(1, walk.panels), device)
    whole = splits == 1
    target = y if whole else x.new_empty(splits, *y.shape, dtype=torch.float32)
    first = Launch(
        product_kernel,
        (programs, splits),
        {
            "x_ptr": x,
            "w_ptr": operand.values,
            "bias_ptr": bias if whole else None,
            "residual_ptr": residual if whole else None,
            "y_ptr": target,
            "z_ptr": z if whole else None,
            "starts_ptr": walk.starts,
            "cols_ptr": walk.cols,
            "ids_ptr": walk.ids,
            "rows_ptr": walk.rows,
            "order_ptr": walk.order,
            "x_tiles": describe(x, (config.m, config.k)) if config.described else None,
            "tokens": tokens,
            "out_features": operand.out_features,
            "in_features": operand.in_features,
            "panels": walk.panels,
            "x_stride": x.stride(0),
            "residual_stride": residual.stride(0) if whole and residual is not None else 0,
            **operand.strides,
            "BLOCK_OUT": operand.block_out,
            "BLOCK_IN": operand.block_in,
            "BLOCK_M": config.m,
            "BLOCK_N": config.n,
            "BLOCK_K": config.k,
            "PARTIAL": not whole,
            "WHOLE": operand.in_features % operand.block_in == 0,
            "TURNED": config.turned,
            "ACTIVATION": activation,
            "PRECISION": precision_of(x.dtype, device.capability),
        },
        config.warps,
        config.stages,
    )
    return [first] if whole else [first, combine(target, y, z, bias, residual, activation)]

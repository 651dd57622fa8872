"""The mask side of training, one kernel each: the threshold, the masked weight, and both gradients.

A weight of any rank is read as ``[rows, columns]``, in which a tile is ``height × width`` and edge tiles are cut.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from superblock.ops.triton.launch import Launch

WIDEST_TILE = 1024
MOST_SCORES = 16384
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN = (Tensor, torch.nn.Parameter)


@triton.jit
def threshold_kernel(scores_ptr, mask_ptr, scores, live, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """A tile lives if fewer than ``live`` others rank before it: by score, then by index, NaN first of all."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + own, mask=own < scores, other=0.0).to(tl.float32)[:, None]
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in range(0, scores, STEP):
        place = step + tl.arange(0, STEP)
        other = tl.load(scores_ptr + place, mask=place < scores, other=0.0).to(tl.float32)[None, :]
        equal = (other == score) | ((other != other) & (score != score))
        higher = (other > score) | ((other != other) & (score == score))
        first = higher | (equal & (place[None, :] < own[:, None]))
        before += tl.sum((first & (place < scores)[None, :]).to(tl.int32), 1)
    tl.store(mask_ptr + own, before < live, mask=own < scores)


@triton.jit
def _place(rows, columns, height, width, across, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Where a program stands: tiles ``first .. first + TILES`` of tile row ``row``, their columns and which are there.

    Columns are laid out ``[TILES, WIDTH]``, each tile padded to a power of two.
    """
    row = tl.program_id(0) // across
    first = tl.program_id(0) % across * TILES
    n = tl.arange(0, TILES * WIDTH)
    cols = (first + n // WIDTH) * width + n % WIDTH
    return row, first, cols, (n % WIDTH < width) & (cols < columns)


@triton.jit
def mask_kernel(
    weight_ptr,
    mask_ptr,
    out_ptr,
    rows,
    columns,
    height,
    width,
    across,
    grid_columns,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``out = weight ⊙ spread(mask)``; dead tiles are written, never read."""
    row, first, cols, there = _place(rows, columns, height, width, across, TILES, WIDTH)
    tiles = first + tl.arange(0, TILES * WIDTH) // WIDTH
    mask = tl.load(mask_ptr + row * grid_columns + tiles, mask=tiles < grid_columns, other=0).to(tl.int1)
    for step in range(0, height, ROWS):
        inner = step + tl.arange(0, ROWS)
        own = row * height + inner
        inside = ((inner < height) & (own < rows))[:, None] & there[None, :]
        places = own.to(tl.int64)[:, None] * columns + cols[None, :]
        weight = tl.load(weight_ptr + places, mask=inside & mask[None, :], other=0.0)
        tl.store(out_ptr + places, weight, mask=inside)


@triton.jit
def mask_gradient_kernel(
    grad_ptr,
    weight_ptr,
    mask_ptr,
    grad_weight_ptr,
    grad_scores_ptr,
    rows,
    columns,
    height,
    width,
    across,
    grid_columns,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``d weight = d out ⊙ spread(mask)`` and ``d scores = Σ over the tile of d out ⊙ weight``, in one pass."""
    row, first, cols, there = _place(rows, columns, height, width, across, TILES, WIDTH)
    tiles = first + tl.arange(0, TILES * WIDTH) // WIDTH
    mask = tl.load(mask_ptr + row * grid_columns + tiles, mask=tiles < grid_columns, other=0).to(tl.int1)
    sums = tl.zeros((TILES * WIDTH,), dtype=tl.float32)
    for step in range(0, height, ROWS):
        inner = step + tl.arange(0, ROWS)
        own = row * height + inner
        inside = ((inner < height) & (own < rows))[:, None] & there[None, :]
        places = own.to(tl.int64)[:, None] * columns + cols[None, :]
        grad = tl.load(grad_ptr + places, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + places, mask=inside, other=0.0)
        sums += tl.sum(grad.to(tl.float32) * weight.to(tl.float32), 0)
        if grad_weight_ptr is not None:
            tl.store(grad_weight_ptr + places, tl.where(mask[None, :], grad, 0.0), mask=inside)
    scores = tl.sum(tl.reshape(sums, (TILES, WIDTH)), 1)
    own_tiles = first + tl.arange(0, TILES)
    place = grad_scores_ptr + row * grid_columns + own_tiles
    tl.store(place, scores.to(grad_scores_ptr.dtype.element_ty), mask=own_tiles < grid_columns)


def takes(weight: Tensor, tile: tuple[int, ...]) -> bool:
    """Whether the kernels take a weight: plain, of a dtype they know, dense, cut along its first two dimensions."""
    return (
        type(weight) in PLAIN
        and weight.dtype in DTYPES
        and weight.dim() >= 2
        and weight.is_contiguous()
        and tuple(weight.shape[2:]) == tile[2:]
        and math.prod(tile[1:]) <= WIDEST_TILE
        and weight.numel() > 0
    )


def ranks(scores: Tensor) -> bool:
    """Whether the kernel thresholds these scores: every one is compared with every other, so not for too many."""
    return type(scores) in PLAIN and scores.dtype in DTYPES and 0 < scores.numel() <= MOST_SCORES


def threshold(scores: Tensor, live: int) -> Tensor:
    """The boolean mask of the ``live`` highest scores, the lower index first among equals; any shape."""
    mask = torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(scores):
        threshold_launch(scores.contiguous(), mask, live).run()
    return mask


def mask_tiles(weight: Tensor, mask: Tensor, tile: tuple[int, ...]) -> Tensor:
    """``weight`` with every tile multiplied by its entry of ``mask``; a dead tile is zero whatever it held."""
    out = torch.empty_like(weight)
    with torch.cuda.device_of(weight):
        mask_launch(weight, mask.contiguous(), out, tile).run()
    return out


def mask_gradients(grad: Tensor, weight: Tensor, mask: Tensor, tile: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``(d weight, d scores)`` of ``weight ⊙ spread(mask)``; the scores' gradient is float32, shaped as ``mask``."""
    grad_weight = torch.empty_like(weight)
    grad_scores = torch.empty(mask.shape, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        gradient_launch(grad.contiguous(), weight, mask.contiguous(), grad_weight, grad_scores, tile).run()
    return grad_weight, grad_scores


def threshold_launch(scores: Tensor, mask: Tensor, live: int) -> Launch:
    """The launch that compares every score with every other: for thousands of them, one short kernel."""
    count = scores.numel()
    block = 16 if count <= 4096 else 64
    arguments = {"scores_ptr": scores, "mask_ptr": mask, "scores": count, "live": live, "BLOCK": block, "STEP": 256}
    return Launch(threshold_kernel, (-(-count // block),), arguments, 4, 1)


def mask_launch(weight: Tensor, mask: Tensor, out: Tensor, tile: tuple[int, ...]) -> Launch:
    """The launch behind :func:`mask_tiles`."""
    grid, shared = _tiling(weight, tile)
    return Launch(mask_kernel, grid, {"weight_ptr": weight, "mask_ptr": mask, "out_ptr": out, **shared}, 4, 1)


def gradient_launch(
    grad: Tensor, weight: Tensor, mask: Tensor, grad_weight: Tensor | None, grad_scores: Tensor, tile: tuple[int, ...]
) -> Launch:
    """The launch behind :func:`mask_gradients`."""
    grid, shared = _tiling(weight, tile)
    arguments = {
        "grad_ptr": grad,
        "weight_ptr": weight,
        "mask_ptr": mask,
        "grad_weight_ptr": grad_weight,
        "grad_scores_ptr": grad_scores,
        **shared,
    }
    return Launch(mask_gradient_kernel, grid, arguments, 4, 1)


def _tiling(weight: Tensor, tile: tuple[int, ...]) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the arguments that both kernels share: several narrow tiles go to one program."""
    rows = weight.shape[0]
    columns, width = weight.numel() // rows, math.prod(tile[1:])
    padded = 1 << (width - 1).bit_length()
    tiles = max(1, 128 // padded)
    grid_columns = -(-columns // width)
    across = -(-grid_columns // tiles)
    shared = {
        "rows": rows,
        "columns": columns,
        "height": tile[0],
        "width": width,
        "across": across,
        "grid_columns": grid_columns,
        "TILES": tiles,
        "WIDTH": padded,
        "ROWS": max(1, min(1 << (tile[0] - 1).bit_length(), 4096 // (tiles * padded))),
    }
    return (-(-rows // tile[0]) * across,), shared

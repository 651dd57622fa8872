"""A convolution's kernel as a block-sparse matrix: one row an output channel, channels within kernel positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from superblock.bsr import BSRMatrix, dense_of
from superblock.errors import MatrixError

KernelShape = Sequence[int]  # out, channels a group, height, width
Pair = tuple[int, int]
Sides = int | Pair  # As the caller may say it.
Geometry = tuple[KernelShape, Pair, Pair, Pair, int]  # Kernel, stride, padding, dilation, groups.
MOST = 2**31 - 1  # Of any size: no sum or product of two of them leaves 64 bits.


def matrix_of(kernel: Tensor, blocksize: int | tuple[int, int]) -> BSRMatrix:
    """``[out, c, kh, kw]`` as the matrix ``[out, kh · kw · c']``, ``c'`` as :func:`row_length` has it.

    A block holds one kernel position, so that its input is a run of channels of one pixel in channels-last order.
    """
    if kernel.dim() != 4:
        raise MatrixError(f"expected a kernel [out, c, kh, kw], got shape {tuple(kernel.shape)}")
    out, channels, height, width = kernel.shape
    length = row_length((out, channels, height, width), blocksize if isinstance(blocksize, int) else blocksize[1])
    positions = F.pad(kernel.detach().permute(0, 2, 3, 1), (0, length // (height * width) - channels))
    return BSRMatrix.from_dense(positions.reshape(out, length), blocksize)


def check_kernel_shape(shape: KernelShape) -> None:
    """Raise :class:`MatrixError` unless there are four sizes of at least 1."""
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape) or min(shape) < 1:
        raise MatrixError(f"kernel_shape must be (out, channels / groups, height, width), all at least 1, got {shape}")


def row_length(shape: KernelShape, block_width: int) -> int:
    """``kh · kw · c'``: ``c'`` is ``c`` rounded up to whole blocks, so that no block spans two kernel positions."""
    try:
        _, channels, height, width = shape
    except ValueError:
        check_kernel_shape(shape)
        raise
    positions = height * width
    return channels if positions == 1 else positions * math.ceil(channels / block_width) * block_width


def dense_kernel(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: KernelShape) -> Tensor:
    """The ``[out, c, kh, kw]`` kernel of BSR tensors that :func:`matrix_of` made: differentiable in ``values``."""
    out, channels, height, width = shape
    rows = dense_of(values, crow_indices, col_indices, (out, row_length(shape, values.shape[2])))
    return rows.reshape(out, height, width, -1)[..., :channels].permute(0, 3, 1, 2)


def pair_of(name: str, sizes: int | Sequence[int]) -> Pair:
    """A stride, padding or dilation as torch takes it: one number for height and width, or one for each.

    Raises:
        MatrixError: it is neither.
    """
    try:
        height, width = sizes  # type: ignore[misc]  # The most common first: a call of its own takes 0.1 µs.
    except (TypeError, ValueError):
        if isinstance(sizes, int):
            return sizes, sizes
        raise MatrixError(f"{name} must be a number, or two for height and width, got {sizes!r}") from None
    return height, width


def check_sides(name: str, sides: Sequence[int], least: int) -> None:
    """Raise :class:`MatrixError` unless there are two numbers that a convolution can have."""
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides) or min(sides) < least:
        raise MatrixError(f"{name} must be two numbers of at least {least}, got {tuple(sides)}")
    if max(sides) > MOST:
        raise MatrixError(f"{name} must be two numbers of at most {MOST}, got {tuple(sides)}")


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """The height and width of a convolution's result.

    Raises:
        MatrixError: there is no such convolution.
    """
    for name, sides, least in (
        ("kernel", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        check_sides(name, sides, least)
    height, width = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return height, width


def channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialized ``[n, c, h, w]`` whose pixels lie one after another.

    It is no view: an op's result could not be changed in place.
    """
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)

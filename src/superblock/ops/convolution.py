"""A convolution's kernel as a block-sparse matrix: one row an output channel, channels within kernel positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from superblock.bsr import BSRMatrix
from superblock.errors import MatrixError


def matrix_of(kernel: Tensor, blocksize: int | tuple[int, int]) -> BSRMatrix:
    """``[out, c, kh, kw]`` as the matrix ``[out, kh · kw · c']``, ``c'`` being ``c`` rounded up to whole blocks.

    A block holds one kernel position, so that its input is a run of channels of one pixel in channels-last order.
    """
    if kernel.dim() != 4:
        raise MatrixError(f"expected a kernel [out, c, kh, kw], got shape {tuple(kernel.shape)}")
    width = blocksize if isinstance(blocksize, int) else blocksize[1]
    positions = kernel.detach().permute(0, 2, 3, 1)
    padded = F.pad(positions, (0, math.ceil(kernel.shape[1] / width) * width - kernel.shape[1]))
    return BSRMatrix.from_dense(padded.reshape(len(kernel), -1), blocksize)


def kernel_of(matrix: BSRMatrix, shape: tuple[int, int, int, int] | torch.Size) -> Tensor:
    """The ``[out, c, kh, kw]`` kernel of ``shape`` that :func:`matrix_of` stored."""
    out, channels, height, width = shape
    return matrix.to_dense().view(out, height, width, -1)[..., :channels].permute(0, 3, 1, 2)

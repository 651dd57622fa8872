"""The specification of every product, in plain torch: any device, any floating dtype.

Each function builds the dense weight, so none is fast; every other backend must agree with these.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from superblock.bsr import block_grid, dense_of, row_indices
from superblock.ops.convolution import KernelShape, Pair, channels_last, dense_kernel, row_length


def activate(z: Tensor, activation: str) -> Tensor:
    """``none``, ``relu``, ``gelu`` (exact), ``gelu_tanh`` or ``silu``, element by element."""
    if activation == "none":
        return z
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return getattr(F, activation)(z)


def linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> Tensor:
    """``y = act(x Wᵀ + b) + residual``: ``x [..., in]`` → ``[..., out]``."""
    weight = dense_of(values, crow_indices, col_indices, (out_features, in_features))
    y = activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def linear_with_preactivation(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``(act(z), z)`` with ``z = x Wᵀ + b``: what training needs of an activated product."""
    z = linear(x, values, crow_indices, col_indices, bias, None, out_features, in_features, "none")
    return activate(z, activation), z


def grad_input(
    grad: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, out_features: int, in_features: int
) -> Tensor:
    """``dx = dy W``: ``dy [..., out]`` → ``[..., in]``."""
    return grad @ dense_of(values, crow_indices, col_indices, (out_features, in_features))


def grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    block_height: int,
    block_width: int,
) -> Tensor:
    """``dW = dyᵀ x`` at the stored blocks: ``[nnz, bh, bw]``, zero beyond the matrix's edge."""
    full = grad.reshape(-1, out_features).mT @ x.reshape(-1, in_features)
    return stored_blocks(full, crow_indices, col_indices, block_height, block_width)


def stored_blocks(
    full: Tensor, crow_indices: Tensor, col_indices: Tensor, block_height: int, block_width: int
) -> Tensor:
    """The blocks of a dense matrix at the stored places: ``[nnz, bh, bw]``, zero beyond the matrix's edge."""
    out_features, in_features = full.shape
    rows, cols = block_grid((out_features, in_features), (block_height, block_width))
    padded = F.pad(full, (0, cols * block_width - in_features, 0, rows * block_height - out_features))
    blocks = padded.view(rows, block_height, cols, block_width).transpose(1, 2)
    return blocks[row_indices(crow_indices, col_indices.numel()), col_indices.long()].contiguous()


def conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_shape: KernelShape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
) -> Tensor:
    """``y = act(conv(x, W) + b + residual)``, in channels-last order."""
    kernel = dense_kernel(values, crow_indices, col_indices, kernel_shape)
    z = F.conv2d(x, kernel, bias, stride, padding, dilation, groups)
    y = channels_last((len(z), kernel_shape[0], *z.shape[2:]), z)
    return y.copy_(activate(z if residual is None else z + residual, activation))


def conv2d_grad_input(
    grad: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    kernel_shape: KernelShape,
    size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """``dx`` of images of ``size``, in channels-last order."""
    kernel = dense_kernel(values, crow_indices, col_indices, kernel_shape)
    dx = channels_last((len(grad), kernel_shape[1] * groups, *size), grad)
    return dx.copy_(conv2d_input(dx.shape, kernel, grad, stride, padding, dilation, groups))


def conv2d_grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    kernel_shape: KernelShape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    block_height: int,
    block_width: int,
) -> Tensor:
    """``dW`` at the stored blocks: ``[nnz, bh, bw]``, zero beyond the kernel's edges."""
    out, channels, *_ = kernel_shape
    dkernel = conv2d_weight(x, kernel_shape, grad, stride, padding, dilation, groups)
    length = row_length(kernel_shape, block_width)
    spare = length // math.prod(kernel_shape[2:]) - channels
    rows = F.pad(dkernel.permute(0, 2, 3, 1), (0, spare)).reshape(out, length)
    return stored_blocks(rows, crow_indices, col_indices, block_height, block_width)


def unsupported(dtype: torch.dtype, block_height: int, block_width: int) -> str | None:
    """Why this backend cannot take a case: it takes them all."""
    return None

"""Gradients of the CPU backend's convolutions: a convolution of ``dy``, and products sampled at the living blocks."""

from __future__ import annotations

import math
from ctypes import byref
from typing import Any

from torch import Tensor, get_num_threads

from superblock.errors import MatrixError
from superblock.ops import native, reference
from superblock.ops.arguments import check, indices_for, rows_of, weight_of
from superblock.ops.convolution import KernelShape, Pair, channels_last, output_size, row_length
from superblock.ops.cpu_conv2d import images_of, window_of
from superblock.ops.prepared import prepare


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
    """``dx`` of images of ``size``: ``dy`` convolved with the turned kernel, over the same values.

    Strided convolutions and those of several groups go through the dense kernel.
    """
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    if geometry[0] != (1, 1) or groups != 1:
        return reference.conv2d_grad_input(
            grad, values, crow_indices, col_indices, kernel_shape, size, stride, padding, dilation, groups
        )
    out_channels, channels, *kernel = kernel_shape
    _check_grad(grad, values.dtype, out_channels, output_size(size, kernel, *geometry))
    shape = out_channels, row_length(kernel_shape, values.shape[2])
    prepared = prepare(values, crow_indices, col_indices, None, shape, "none")
    grad, dx = images_of(grad), channels_last(len(grad), size, channels, grad)
    places = math.prod(kernel)
    turned = [dilation[i] * (kernel[i] - 1) - padding[i] for i in range(2)]
    product = native.Product(dtype=prepared.product.dtype, threads=get_num_threads())
    product.weight = prepared.transposed_weight(places, channels)
    product.window = window_of(grad, kernel, (1, 1), turned, dilation, size, out_channels)
    product.x, product.y, product.y_stride = grad.data_ptr(), dx.data_ptr(), channels
    product.tokens = len(grad) * math.prod(size)
    check(native.library().sb_run_product(byref(product)))
    return dx


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
    """``dW = dyᵀ x`` at the stored blocks, feature-major, of windows that are gathered tile by tile.

    Convolutions of several groups go through the dense kernel.
    """
    if groups != 1:
        return reference.conv2d_grad_values(
            grad,
            x,
            crow_indices,
            col_indices,
            kernel_shape,
            stride,
            padding,
            dilation,
            groups,
            block_height,
            block_width,
        )
    out_channels, channels, *kernel = kernel_shape
    if x.dim() != 4 or x.shape[1] != channels or not x.is_cpu:
        raise MatrixError(f"x must be [n, {channels}, h, w] on cpu, got {tuple(x.shape)} on {x.device}")
    out_size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    _check_grad(grad, x.dtype, out_channels, out_size)
    if len(grad) != len(x):
        raise MatrixError(f"grad and x must have the same images, got {len(grad)} and {len(x)}")
    values = grad.new_empty(col_indices.shape[0], block_width, block_height).transpose(1, 2)
    in_features = row_length(kernel_shape, block_width)
    indices = indices_for(values, crow_indices, col_indices, out_channels, in_features)
    x, rows = images_of(x), rows_of(grad.movedim(1, -1), out_channels, grad.dtype)
    sampled = native.Sampled(
        weight_of(values, indices, out_channels, in_features),
        window_of(x, kernel, stride, padding, dilation, out_size, channels),
        rows.data_ptr(), x.data_ptr(), len(rows), rows.stride(0), 0,
        native.DTYPES[x.dtype], native.ACTIVATIONS["none"], get_num_threads(),
    )  # fmt: skip
    check(native.library().sb_run_sampled(byref(sampled)))
    return values


def _check_grad(grad: Tensor, dtype: Any, out_channels: int, out_size: tuple[int, int]) -> None:
    expected = out_channels, *out_size
    if grad.dim() != 4 or grad.shape[1:] != expected or grad.dtype != dtype or not grad.is_cpu:
        raise MatrixError(
            f"grad must be [n, {', '.join(map(str, expected))}] of {dtype} on cpu, "
            f"got {tuple(grad.shape)} of {grad.dtype} on {grad.device}"
        )

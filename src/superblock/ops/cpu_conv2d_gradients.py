"""Gradients of the CPU backend's convolutions: a convolution of ``dy``, and products sampled at the living blocks."""

from __future__ import annotations

import itertools
import math
from ctypes import byref
from typing import Any

from torch import Tensor, get_num_threads

from superblock.errors import MatrixError
from superblock.ops import native, reference
from superblock.ops.arguments import check, check_data, indices_for, rows_of, weight_of
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

    With a stride, every pixel between two of its steps sees places of its own. Convolutions of several groups, and
    those with both a stride and a dilation, go through the dense kernel.
    """
    out_channels, channels, *kernel = kernel_shape
    _check_grad(grad, values.dtype, out_channels, output_size(size, kernel, stride, padding, dilation))
    if groups != 1 or any(step > 1 and spread > 1 for step, spread in zip(stride, dilation, strict=True)):
        return reference.conv2d_grad_input(
            grad, values, crow_indices, col_indices, kernel_shape, size, stride, padding, dilation, groups
        )
    shape = out_channels, row_length(kernel_shape, values.shape[2])
    prepared = prepare(values, crow_indices, col_indices, None, shape, "none")
    grad, dx = images_of(grad), channels_last((len(grad), channels, *size), grad)
    firsts = [_firsts(*each) for each in zip(kernel, stride, padding, size, strict=True)]
    if any(len(seen) < min(sides) for seen, *sides in zip(firsts, stride, size, strict=True)):
        dx.zero_()
    for down, right in itertools.product(*firsts) if dx.numel() else ():
        part = dx[:, :, down :: stride[0], right :: stride[1]]
        (rows, top), (columns, left) = (
            _places(*each) for each in zip((down, right), kernel, stride, padding, dilation, strict=True)
        )
        sizes, turn = (len(rows), len(columns)), [-1] * math.prod(kernel)
        for (i, row), (j, column) in itertools.product(enumerate(reversed(rows)), enumerate(reversed(columns))):
            turn[row * kernel[1] + column] = i * sizes[1] + j
        y = part if part.shape == dx.shape else channels_last(part.shape, grad)
        product = native.Product(dtype=prepared.product.dtype, threads=get_num_threads())
        product.weight = prepared.transposed_weight(channels, tuple(turn))
        product.window = window_of(grad, sizes, (1, 1), (top, left), dilation, y.shape[2:], out_channels)
        product.x, product.y, product.y_stride = grad.data_ptr(), y.data_ptr(), channels
        product.tokens = len(grad) * math.prod(y.shape[2:])
        check(native.library().sb_run_product(byref(product)))
        if y is not part:
            part.copy_(y)
    return dx


def _firsts(kernel: int, stride: int, padding: int, size: int) -> list[int]:
    """Along one axis: the first of every run of pixels, a stride apart, that any place of the kernel sees."""
    firsts = ((place - padding) % stride for place in range(min(kernel, stride)))
    return [first for first in firsts if first < size]


def _places(first: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[range, int]:
    """Along one axis: the places that see pixels ``first``, ``first + stride`` and so on, and the padding of ``dy``."""
    places = range((first + padding) % stride, kernel, stride)
    reach = (len(places) - 1) * dilation
    return places, reach - (first + padding) // stride


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
    out_channels, channels, *kernel = kernel_shape
    if x.dim() != 4 or x.shape[1] != channels * groups or not x.is_cpu:
        raise MatrixError(f"x must be [n, {channels * groups}, h, w] on cpu, got {tuple(x.shape)} on {x.device}")
    out_size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    _check_grad(grad, x.dtype, out_channels, out_size)
    check_data(x)
    if len(grad) != len(x):
        raise MatrixError(f"grad and x must have the same images, got {len(grad)} and {len(x)}")
    if groups != 1:
        sizes = block_height, block_width
        return reference.conv2d_grad_values(
            grad, x, crow_indices, col_indices, kernel_shape, stride, padding, dilation, groups, *sizes
        )
    values = grad.new_empty(col_indices.numel(), block_width, block_height).transpose(1, 2)
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
    check_data(grad)

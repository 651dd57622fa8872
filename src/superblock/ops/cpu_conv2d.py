"""The CPU backend's convolutions: products of windows, which the native core gathers while it packs them."""

from __future__ import annotations

import ctypes
import math

from torch import Tensor

from superblock.errors import MatrixError
from superblock.ops import native
from superblock.ops.arguments import check
from superblock.ops.convolution import KernelShape, channels_last, output_size, row_length
from superblock.ops.prepared import prepare, product_of


def conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_shape: KernelShape,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """``y = act(conv(x, W) + b + residual)`` over channels-last images, with no copy of their windows in memory.

    The arguments are those of :func:`superblock.ops.conv2d.bsr_conv2d`.
    """
    out_channels, channels, *kernel = kernel_shape
    if x.dim() != 4 or x.shape[1] != channels * groups:
        raise MatrixError(f"x must be [n, {channels * groups}, h, w], got {tuple(x.shape)}")
    if x.dtype != values.dtype or x.device.type != "cpu":
        raise MatrixError(f"x must be of {values.dtype} on cpu, got {x.dtype} on {x.device}")
    if groups > 1 and (out_channels // groups) % values.shape[1]:
        raise MatrixError(
            f"{out_channels} output channels in {groups} groups must divide into blocks of {values.shape[1]}"
        )
    images = x.movedim(1, -1)
    images = images if images.stride(-1) == 1 else images.contiguous()
    count, *size, _ = images.shape
    out_size = output_size(size, kernel, stride, padding, dilation)
    if min(out_size) < 1:
        raise MatrixError(f"the window of {kernel[0]} × {kernel[1]} does not fit into images of {size[0]} × {size[1]}")
    y = channels_last(count, out_size, out_channels, x)
    if residual is not None:
        residual = residual.movedim(1, -1)
    in_features = row_length(kernel_shape, values.shape[2])
    prepared = prepare(values, crow_indices, col_indices, bias, (out_channels, in_features), activation)
    product = product_of(prepared, count * math.prod(out_size), residual)
    product.residual_first = True
    product.window = native.Window(
        *kernel, *stride, *padding, *dilation, *size, *out_size, *images.stride()[:3], channels
    )
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0) and _is_rows(images):
        product.window.kernel_h = 0  # Every pixel in turn: the plain product of its channels.
        product.x_stride = images.stride(2)
    product.x, product.y, product.y_stride = images.data_ptr(), y.data_ptr(), out_channels
    for group in range(groups):
        part = _group(product, group, groups, y.element_size()) if groups > 1 else product
        check(native.library().sb_run_product(ctypes.byref(part)))
    return y


def _is_rows(images: Tensor) -> bool:
    """Whether the pixels of ``[n, h, w, c]`` lie at one distance."""
    _, height, width, _ = images.shape
    by_image, by_row, by_pixel, _ = images.stride()
    return by_row == width * by_pixel and by_image == height * by_row


def _group(whole: ctypes.Structure, group: int, groups: int, size: int) -> ctypes.Structure:
    """One group's share of a convolution: its own block rows and channels, over the same memory."""
    part = native.Product.from_buffer_copy(whole)
    outputs = whole.weight.out_features // groups
    part.weight.out_features = outputs
    part.weight.crow += 4 * group * (outputs // whole.weight.block_out)
    part.x += group * whole.window.channels * size
    for name in ("y", "bias", "residual"):
        if getattr(part, name):
            setattr(part, name, getattr(part, name) + group * outputs * size)
    return part

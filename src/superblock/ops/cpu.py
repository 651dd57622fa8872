"""The CPU backend: the products of :mod:`superblock.ops.reference`, multiplied by the native core.

Weights laid out by :func:`superblock.ops.layout.feature_major` are multiplied where they lie. Those of any other layout
are turned a panel at a time while they are multiplied; nothing is kept, so nothing can be stale.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from superblock.errors import MatrixError
from superblock.ops import native
from superblock.ops.arguments import (
    check,
    check_residual,
    indices_for,
    product_of,
    rows_of,
    transposed_weight,
    weight_of,
)
from superblock.ops.convolution import KernelShape, channels_last, output_size, row_length

Weight = tuple[Tensor, Tensor, Tensor, Tensor | None, int, int]

MULTIPLE = 8


def unsupported(dtype: torch.dtype, block_height: int, block_width: int) -> str | None:
    """Why a case goes to the reference: said by ``superblock info``."""
    if dtype not in native.DTYPES:
        return f"the native core multiplies float32, bfloat16 and float16, not {dtype}"
    if block_height % MULTIPLE or block_width % MULTIPLE or not block_height or not block_width:
        return f"the native core takes block sides that are multiples of {MULTIPLE}, not {block_height} × {block_width}"
    reason = native.missing()
    if reason is None:
        native.library()  # Raises when it lacks what SUPERBLOCK_CPU_ISA asks for: nothing falls back silently.
    return reason


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
    """``y = act(x Wᵀ + b) + residual``."""
    product = product_of(values, crow_indices, col_indices, bias, residual, out_features, in_features, activation)
    return _run(product, x, values.dtype, in_features, out_features)


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
    """``(act(z), z)`` with ``z = x Wᵀ + b``, in one pass."""
    product = product_of(values, crow_indices, col_indices, bias, None, out_features, in_features, activation)
    z = x.new_empty(*x.shape[:-1], out_features)
    product.preactivation = z.data_ptr()
    return _run(product, x, values.dtype, in_features, out_features), z


def grad_input(
    grad: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, out_features: int, in_features: int
) -> Tensor:
    """``dx = dy W``: the forward product through the transposed index, over the same values."""
    product = product_of(values, crow_indices, col_indices, None, None, out_features, in_features, "none")
    product.weight = transposed_weight(product.alive[0], product.alive[1], out_features, in_features)
    return _run(product, grad, values.dtype, out_features, in_features)


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
    """``dW = dyᵀ x`` at the stored blocks, feature-major."""
    values = grad.new_empty(col_indices.shape[0], block_width, block_height).transpose(1, 2)
    indices = indices_for(values, crow_indices, col_indices, out_features, in_features)
    grad, x = rows_of(grad, out_features, grad.dtype), rows_of(x, in_features, grad.dtype)
    if len(grad) != len(x):
        raise MatrixError(f"grad and x must have the same tokens, got {len(grad)} and {len(x)}")
    sampled = native.Sampled(
        weight_of(values, indices, out_features, in_features), grad.data_ptr(), x.data_ptr(),
        len(x), grad.stride(0), x.stride(0), native.DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    check(native.library().sb_run_sampled(ctypes.byref(sampled)))
    return values


def activation_gradient(grad: Tensor, z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``dz = dy · act'(z)`` and ``db``, its sum over the tokens, in one pass."""
    features = z.shape[-1]
    grads, rows = rows_of(grad, features, z.dtype), z.contiguous().view(-1, features)
    if len(grads) != len(rows):
        raise MatrixError(f"grad and z must have the same tokens, got {len(grads)} and {len(rows)}")
    dz, dbias = torch.empty_like(rows), z.new_empty(features)
    gradient = native.Gradient(
        grads.data_ptr(), rows.data_ptr(), dz.data_ptr(), dbias.data_ptr(), len(rows), features, grads.stride(0),
        native.DTYPES[z.dtype], native.ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    check(native.library().sb_run_activation_gradient(ctypes.byref(gradient)))
    return dz.view(z.shape), dbias


def _run(
    product: ctypes.Structure,
    x: Tensor,
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
) -> Tensor:
    rows = rows_of(x, in_features, dtype)
    tokens = rows.shape[0]
    check_residual(product, tokens)
    y = x.new_empty((*x.shape[:-1], out_features))
    product.x, product.x_stride, product.tokens = rows.data_ptr(), rows.stride(0), tokens
    product.y, product.y_stride = y.data_ptr(), out_features
    check(native.library().sb_run_product(ctypes.byref(product)))
    return y


# Below this many tokens a thread, sharing out block rows beats sharing out tokens: two products, hidden in memory.
FUSED_TOKENS = 24


def feed_forward(
    x: Tensor,
    first: Weight,
    activation: str,
    second: Weight,
    residual: Tensor | None = None,
) -> Tensor:
    """``y = act(x W₁ᵀ + b₁) W₂ᵀ + b₂ + residual``: the hidden activations of a tile of tokens stay in the cache.

    A weight is ``(values, crow_indices, col_indices, bias, out_features, in_features)``.
    """
    *_, hidden, in_features = first
    *_, out_features, second_in = second
    if hidden != second_in or first[0].dtype != second[0].dtype:
        raise MatrixError(
            f"the second weight must take the first's {hidden} outputs in {first[0].dtype}, "
            f"got {second_in} in {second[0].dtype}"
        )
    dtype = first[0].dtype
    rows = rows_of(x, in_features, dtype)
    if len(rows) < FUSED_TOKENS * torch.get_num_threads():
        return linear(linear(x, *first[:4], None, *first[4:], activation), *second[:4], residual, *second[4:], "none")
    inner = product_of(*first[:4], None, *first[4:], activation)
    outer = product_of(*second[:4], residual, *second[4:], "none")
    check_residual(outer, len(rows))
    y = x.new_empty(*x.shape[:-1], out_features)
    inner.x, inner.x_stride, inner.tokens = rows.data_ptr(), rows.stride(0), len(rows)
    outer.y, outer.y_stride, outer.tokens = y.data_ptr(), out_features, len(rows)
    check(native.library().sb_run_feed_forward(ctypes.byref(native.FeedForward(inner, outer))))
    return y


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
    product = product_of(values, crow_indices, col_indices, bias, residual, out_channels, in_features, activation)
    product.residual_first = True
    product.window = native.Window(
        *kernel, *stride, *padding, *dilation, *size, *out_size, *images.stride()[:3], channels
    )
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0) and _is_rows(images):
        product.window.kernel_h = 0  # Every pixel in turn: the plain product of its channels.
        product.x_stride = images.stride(2)
    product.x, product.y, product.y_stride = images.data_ptr(), y.data_ptr(), out_channels
    product.tokens = count * math.prod(out_size)
    check_residual(product, product.tokens)
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

"""``torch.ops.superblock.bsr_conv2d``: a convolution over a block-sparse kernel, its checks, shape and gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from superblock.errors import MatrixError
from superblock.ops import conv2d_gradients, direct, library, reference  # noqa: F401  The gradients are ops.
from superblock.ops.backends import select
from superblock.ops.checks import check_activation, check_dense
from superblock.ops.convolution import KernelShape, Pair, Sides, channels_last, check_kernel_shape, output_size, pair_of

_ops = torch.ops.superblock

library._lib.define(
    "bsr_conv2d(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, Tensor? residual, "
    "int[] kernel_shape, int[2] stride, int[2] padding, int[2] dilation, int groups, str activation) -> Tensor"
)


def bsr_conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_shape: KernelShape,
    stride: Sides = 1,
    padding: Sides = 0,
    dilation: Sides = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """``y = act(conv(x, W) + b + residual)``: the residual comes before the activation, as in residual networks.

    Args:
        x: ``[n, c, h, w]``, best in ``torch.channels_last``, which is also the memory format of the result.
        values: with the indices, the matrix that :func:`superblock.ops.convolution.matrix_of` makes of the kernel.
        kernel_shape: ``(out, c / groups, kernel height, kernel width)``.
        stride, padding, dilation: one number for height and width, or one for each.

    Raises:
        MatrixError: shapes, dtypes or devices do not fit.
        ConfigError: an unknown activation.
    """
    given = (kernel_shape, stride, padding, dilation, groups)
    directly = direct.conv2d(x, (values, crow_indices, col_indices, bias), residual, given, activation)
    if directly is not None:
        return directly
    stride, padding, dilation = pair_of("stride", stride), pair_of("padding", padding), pair_of("dilation", dilation)
    geometry = (kernel_shape, stride, padding, dilation, groups)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values = x.to(dtype), values.to(dtype)
        bias, residual = (None if tensor is None else tensor.to(dtype) for tensor in (bias, residual))
    _check(x, values, bias, residual, kernel_shape, stride, padding, dilation, groups, activation)
    graded = library.graded(x, values, bias, residual)
    if math.prod(kernel_shape[2:]) * groups == 1 and (graded or device != "cpu"):
        out, channels, *_ = kernel_shape
        weight = (values, crow_indices, col_indices, bias, (out, channels))
        return _pointwise(x, weight, residual, stride, padding, activation)
    tensors = (x, values, crow_indices, col_indices, bias, residual)
    if graded and activation != "none":  # So that the backward finds what was activated, instead of computing it again.
        return reference.activate(_ops.bsr_conv2d(*tensors, *geometry, "none"), activation)
    y: Tensor = _ops.bsr_conv2d(*tensors, *geometry, activation)
    return y


def _pointwise(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, int]],
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    activation: str,
) -> Tensor:
    """A 1×1 kernel as the linear product of channels: it has gradients, and kernels on every device."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    rows = x[..., :: stride[0], :: stride[1]].movedim(1, -1)
    if residual is None:
        return library.product(rows, *weight, activation).movedim(-1, 1)
    z = library.product(rows, *weight, "none", residual.movedim(1, -1)).movedim(-1, 1)
    return reference.activate(z, activation)


def _check(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_shape: KernelShape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
) -> None:
    check_kernel_shape(kernel_shape)
    out, channels, *kernel = kernel_shape
    check_activation(activation)
    check_dense("x", x)
    if x.dim() != 4 or x.shape[1] != channels * groups:
        raise MatrixError(f"x must be [n, {channels * groups}, h, w], got {tuple(x.shape)}")
    size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    if min(size) < 1:
        raise MatrixError(
            f"the window of {kernel[0]} × {kernel[1]} does not fit into images of {x.shape[2]} × {x.shape[3]}"
        )
    if bias is not None and bias.shape != (out,):
        raise MatrixError(f"bias must be [{out}], one for each output channel, got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (x.shape[0], out, *size):
        raise MatrixError(
            f"residual must be {(x.shape[0], out, *size)}, the shape of the convolution, got {tuple(residual.shape)}"
        )
    library.check_alike(x, values=values, bias=bias, residual=residual)


def _compute(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    backend = select(x.device.type, x.dtype, values.shape[1], values.shape[2])
    # A convolution over several positions has a kernel on the CPU alone.
    y: Tensor = getattr(backend, "conv2d", reference.conv2d)(x, values, *rest)
    return y


def _fake(x: Tensor, *rest: Any) -> Tensor:
    kernel_shape, stride, padding, dilation = rest[-6:-2]
    size = output_size(x.shape[2:], kernel_shape[2:], stride, padding, dilation)
    return channels_last((x.shape[0], kernel_shape[0], *size), x)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel_shape, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.activation = inputs
    ctx.save_for_backward(*tensors[:5], None if ctx.activation == "none" else tensors[5])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, crow, col, bias, residual = ctx.saved_tensors
    geometry = (ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
    weight = values, crow, col
    if ctx.activation != "none":  # Only by calling the op itself.
        z = _ops.bsr_conv2d(x, *weight, bias, residual, ctx.kernel_shape, *geometry, "none")
        grad = library._activation_gradient(grad, z, ctx.activation)
    need_x, need_values, _, _, need_bias, need_residual = ctx.needs_input_grad[:6]
    dx = dvalues = None
    if need_x:
        dx = _ops.bsr_conv2d_grad_input(grad, *weight, ctx.kernel_shape, x.shape[2:], *geometry)
    if need_values:
        dvalues = _ops.bsr_conv2d_grad_values(grad, x, crow, col, ctx.kernel_shape, *geometry, *values.shape[1:])
    dbias = grad.movedim(1, -1).reshape(-1, grad.shape[1]).sum(0) if need_bias else None
    return dx, dvalues, None, None, dbias, grad if need_residual else None, *(None,) * 6


library.register("bsr_conv2d", _compute, _fake, _context, _backward)

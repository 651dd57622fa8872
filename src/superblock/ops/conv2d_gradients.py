"""``torch.ops.superblock.bsr_conv2d_grad_input`` and ``bsr_conv2d_grad_values``: what a convolution's backward calls.

With the convolution itself each is the gradient of the others, so that every order of derivative exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from superblock.ops import library, reference
from superblock.ops.backends import select
from superblock.ops.convolution import channels_last

_ops = torch.ops.superblock
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"

library._lib.define(
    "bsr_conv2d_grad_input(Tensor grad, Tensor values, Tensor crow_indices, Tensor col_indices, int[] kernel_shape, "
    f"SymInt[2] size, {_GEOMETRY}) -> Tensor"
)
library._lib.define(
    "bsr_conv2d_grad_values(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, int[] kernel_shape, "
    f"{_GEOMETRY}, int block_height, int block_width) -> Tensor"
)


def _grad_input(grad: Tensor, values: Tensor, *rest: Any) -> Tensor:
    crow, col, kernel_shape, size, stride, padding, *others = rest
    # No step leads further than past the image; torch takes its time over one that does.
    stride = [min(step, side + 2 * pad) for step, side, pad in zip(stride, size, padding, strict=True)]
    backend = select(grad.device.type, grad.dtype, values.shape[1], values.shape[2])
    compute: Any = getattr(backend, "conv2d_grad_input", reference.conv2d_grad_input)
    dx: Tensor = compute(grad, values, crow, col, kernel_shape, size, stride, padding, *others)
    return dx


def _grad_values(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    backend = select(grad.device.type, grad.dtype, *rest[-2:])
    gradient: Tensor = getattr(backend, "conv2d_grad_values", reference.conv2d_grad_values)(grad, x, *rest)
    return library.as_values_lie(gradient)


def _grad_input_fake(grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, *rest: Any) -> Tensor:
    kernel_shape, size, *_, groups = rest
    return channels_last((grad.shape[0], kernel_shape[1] * groups, *size), grad)


def _grad_values_fake(grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, *rest: Any) -> Tensor:
    return library.as_values_lie(grad.new_empty(col.shape[0], *rest[-2:]))


def _grad_input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel_shape, _size, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _grad_input_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grad, values, *indices = ctx.saved_tensors
    geometry = (ctx.kernel_shape, ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
    need_grad, need_values = ctx.needs_input_grad[:2]
    dgrad = dvalues = None
    if need_grad:
        dgrad = _ops.bsr_conv2d(upstream, values, *indices, None, None, *geometry, "none")
    if need_values:
        dvalues = _ops.bsr_conv2d_grad_values(grad, upstream, *indices, *geometry, *values.shape[1:])
    return dgrad, dvalues, *(None,) * 8


def _grad_values_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel_shape, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, _height, _width = inputs
    ctx.save_for_backward(*tensors)


def _grad_values_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, *indices = ctx.saved_tensors
    geometry = (ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
    need_grad, need_x = ctx.needs_input_grad[:2]
    dgrad = dx = None
    if need_grad:
        dgrad = _ops.bsr_conv2d(x, upstream, *indices, None, None, ctx.kernel_shape, *geometry, "none")
    if need_x:
        dx = _ops.bsr_conv2d_grad_input(grad, upstream, *indices, ctx.kernel_shape, x.shape[2:], *geometry)
    return dgrad, dx, *(None,) * 9


library.register("bsr_conv2d_grad_input", _grad_input, _grad_input_fake, _grad_input_context, _grad_input_backward)
library.register("bsr_conv2d_grad_values", _grad_values, _grad_values_fake, _grad_values_context, _grad_values_backward)

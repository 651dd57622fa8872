"""The feed-forward with gradients: all that it keeps of the hidden size is the preactivation ``z`` that is read.

Forward writes ``z`` and ``y``; backward reads ``z`` twice and writes ``dz``: the hidden activations are taken of ``z``
again where ``dvalues₂`` needs them, and the gradient after the activation stays in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from superblock.ops import backends, library, reference
from superblock.ops.reference import activate

_WEIGHT = library.NUMBERED_WEIGHT
_ops = torch.ops.superblock
_lib = library._lib
_SIZES = "int in_features, int hidden_features, int out_features, str activation"
_BARE = "Tensor values{0}, Tensor crow_indices{0}, Tensor col_indices{0}"
_lib.define(
    f"feed_forward_with_preactivation(Tensor x, {_WEIGHT.format(1)}, {_WEIGHT.format(2)}, Tensor? residual, {_SIZES}) "
    "-> (Tensor, Tensor)"
)
_lib.define(
    f"feed_forward_gradient(Tensor grad, Tensor z, {_BARE.format(1)}, {_BARE.format(2)}, {_SIZES}) "
    "-> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "bsr_grad_values_activated(Tensor grad, Tensor z, Tensor crow_indices, Tensor col_indices, "
    "int out_features, int in_features, int block_height, int block_width, str activation) -> Tensor"
)
_lib.define("bias_gradient(Tensor grad) -> Tensor")
_Gradients = tuple[Tensor | None, ...]


def _forward(
    x: Tensor,
    values1: Tensor,
    crow1: Tensor,
    col1: Tensor,
    bias1: Tensor | None,
    values2: Tensor,
    crow2: Tensor,
    col2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    in_features: int,
    hidden_features: int,
    out_features: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    first = (values1, crow1, col1, bias1, hidden_features, in_features)
    second = (values2, crow2, col2, bias2, out_features, hidden_features)
    fused = backends.fused("feed_forward_with_preactivation", x, values1, values2)
    if fused is not None:
        both: tuple[Tensor, Tensor] = fused(x, first, activation, second, residual)
        return both
    hidden, z = _ops.bsr_linear_with_preactivation(x, *first, activation)
    return _ops.bsr_linear(hidden, *second[:4], residual, *second[4:], "none"), z


def _gradient(
    grad: Tensor,
    z: Tensor,
    values1: Tensor,
    crow1: Tensor,
    col1: Tensor,
    values2: Tensor,
    crow2: Tensor,
    col2: Tensor,
    in_features: int,
    hidden_features: int,
    out_features: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx``, ``dz`` and ``db₁``."""
    first = (values1, crow1, col1, None, hidden_features, in_features)
    second = (values2, crow2, col2, None, out_features, hidden_features)
    fused = backends.fused("feed_forward_gradient", grad, values1, values2)
    if fused is not None:
        all_three: tuple[Tensor, Tensor, Tensor] = fused(grad, z, first, activation, second)
        return all_three
    dh = _ops.bsr_grad_input(grad, *second[:3], *second[4:])
    dz, dbias = _ops.activation_gradient(dh, z, activation)
    return _ops.bsr_grad_input(dz, *first[:3], *first[4:]), dz, dbias


def _grad_values(
    grad: Tensor, z: Tensor, crow: Tensor, col: Tensor, out: int, in_: int, height: int, width: int, activation: str
) -> Tensor:
    """``dyᵀ act(z)`` at the stored blocks."""
    sizes = (out, in_, height, width)
    native = backends.select("cpu", z.dtype, height, width)
    if native is not reference:
        values: Tensor = native.grad_values(grad, z, crow, col, *sizes, activation)
        return values
    plain: Tensor = _ops.bsr_grad_values(grad, activate(z, activation), crow, col, *sizes)
    return plain


def _bias_gradient(grad: Tensor) -> Tensor:
    native = backends.select("cpu", grad.dtype, 16, 16)
    db: Tensor = grad.reshape(-1, grad.shape[-1]).sum(0) if native is reference else native.bias_gradient(grad)
    return db


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What :func:`gradients` needs of the op's inputs and results."""
    x, values1, crow1, col1, _, values2, crow2, col2, _, _, *sizes, ctx.activation = inputs
    ctx.sizes = tuple(sizes)
    ctx.save_for_backward(x, output[1], values1, crow1, col1, values2, crow2, col2)
    ctx.set_materialize_grads(False)  # Only y is used: no zeros to add for z.


def gradients(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> _Gradients:
    """To every input of the op, each only where it is asked for."""
    need_x, need_values1, _, _, need_bias1, need_values2, _, _, need_bias2, need_residual = ctx.needs_input_grad[:10]
    x, z, values1, crow1, col1, values2, crow2, col2 = ctx.saved_tensors
    in_features, hidden_features, out_features = ctx.sizes
    if grad is None:
        grad = z.new_zeros(*z.shape[:-1], out_features)
    # The ops that take two steps at once have no gradients of their own.
    by_steps = torch.is_grad_enabled() or grad_z is not None
    dx = dz = dbias1 = dvalues1 = dvalues2 = dbias2 = None
    if need_x or need_values1 or need_bias1:
        dx, dz, dbias1 = _inside_by_steps(ctx, grad, grad_z) if by_steps else _inside(ctx, grad)
    if need_values1:
        sizes = (hidden_features, in_features, *values1.shape[1:])
        dvalues1 = _ops.bsr_grad_values(dz, x, crow1, col1, *sizes)
    if need_values2:
        sizes = (out_features, hidden_features, *values2.shape[1:])
        if by_steps:
            dvalues2 = _ops.bsr_grad_values(grad, activate(z, ctx.activation), crow2, col2, *sizes)
        else:
            dvalues2 = _ops.bsr_grad_values_activated(grad, z, crow2, col2, *sizes, ctx.activation)
    if need_bias2:
        dbias2 = grad.reshape(-1, out_features).sum(0) if by_steps else _ops.bias_gradient(grad)
    dresidual = grad if need_residual else None
    dbias1 = dbias1 if need_bias1 else None
    return dx, dvalues1, None, None, dbias1, dvalues2, None, None, dbias2, dresidual, None, None, None, None


def _inside(ctx: Any, grad: Tensor) -> _Gradients:
    """``dx`` if it is needed, ``dz`` and ``db₁``."""
    _, z, values1, crow1, col1, values2, crow2, col2 = ctx.saved_tensors
    _, hidden_features, out_features = ctx.sizes
    if ctx.needs_input_grad[0]:
        all_three: _Gradients = _ops.feed_forward_gradient(
            grad, z, values1, crow1, col1, values2, crow2, col2, *ctx.sizes, ctx.activation
        )
        return all_three
    dh = _ops.bsr_grad_input(grad, values2, crow2, col2, out_features, hidden_features)
    return None, *_ops.activation_gradient(dh, z, ctx.activation)


def _inside_by_steps(ctx: Any, grad: Tensor, grad_z: Tensor | None) -> _Gradients:
    """The same of ops that have gradients, and with that of ``z`` itself."""
    _, z, values1, crow1, col1, values2, crow2, col2 = ctx.saved_tensors
    in_features, hidden_features, out_features = ctx.sizes
    dh = _ops.bsr_grad_input(grad, values2, crow2, col2, out_features, hidden_features)
    dz = library._activation_gradient(dh, z, ctx.activation)
    dz = dz if grad_z is None else dz + grad_z
    need_x = ctx.needs_input_grad[0]
    dx = _ops.bsr_grad_input(dz, values1, crow1, col1, hidden_features, in_features) if need_x else None
    return dx, dz, dz.reshape(-1, hidden_features).sum(0)


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, hidden_features, out_features, _ = rest[-4:]
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(*x.shape[:-1], hidden_features)


def _gradient_fake(grad: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    in_features, hidden_features, _, _ = rest[-4:]
    return grad.new_empty(*grad.shape[:-1], in_features), z.new_empty(z.shape), z.new_empty(hidden_features)


def _grad_values_fake(grad: Tensor, z: Tensor, crow: Tensor, col: Tensor, *rest: Any) -> Tensor:
    return library.as_values_lie(grad.new_empty(col.shape[0], *rest[-3:-1]))


def _bias_gradient_fake(grad: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[-1])


def _register() -> None:
    for name, compute, fake in (
        ("feed_forward_with_preactivation", _forward, _forward_fake),
        ("feed_forward_gradient", _gradient, _gradient_fake),
        ("bsr_grad_values_activated", _grad_values, _grad_values_fake),
        ("bias_gradient", _bias_gradient, _bias_gradient_fake),
    ):
        library.implement(name, compute, fake)
    torch.library.register_autograd(
        "superblock::feed_forward_with_preactivation", gradients, setup_context=keep, lib=_lib
    )


_register()

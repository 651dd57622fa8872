"""``torch.ops.superblock``: schemas, shapes and gradients of the block-sparse products.

Three products close under differentiation: the gradients of each are the other two.

===================  ==========================  =================================
op                   result                      gradients
===================  ==========================  =================================
``bsr_linear``       ``act(x Wᵀ + b) + r``       ``bsr_grad_input``, ``bsr_grad_values``
``bsr_grad_input``   ``dy W``                    ``bsr_linear``, ``bsr_grad_values``
``bsr_grad_values``  ``dyᵀ x`` where ``W`` lives  ``bsr_linear``, ``bsr_grad_input``
===================  ==========================  =================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from superblock.bsr import BSRMatrix
from superblock.errors import BackendError, MatrixError
from superblock.ops import direct
from superblock.ops.backends import select
from superblock.ops.checks import ACTIVATIONS as ACTIVATIONS
from superblock.ops.checks import check_activation, check_dense, check_for
from superblock.ops.layout import feature_major

_lib = torch.library.Library("superblock", "DEF")
_WEIGHT = "Tensor values, Tensor crow_indices, Tensor col_indices"
NUMBERED_WEIGHT = "Tensor values{0}, Tensor crow_indices{0}, Tensor col_indices{0}, Tensor? bias{0}"
_SHAPE = "int out_features, int in_features"
_lib.define(f"bsr_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? residual, {_SHAPE}, str activation) -> Tensor")
_lib.define(
    f"bsr_linear_with_preactivation(Tensor x, {_WEIGHT}, Tensor? bias, {_SHAPE}, str activation) -> (Tensor, Tensor)"
)
_lib.define(f"bsr_grad_input(Tensor grad, {_WEIGHT}, {_SHAPE}) -> Tensor")
_lib.define(
    "bsr_grad_values(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, "
    f"{_SHAPE}, int block_height, int block_width) -> Tensor"
)
_lib.define("activation_gradient(Tensor grad, Tensor z, str activation) -> (Tensor, Tensor)")
_ops = torch.ops.superblock


def bsr_linear(
    x: Tensor,
    weight: BSRMatrix,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The product of activations and a block-sparse weight: ``y = act(x Wᵀ + b) + residual``.

    Args:
        x: ``[..., in]``, of the weight's dtype, or any under autocast.
        weight: ``[out, in]``.
        bias: ``[out]``.
        activation: ``relu``, ``gelu`` (exact), ``gelu_tanh``, ``silu`` or ``None``.
        residual: ``[..., out]``, added last; under autocast in its own dtype.

    Returns:
        ``[..., out]``.

    Raises:
        MatrixError: shapes, dtypes or devices do not fit.
        ConfigError: an unknown activation.
    """
    if not isinstance(weight, BSRMatrix):
        raise MatrixError(
            f"weight must be a BSRMatrix, as BSRMatrix.from_dense makes it, got a {type(weight).__name__}"
        )
    tensors = weight.values, weight.crow_indices, weight.col_indices, bias
    return product(x, *tensors, weight.shape, "none" if activation is None else activation, residual)


def product(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`bsr_linear` on a matrix's own tensors, whose layout the caller has validated."""
    if residual is None:
        y = direct.product(x, values, crow_indices, col_indices, bias, shape, activation)
        if y is not None:
            return y
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values = x.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if residual is not None and residual.dtype != dtype:  # As autocast adds: what comes in wider stays so.
            return product(x, values, crow_indices, col_indices, bias, shape, activation) + residual
    _check(x, values, bias, residual, shape, activation)
    if activation != "none" and graded(x, values, bias):
        y = _ops.bsr_linear_with_preactivation(x, values, crow_indices, col_indices, bias, *shape, activation)[0]
        return y if residual is None else y + residual
    return _ops.bsr_linear(x, values, crow_indices, col_indices, bias, residual, *shape, activation)


def graded(*tensors: Tensor | None) -> bool:
    """Whether a gradient to any of the tensors is asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(
    x: Tensor, values: Tensor, bias: Tensor | None, residual: Tensor | None, shape: tuple[int, int], activation: str
) -> None:
    check_activation(activation)
    check_dense("x", x)
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise MatrixError(f"x must be [..., {shape[1]}] for a weight of shape {tuple(shape)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (shape[0],):
        raise MatrixError(f"bias must be [{shape[0]}] for a weight of shape {tuple(shape)}, got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], shape[0]):
        raise MatrixError(
            f"residual must be {(*x.shape[:-1], shape[0])}, the shape of the product, got {tuple(residual.shape)}"
        )
    check_alike(x, values=values, bias=bias, residual=residual)


def check_alike(x: Tensor, **others: Tensor | None) -> None:
    """Raise :class:`MatrixError` unless all tensors have the dtype and device of ``x``.

    Raises:
        BackendError: one of them carries a tangent, which torch would drop where no gradient is asked for.
    """
    if forward_ad._current_level >= 0:
        for tensor in (x, *others.values()):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise BackendError(
                    "block-sparse products have no forward-mode derivatives, got a dual tensor: "
                    "take derivatives backward, by torch.autograd.grad"
                )
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise MatrixError(
                f"{name} must have the dtype and device of x, {x.dtype} on {x.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> Tensor:
    backend = select(x.device.type, x.dtype, values.shape[1], values.shape[2])
    return backend.linear(x, values, crow, col, bias, residual, out_features, in_features, activation)


def _linear_with_preactivation(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    backend = select(x.device.type, x.dtype, values.shape[1], values.shape[2])
    both: tuple[Tensor, Tensor] = backend.linear_with_preactivation(
        x, values, crow, col, bias, out_features, in_features, activation
    )
    return both


def _grad_input(grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, out_features: int, in_features: int) -> Tensor:
    backend = select(grad.device.type, grad.dtype, values.shape[1], values.shape[2])
    return backend.grad_input(grad, values, crow, col, out_features, in_features)


def _grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, out_features: int, in_features: int, height: int, width: int
) -> Tensor:
    backend = select(grad.device.type, grad.dtype, height, width)
    return as_values_lie(backend.grad_values(grad, x, crow, col, out_features, in_features, height, width))


def as_values_lie(gradient: Tensor) -> Tensor:
    """As layers lay out the values themselves: autograd then takes the gradient as it is, without a copy."""
    return feature_major(gradient) if gradient.device.type == "cpu" else gradient


def _linear_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-3])


def _linear_with_preactivation_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _linear_fake(x, *rest), _linear_fake(x, *rest)


def _grad_input_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], rest[-1])


def _grad_values_fake(grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, *rest: Any) -> Tensor:
    return as_values_lie(grad.new_empty(col.shape[0], *rest[-2:]))


def _activation_gradient(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "none":
        return grad
    if activation == "relu":
        return grad * (z > 0)
    if activation == "silu":
        dz: Tensor = aten.silu_backward(grad, z)
    else:
        dz = aten.gelu_backward(grad, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return dz


def _activation_and_bias_gradients(grad: Tensor, z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``dz`` and ``db``: one pass where the backend has a kernel for it."""
    fused = _gradient_kernel(z)
    if fused is not None:
        both: tuple[Tensor, Tensor] = fused(grad, z, activation)
        return both
    dz = grad.clone() if activation == "none" else _activation_gradient(grad, z, activation)  # No result is an input.
    return dz, dz.reshape(-1, z.shape[-1]).sum(0)


def _gradient_kernel(z: Tensor) -> Any:
    return getattr(select(z.device.type, z.dtype, 16, 16), "activation_gradient", None)


def _fuses(z: Tensor) -> bool:
    """Whether one op gives ``dz`` and ``db``; it has no gradient of its own, so double backward goes without."""
    return not torch.is_grad_enabled() and _gradient_kernel(z) is not None


def _product_gradients(
    ctx: Any, dz: Tensor, dbias: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``z = x Wᵀ + b`` to ``x``, ``values`` and ``b``, each only where it is asked for."""
    x, values, crow, col = ctx.saved_tensors[:4]
    need_x, need_values, _, _, need_bias = ctx.needs_input_grad[:5]
    dx = _ops.bsr_grad_input(dz, values, crow, col, *ctx.shape) if need_x else None
    dvalues = _ops.bsr_grad_values(dz, x, crow, col, *ctx.shape, *values.shape[1:]) if need_values else None
    if need_bias and dbias is None:
        dbias = dz.reshape(-1, ctx.shape[0]).sum(0)
    return dx, dvalues, dbias if need_bias else None


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, crow, col, bias, _, out_features, in_features, ctx.activation = inputs
    ctx.shape = (out_features, in_features)
    ctx.save_for_backward(x, values, crow, col, bias)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dz = grad
    if ctx.activation != "none":  # Only by calling the op itself: `product` keeps z instead of computing it again.
        z = _ops.bsr_linear(*ctx.saved_tensors, None, *ctx.shape, "none")
        dz = _activation_gradient(grad, z, ctx.activation)
    dx, dvalues, dbias = _product_gradients(ctx, dz)
    return dx, dvalues, None, None, dbias, grad if ctx.needs_input_grad[5] else None, None, None, None


def _preactivation_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, crow, col, _, out_features, in_features, ctx.activation = inputs
    ctx.shape = (out_features, in_features)
    ctx.save_for_backward(x, values, crow, col, output[1])
    ctx.set_materialize_grads(False)  # `product` uses y alone: no zeros to add for z.


def _preactivation_backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    z, dbias = ctx.saved_tensors[4], None
    if grad is None:
        dz = torch.zeros_like(z) if grad_z is None else grad_z
    elif grad_z is None and _fuses(z):
        dz, dbias = _ops.activation_gradient(grad, z, ctx.activation)
    else:
        dz = _activation_gradient(grad, z, ctx.activation)
        dz = dz if grad_z is None else dz + grad_z
    dx, dvalues, dbias = _product_gradients(ctx, dz, dbias)
    return dx, dvalues, None, None, dbias, None, None, None


def _grad_input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, values, crow, col, *shape = inputs
    ctx.shape = tuple(shape)
    ctx.save_for_backward(grad, values, crow, col)


def _grad_input_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grad, values, crow, col = ctx.saved_tensors
    need_grad, need_values = ctx.needs_input_grad[:2]
    dgrad = _ops.bsr_linear(upstream, values, crow, col, None, None, *ctx.shape, "none") if need_grad else None
    blocks = values.shape[1:]
    dvalues = _ops.bsr_grad_values(grad, upstream, crow, col, *ctx.shape, *blocks) if need_values else None
    return dgrad, dvalues, None, None, None, None


def _grad_values_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, crow, col, out_features, in_features, *_ = inputs
    ctx.shape = (out_features, in_features)
    ctx.save_for_backward(grad, x, crow, col)


def _grad_values_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, crow, col = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad[:2]
    dgrad = _ops.bsr_linear(x, upstream, crow, col, None, None, *ctx.shape, "none") if need_grad else None
    dx = _ops.bsr_grad_input(grad, upstream, crow, col, *ctx.shape) if need_x else None
    return dgrad, dx, None, None, None, None, None, None


def _activation_gradient_fake(grad: Tensor, z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z, memory_format=torch.contiguous_format), z.new_empty(z.shape[-1])


def implement(name: str, compute: Callable[..., Any], fake: Callable[..., Any], key: str = "CPU") -> None:
    """What an op computes for a dispatch key, and the shape of that: all that torch asks for where a tensor is on meta.

    Both see only arguments that mean something.
    """
    check = check_for(getattr(_ops, name).default._schema)

    def result(*arguments: Any) -> Any:
        check(arguments)
        return compute(*arguments)

    def shape(*arguments: Any) -> Any:
        devices = sorted({str(each.device) for each in arguments if isinstance(each, Tensor)})
        if len(devices) > 1:  # What the others ask for would be returned as memory that nothing has written.
            raise MatrixError(f"{name} takes tensors of one device, got {' and '.join(devices)}")
        check(arguments)
        return fake(*arguments)

    _lib.impl(name, result, key)
    torch.library.register_fake(f"superblock::{name}", shape, lib=_lib)


def register(
    name: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """An op that the library defines: what it computes, the shape of that, and its gradients."""
    implement(name, compute, fake, "CompositeExplicitAutograd")
    torch.library.register_autograd(f"superblock::{name}", backward, setup_context=context, lib=_lib)


def _register() -> None:
    key = "CompositeExplicitAutograd"
    implement("activation_gradient", _activation_and_bias_gradients, _activation_gradient_fake, key)
    rows = (
        ("bsr_linear", _linear, _linear_fake, _linear_context, _linear_backward),
        (
            "bsr_linear_with_preactivation",
            _linear_with_preactivation,
            _linear_with_preactivation_fake,
            _preactivation_context,
            _preactivation_backward,
        ),
        ("bsr_grad_input", _grad_input, _grad_input_fake, _grad_input_context, _grad_input_backward),
        ("bsr_grad_values", _grad_values, _grad_values_fake, _grad_values_context, _grad_values_backward),
    )
    for row in rows:
        register(*row)


_register()

"""The shortest way to the native core: eager products that nothing else has to see.

torch's dispatcher and the checks before it take longer than a small layer's product. They matter to gradients,
autocast, traces, modes and transforms; where there is none of those, the core is called without them.
"""

from __future__ import annotations

from torch import Tensor, is_grad_enabled
from torch._C import (
    _functorch,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from superblock.ops import cpu, cpu_conv2d
from superblock.ops.arguments import Norm, Weight
from superblock.ops.checks import ACTIVATIONS
from superblock.ops.convolution import KernelShape, Sides
from superblock.ops.prepared import prepare

_peek_interpreter_stack = _functorch.peek_interpreter_stack


def product(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activation: str,
) -> Tensor | None:
    """``act(x Wᵀ + b)``, or ``None`` where the long way must be taken.

    Raises:
        MatrixError: shapes, dtypes or devices do not fit.
    """
    if activation not in ACTIVATIONS or is_grad_enabled() or not is_seen_by_nobody(x):  # Without a call for both.
        return None
    try:
        return cpu.multiply(x, prepare(values, crow_indices, col_indices, bias, shape, activation))
    except RuntimeError:  # Another backend takes it, or the long way says what is wrong.
        return None


def feed_forward(
    x: Tensor, first: Weight, activation: str, second: Weight, residual: Tensor | None, norm: Norm | None
) -> Tensor | None:
    """:func:`superblock.ops.cpu.feed_forward`, or ``None``, as above."""
    if activation not in ACTIVATIONS or not infers_unseen(x) or not is_read_as_it_lies(residual):
        return None
    try:
        return cpu.feed_forward(x, first, activation, second, residual, norm)
    except RuntimeError:
        return None


def self_attention(x: Tensor, norm: Norm | None, first: Weight, second: Weight, num_heads: int) -> Tensor | None:
    """:func:`superblock.ops.cpu.self_attention`, or ``None``, as above."""
    if not infers_unseen(x):
        return None
    try:
        return cpu.self_attention(x, norm, first, second, num_heads)
    except RuntimeError:
        return None


def conv2d(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor, Tensor | None],
    residual: Tensor | None,
    geometry: tuple[KernelShape, Sides, Sides, Sides, int],
    activation: str,
) -> Tensor | None:
    """:func:`superblock.ops.cpu_conv2d.conv2d`, or ``None``, as above."""
    if activation not in ACTIVATIONS or not infers_unseen(x) or not is_read_as_it_lies(residual):
        return None
    values, crow, col, bias = weight
    try:
        return cpu_conv2d.conv2d(x, values, crow, col, bias, residual, *geometry, activation)
    except RuntimeError:
        return None


def is_read_as_it_lies(residual: Tensor | None) -> bool:
    """Whether there is none, or a plain tensor whose memory holds its values: not a negation put off, nor a wrapper."""
    return residual is None or (type(residual) is Tensor and not residual.is_neg())


def infers_unseen(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor on the CPU, in eager inference that nobody watches."""
    return not is_grad_enabled() and is_seen_by_nobody(x)


def is_seen_by_nobody(x: Tensor) -> bool:
    """The same with or without gradients."""
    return not (
        is_dynamo_compiling()
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _profiler_enabled()
        or type(x) is not Tensor
        or not x.is_cpu
        or x.is_neg()
        or not x.dim()
    )

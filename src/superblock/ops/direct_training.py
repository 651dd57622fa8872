"""The shortest way to train a feed-forward on the CPU: one node of torch's graph, one call of the core each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import Parameter

from superblock.errors import BackendError
from superblock.ops import cpu, feed_forward_training
from superblock.ops.arguments import Weight
from superblock.ops.checks import ACTIVATIONS
from superblock.ops.direct import is_read_as_it_lies, is_seen_by_nobody

_PLAIN = (Tensor, Parameter)


def feed_forward(x: Tensor, first: Weight, activation: str, second: Weight, residual: Tensor | None) -> Tensor | None:
    """The op ``feed_forward_with_preactivation``'s result, or ``None`` where the op must be called."""
    if activation not in ACTIVATIONS or not is_seen_by_nobody(x) or not is_read_as_it_lies(residual):
        return None
    parameters = first[0], first[3], second[0], second[3]
    if any(tensor is not None and type(tensor) not in _PLAIN for tensor in parameters):
        return None
    hidden, in_features = first[4:]
    try:
        both = _FeedForward.apply(x, *first[:4], *second[:4], residual, in_features, hidden, second[4], activation)
    except BackendError:  # Another backend takes it.
        return None
    y: Tensor = both[0]
    return y


class _FeedForward(torch.autograd.Function):
    """Takes, gives and keeps what the op does."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, values1, crow1, col1, bias1, values2, crow2, col2, bias2, residual, in_, hidden, out, activation = inputs
        first, second = (values1, crow1, col1, bias1, hidden, in_), (values2, crow2, col2, bias2, out, hidden)
        both = cpu.feed_forward_with_preactivation(x, first, activation, second, residual)
        feed_forward_training.keep(ctx, inputs, both)
        return both

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> Any:
        need_x, need_values1, _, _, need_bias1, need_values2, _, _, need_bias2, need_added, *_ = ctx.needs_input_grad
        again = torch.is_grad_enabled() or grad_z is not None  # What the core gives has no gradient of its own.
        if again or grad is None or not need_x or not _has_values(grad) or cpu.splits(grad):
            return feed_forward_training.gradients(ctx, grad, grad_z)
        x, z, values1, crow1, col1, values2, crow2, col2 = ctx.saved_tensors
        in_, hidden, out = ctx.sizes
        first, second = (values1, crow1, col1, None, hidden, in_), (values2, crow2, col2, None, out, hidden)
        dx, dbias1, dvalues1, dvalues2, dbias2 = cpu.feed_forward_gradients(
            grad, x, z, first, ctx.activation, second, (need_values1, need_values2, need_bias2)
        )
        into = (dx, dvalues1, None, None, dbias1 if need_bias1 else None)
        return *into, dvalues2, None, None, dbias2, grad if need_added else None, None, None, None, None


def _has_values(grad: Tensor) -> bool:
    """Whether a gradient is a plain tensor in memory: not a batch, which ``is_grads_batched`` hides, nor bare zeros."""
    return is_seen_by_nobody(grad) and not is_legacy_batchedtensor(grad) and not grad._is_zerotensor()

"""The shortest way to the native core: an eager product in inference that nothing else has to see.

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

from superblock.errors import BackendError
from superblock.ops.cpu import multiply
from superblock.ops.native import ACTIVATIONS
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
    if (
        is_dynamo_compiling()
        or is_grad_enabled()
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
        or activation not in ACTIVATIONS
    ):
        return None
    try:
        prepared = prepare(values, crow_indices, col_indices, bias, shape, activation)
    except BackendError:  # Another backend takes it, or the long way says what is wrong.
        return None
    return multiply(x, prepared)

"""The shortest way to the native core: an eager product in inference that nothing else has to see.

torch's dispatcher and the checks before it take longer than a small layer's product. They matter to gradients,
autocast, traces, modes and transforms; where there is none of those, the core is called without them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from superblock.ops import native
from superblock.ops.backends import select


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
    if not x.is_cpu or type(x) is not Tensor or not x.dim() or _observed() or activation not in native.ACTIVATIONS:
        return None
    backend = select("cpu", x.dtype, *values.shape[1:])
    if backend.__name__ != "superblock.ops.cpu":
        return None
    y: Tensor = backend.linear(x, values, crow_indices, col_indices, bias, None, *shape, activation)
    return y


def _observed() -> bool:
    core = torch._C
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or core._get_tracing_state() is not None
        or core._len_torch_dispatch_stack() > 0
        or core._len_torch_function_stack() > 0
        or core._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or core._autograd._profiler_enabled()
    )

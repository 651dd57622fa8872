"""Two products whose hidden activations stay in the cache: the native core's, or one after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from superblock.ops import backends, library

_WEIGHT = library.NUMBERED_WEIGHT
library._lib.define(
    f"feed_forward(Tensor x, {_WEIGHT.format(1)}, {_WEIGHT.format(2)}, Tensor? residual, "
    "Tensor? norm_weight, Tensor? norm_bias, float? epsilon, "
    "int in_features, int hidden_features, int out_features, str activation) -> Tensor"
)


def _compute(
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
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float | None,
    in_features: int,
    hidden_features: int,
    out_features: int,
    activation: str,
) -> Tensor:
    first = (values1, crow1, col1, bias1, hidden_features, in_features)
    second = (values2, crow2, col2, bias2, out_features, hidden_features)
    norm = None if epsilon is None else (norm_weight, norm_bias, epsilon)
    fused = backends.fused("feed_forward", x, values1, values2)
    if fused is not None:
        y: Tensor = fused(x, first, activation, second, residual, norm)
        return y
    ops = torch.ops.superblock
    if norm is not None:
        x = F.layer_norm(x, (in_features,), *norm)
    hidden = ops.bsr_linear(x, *first[:4], None, *first[4:], activation)
    both: Tensor = ops.bsr_linear(hidden, *second[:4], residual, *second[4:], "none")
    return both


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-2])


library.implement("feed_forward", _compute, _fake)

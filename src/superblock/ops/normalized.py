"""A layer norm and the product after it: as one in the native core, or one after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from superblock.ops import backends, library

library._lib.define(
    "bsr_linear_normalized(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float epsilon, Tensor values, "
    "Tensor crow_indices, Tensor col_indices, Tensor? bias, Tensor? residual, "
    "int out_features, int in_features, str activation) -> Tensor"
)


def _compute(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> Tensor:
    weight = values, crow_indices, col_indices, bias, residual, out_features, in_features, activation
    fused = backends.fused("linear_normalized", x, values)
    if fused is not None:
        y: Tensor = fused(x, (norm_weight, norm_bias, epsilon), *weight)
        return y
    normalized = F.layer_norm(x, (in_features,), norm_weight, norm_bias, epsilon)
    both: Tensor = torch.ops.superblock.bsr_linear(normalized, *weight)
    return both


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-3])


library.implement("bsr_linear_normalized", _compute, _fake)

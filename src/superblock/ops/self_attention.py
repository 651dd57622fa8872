"""Self-attention between its two projections: as one in the native core, or one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from superblock.errors import MatrixError
from superblock.ops import backends, library
from superblock.ops.attention import attention, check_heads

_WEIGHT = library.NUMBERED_WEIGHT
library._lib.define(
    "self_attention(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float? epsilon, "
    f"{_WEIGHT.format(1)}, {_WEIGHT.format(2)}, int num_heads, int inner_features) -> Tensor"
)


def _compute(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float | None,
    values1: Tensor,
    crow1: Tensor,
    col1: Tensor,
    bias1: Tensor | None,
    values2: Tensor,
    crow2: Tensor,
    col2: Tensor,
    bias2: Tensor | None,
    num_heads: int,
    inner_features: int,
) -> Tensor:
    _check(x, num_heads, inner_features)
    features = x.shape[-1]
    first = (values1, crow1, col1, bias1, 3 * inner_features, features)
    second = (values2, crow2, col2, bias2, features, inner_features)
    norm = None if epsilon is None else (norm_weight, norm_bias, epsilon)
    fused = backends.fused("self_attention", x, values1, values2)
    whole: Tensor | None = None if fused is None else fused(x, norm, first, second, num_heads)
    if whole is not None:
        return whole
    ops = torch.ops.superblock
    if norm is None:
        qkv = ops.bsr_linear(x, *first[:4], None, *first[4:], "none")
    else:
        qkv = ops.bsr_linear_normalized(x, *norm, *first[:4], None, *first[4:], "none")
    heads = attention(*(part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)))
    y: Tensor = ops.bsr_linear(heads.transpose(1, 2).flatten(2), *second[:4], x, *second[4:], "none")
    return y


def _check(x: Tensor, num_heads: int, inner_features: int) -> None:
    if x.dim() != 3:
        raise MatrixError(f"x must be [sequences, tokens, features], got {tuple(x.shape)}")
    check_heads(num_heads, inner_features)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    _check(x, *rest[-2:])
    return torch.empty_like(x, memory_format=torch.contiguous_format)


library.implement("self_attention", _compute, _fake)

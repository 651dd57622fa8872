"""What an op refuses whoever calls it: arguments that mean nothing, by the names that schemas give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from superblock.bsr import check_blocks
from superblock.errors import ConfigError, MatrixError
from superblock.ops.convolution import check_kernel_shape, check_sides

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def check_activation(activation: str) -> None:
    """Raise :class:`ConfigError` unless there is such an activation."""
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise :class:`MatrixError` unless a tensor has strides, and elements that floating values can multiply."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise MatrixError(f"{name} must be a plain, dense tensor, got {kind}: convert it first")
    if not tensor.is_floating_point():
        raise MatrixError(f"{name} must be of a floating dtype, got {tensor.dtype}")


def check_for(schema: torch.FunctionSchema) -> Callable[[Sequence[Any]], None]:
    """The check of an op's arguments, in the order of its schema. Which shapes fit which is left to the backends."""
    names = [argument.name for argument in schema.arguments]

    def places(*wanted: str) -> list[int]:
        return [names.index(name) for name in wanted if name in names]

    rows, blocks, activations = places("x", "grad", "z"), places("values", "values1", "values2"), places("activation")
    counts = places(
        "out_features", "in_features", "hidden_features", "inner_features", "block_height", "block_width", "groups"
    )
    norms, kernels, sides = places("norm_weight"), places("kernel_shape"), places("stride", "padding", "dilation")

    def check(arguments: Sequence[Any]) -> None:  # Written out, because every call costs as much as all that it checks.
        for place in rows:
            tensor = arguments[place]
            if not tensor.dim():
                raise MatrixError(f"{names[place]} must be of at least one dimension, got a single number")
            if not tensor.is_floating_point() or tensor.layout is not torch.strided:
                check_dense(names[place], tensor)
        for place in blocks:
            values = arguments[place]
            if values.dim() != 3 or 0 in values.shape:
                check_blocks(values)
        for place in counts:
            if arguments[place] < 1:
                raise MatrixError(f"{names[place]} must be at least 1, got {arguments[place]}")
        for place in activations:
            if arguments[place] not in ACTIVATIONS:
                check_activation(arguments[place])
        for place in norms:
            weight, bias, epsilon = arguments[place : place + 3]
            if epsilon is None and not weight is bias is None:
                raise MatrixError("norm_weight and norm_bias take effect with an epsilon, got none")
        for place in kernels:
            check_kernel_shape(arguments[place])
        for place in sides:
            check_sides(names[place], arguments[place], 0 if names[place] == "padding" else 1)

    return check

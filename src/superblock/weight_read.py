"""What a block-sparse layer answers to those who read its weight instead of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from superblock.errors import ModelError
from superblock.ops.library import product


class WeightRead:
    """What a BSR layer answers when a parent reads ``layer.weight``: a linear one's is good for ``F.linear`` alone.

    Some models (torchvision's Swin) hand a layer's weight to ``F.linear`` instead of calling the layer; others (timm's
    EdgeNeXt) ask it for its device or shape.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._layer.weight_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Python's own protocols.
            raise AttributeError(name)
        if name in ("device", "dtype", "requires_grad"):
            return getattr(self._layer.values, name)
        raise _UnreadableError(_unreadable(self.ndim == 4, name))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        every = (*args, *(kwargs or {}).values())
        convolves = any(isinstance(each, cls) and each.ndim == 4 for each in every)
        if function is F.linear and not convolves:
            return _linear_through(*args, **(kwargs or {}))
        raise ModelError(_unreadable(convolves, getattr(function, "__name__", str(function))))


class _UnreadableError(ModelError, AttributeError):
    """What ``hasattr`` may ask for."""


def _unreadable(convolves: bool, reader: str) -> str:
    if convolves:
        return f"the weight of a block-sparse convolution cannot be read by {reader}: exclude its layer"
    return f"a block-sparse weight can only be read by F.linear, not by {reader}: exclude its layer"


def _linear_through(input: Tensor, weight: WeightRead, bias: Tensor | None = None) -> Tensor:
    layer = weight._layer
    shape = (layer.out_features, layer.in_features)
    return product(input, layer.values, layer.crow_indices, layer.col_indices, bias, shape)

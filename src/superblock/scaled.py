"""Residual blocks that scale what they add: one pass over memory for both, none for the norm before the products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from superblock.feed_forward import FeedForwardMlp, FeedForwardSequential, normalized, passes
from superblock.fuse import comes_from, watched


def fuse_scaled(model: nn.Module) -> None:
    """Let torchvision's and timm's ConvNeXt blocks add what they scale at once, in place.

    Modules, names and state stay as they are; only the block's class changes. What a hook watches is called as ever.
    """
    for module in model.modules():
        parts = module._modules
        if comes_from(module, "torchvision.models.convnext", "CNBlock"):
            if isinstance(parts["block"], FeedForwardSequential):
                module.__class__ = ScaledCNBlock
        elif comes_from(module, "timm.models.convnext", "ConvNeXtBlock"):  # noqa: SIM102  As above.
            if isinstance(parts["mlp"], FeedForwardMlp) and not module.use_conv_mlp:
                module.__class__ = ScaledConvNeXtBlock


class ScaledCNBlock(nn.Module):
    """torchvision's ``CNBlock``."""

    layer_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        parts: dict[str, Any] = self._modules
        y, drop = parts["block"](input), parts["stochastic_depth"]
        if _drops_nothing(drop):
            return add_scaled(input, y, self.layer_scale)
        added: Tensor = drop(self.layer_scale * y) + input
        return added


class ScaledConvNeXtBlock(nn.Module):
    """timm's ``ConvNeXtBlock`` whose feed-forward takes pixels one after another."""

    gamma: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        parts: dict[str, Any] = self._modules
        pixels, shortcut = parts["conv_dw"](x).permute(0, 2, 3, 1), parts["shortcut"](x)
        y, drop = normalized(parts["mlp"], parts["norm"], pixels).permute(0, 3, 1, 2), parts["drop_path"]
        scale = None if self.gamma is None else self.gamma.reshape(1, -1, 1, 1)
        if scale is not None and _drops_nothing(drop):
            return add_scaled(shortcut, y, scale)
        added: Tensor = drop(y if scale is None else y * scale) + shortcut
        return added


def add_scaled(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """``x + scale · y``, in one pass where all are of one dtype."""
    if x.dtype == y.dtype == scale.dtype and x.shape == y.shape:
        return torch.addcmul(x, y, scale)
    return x + scale * y


def scale_of(module: nn.Module) -> Tensor | None:
    """What timm's ``LayerScale`` multiplies with, seen by nobody; ``None`` of other modules."""
    if not comes_from(module, "timm.", "LayerScale") or watched(module):
        return None
    gamma: Tensor = module.gamma  # type: ignore[assignment]
    return gamma


def _drops_nothing(drop: nn.Module) -> bool:
    """Whether a stochastic depth hands on its input now, seen by nobody."""
    known = comes_from(drop, "torchvision.", "StochasticDepth") or comes_from(drop, "timm.", "DropPath")
    return passes(drop) or (known and not drop.training and not watched(drop))

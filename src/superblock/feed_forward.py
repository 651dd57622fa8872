"""Feed-forward layers whose two products run as one in inference on the CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

import superblock.ops.feed_forward  # noqa: F401  Registers the op.
from superblock.fuse import comes_from, fusible, watched
from superblock.nn import BSRLinear
from superblock.normalized import norm_of


def fuse_feed_forward(model: nn.Module) -> None:
    """Let every ``nn.Sequential`` and timm ``Mlp`` that chains two :class:`BSRLinear` run them as one, in place.

    The modules, their names and their state stay as they are; only the container's class changes. In training, and
    wherever a gradient is asked for, the layers run one after the other.
    """
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward and isinstance(module, nn.Sequential):
            steps = [child for child in module if not passes(child)]
            if any(chains(first, second) for first, second in pairwise(steps)):
                module.__class__ = FeedForwardSequential
        elif comes_from(module, "timm.", "Mlp"):
            idle = (module.act, module.drop1, module.norm, module.drop2)
            if chains(module.fc1, module.fc2) and passes(*idle):
                module.__class__ = FeedForwardMlp


class FeedForwardSequential(nn.Sequential):
    """A sequence in which two block-sparse layers that follow one another run as one."""

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None) -> Tensor:
        steps = [child for child in self if not passes(child)]
        chained = not self.training and len(steps) > 1 and chains(steps[0], steps[1])
        if norm is not None and not chained:
            x, norm = norm(x), None
        if self.training:
            y: Tensor = super().forward(x)
            return y if residual is None else y + residual
        while steps:
            if len(steps) > 1 and chains(steps[0], steps[1]):
                last = residual if len(steps) == 2 else None
                x = feed_forward(x, steps[0], steps[1], last, norm)  # type: ignore[arg-type]
                residual, norm = None if len(steps) == 2 else residual, None
                steps = steps[2:]
            else:
                x = steps.pop(0)(x)
        return x if residual is None else x + residual


class FeedForwardMlp(nn.Module):
    """timm's ``Mlp`` after its activation has moved into its first layer."""

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None) -> Tensor:
        idle = (self.act, self.drop1, self.norm, self.drop2)
        if not self.training and chains(self.fc1, self.fc2) and passes(*idle):
            return feed_forward(x, self.fc1, self.fc2, residual, norm)  # type: ignore[arg-type]
        x = x if norm is None else norm(x)
        hidden = self.norm(self.drop1(self.act(self.fc1(x))))  # type: ignore[operator]
        y: Tensor = self.drop2(self.fc2(hidden))  # type: ignore[operator]
        return y if residual is None else y + residual


def feed_forward(
    x: Tensor, first: BSRLinear, second: BSRLinear, residual: Tensor | None = None, norm: nn.Module | None = None
) -> Tensor:
    """``second(first(norm(x))) + residual``, in one pass over the tokens where no gradient is asked for."""
    whole = fusible(x, first.values, first.bias, second.values, second.bias, residual)
    inside = norm_of(norm, x, first) if whole and norm is not None else None
    if norm is not None and inside is None:
        x = norm(x)
    if not whole:
        return second(first(x)) if residual is None else second.project(first(x), second.activation, residual)
    fused: Tensor = torch.ops.superblock.feed_forward(
        x,
        first.values,
        first.crow_indices,
        first.col_indices,
        first.bias,
        second.values,
        second.crow_indices,
        second.col_indices,
        second.bias,
        residual,
        *(inside or (None, None, None)),
        first.in_features,
        first.out_features,
        second.out_features,
        first.activation,
    )
    return fused


def passes(*modules: object) -> bool:
    """Whether modules hand on their input in inference, seen by nobody."""
    return all(isinstance(module, nn.Identity | nn.Dropout) and not watched(module) for module in modules)


def chains(first: object, second: object) -> bool:
    """Whether two layers can run as one, seen by nobody."""
    return (
        type(first) is BSRLinear
        and type(second) is BSRLinear
        and first.out_features == second.in_features
        and second.activation == "none"
        and not watched(first, second)
    )

"""Feed-forward layers whose two products run as one on the CPU, in training too."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

import superblock.ops.feed_forward
import superblock.ops.feed_forward_training  # noqa: F401  Both register their ops.
from superblock.fuse import alike, comes_from, fusible, graded, watched
from superblock.nn import BSRLinear
from superblock.normalized import norm_of


def fuse_feed_forward(model: nn.Module) -> None:
    """Let every ``nn.Sequential`` and timm ``Mlp`` that chains two :class:`BSRLinear` run them as one, in place.

    The modules, their names and their state stay as they are; only the container's class changes. Where a dropout
    between or behind the layers is active, they run one after the other.
    """
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward and isinstance(module, nn.Sequential):
            steps = [child for child in module if not _may_pass(child)]
            if any(chains(first, second) for first, second in pairwise(steps)):
                module.__class__ = FeedForwardSequential
        elif comes_from(module, "timm.", "Mlp"):
            idle = (module.act, module.drop1, module.norm, module.drop2)
            if chains(module.fc1, module.fc2) and _may_pass(*idle):
                module.__class__ = FeedForwardMlp


class FeedForwardSequential(nn.Sequential):
    """A sequence in which two block-sparse layers that follow one another run as one."""

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None) -> Tensor:
        steps = [child for child in self if not passes(child)]
        if norm is not None and not (len(steps) > 1 and chains(steps[0], steps[1])):
            x, norm = norm(x), None
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
        if chains(self.fc1, self.fc2) and passes(*idle):
            return feed_forward(x, self.fc1, self.fc2, residual, norm)  # type: ignore[arg-type]
        x = x if norm is None else norm(x)
        hidden = self.norm(self.drop1(self.act(self.fc1(x))))  # type: ignore[operator]
        y: Tensor = self.drop2(self.fc2(hidden))  # type: ignore[operator]
        return y if residual is None else y + residual


def feed_forward(
    x: Tensor, first: BSRLinear, second: BSRLinear, residual: Tensor | None = None, norm: nn.Module | None = None
) -> Tensor:
    """``second(first(norm(x))) + residual``, in one pass over the tokens where the native core can; so in training."""
    taking_part = (first.values, first.bias, second.values, second.bias, residual)
    inside = norm_of(norm, x, first) if norm is not None and fusible(x, *taking_part) else None
    if norm is not None and inside is None:
        x = norm(x)
    if not alike(x, *taking_part):
        return second(first(x)) if residual is None else second.project(first(x), second.activation, residual)
    tensors = (
        first.values,
        first.crow_indices,
        first.col_indices,
        first.bias,
        second.values,
        second.crow_indices,
        second.col_indices,
        second.bias,
        residual,
    )
    sizes = (first.in_features, first.out_features, second.out_features, first.activation)
    y: Tensor
    if graded(x, *taking_part):
        y = torch.ops.superblock.feed_forward_with_preactivation(x, *tensors, *sizes)[0]
    else:
        y = torch.ops.superblock.feed_forward(x, *tensors, *(inside or (None, None, None)), *sizes)
    return y


def passes(*modules: object) -> bool:
    """Whether modules hand on their input now, seen by nobody."""
    return _may_pass(*modules) and not any(
        isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in modules
    )


def _may_pass(*modules: object) -> bool:
    """The same in inference."""
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

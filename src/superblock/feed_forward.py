"""Feed-forward layers whose two products run as one on the CPU, in training too."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

import superblock.ops.feed_forward
import superblock.ops.feed_forward_training  # noqa: F401  Both register their ops.
from superblock.fuse import alike, comes_from, fusible, is_plain_sequence, watched
from superblock.nn import BSRLinear
from superblock.normalized import norm_of
from superblock.ops import cpu, direct, direct_training
from superblock.ops.library import graded
from superblock.ops.prepared import Chain

_STILL = (nn.Identity, nn.Dropout)  # What hands on its input in inference.


def fuse_feed_forward(model: nn.Module) -> None:
    """Let every ``nn.Sequential`` and timm ``Mlp`` that chains two :class:`BSRLinear` run them as one, in place.

    The modules, their names and their state stay as they are; only the container's class changes. Where a dropout
    between or behind the layers is active, they run one after the other.
    """
    for module in model.modules():
        if is_plain_sequence(module):
            steps = [child for child in module if not _may_pass(child)]
            if any(is_pair(first, second) for first, second in pairwise(steps)):
                module.__class__ = FeedForwardSequential
        elif comes_from(module, "timm.layers.", "Mlp"):
            idle = (module.act, module.drop1, module.norm, module.drop2)
            if is_pair(module.fc1, module.fc2) and _may_pass(*idle):
                module.__class__ = FeedForwardMlp


class FeedForwardSequential(nn.Sequential):
    """A sequence in which two block-sparse layers that follow one another run as one."""

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None) -> Tensor:
        steps = [child for child in self._modules.values() if not passes(child)]
        while steps:
            pair = len(steps) > 1 and is_pair(steps[0], steps[1])
            if norm is not None and not pair:
                x, norm = norm(x), None
            if norm is None and isinstance(steps[0], nn.LayerNorm) and len(steps) > 2 and is_pair(*steps[1:3]):
                norm, pair = steps.pop(0), True
            if pair:
                last = residual if len(steps) == 2 else None
                x = feed_forward(x, steps[0], steps[1], last, norm)  # type: ignore[arg-type]
                residual, norm = None if len(steps) == 2 else residual, None
                steps = steps[2:]
            else:
                x = steps.pop(0)(x)
        return x if residual is None else x + residual

    def pair(self) -> tuple[BSRLinear, BSRLinear] | None:
        """The two layers that are all there is now, or ``None``."""
        steps = [child for child in self._modules.values() if not passes(child)]
        return (steps[0], steps[1]) if len(steps) == 2 and is_pair(*steps) else None  # type: ignore[return-value]


class FeedForwardMlp(nn.Module):
    """timm's ``Mlp`` after its activation has moved into its first layer."""

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None) -> Tensor:
        pair = self.pair()
        if pair is not None:
            return feed_forward(x, *pair, residual, norm)
        parts: dict[str, Any] = self._modules
        x = x if norm is None else norm(x)
        hidden = parts["norm"](parts["drop1"](parts["act"](parts["fc1"](x))))
        y: Tensor = parts["drop2"](parts["fc2"](hidden))
        return y if residual is None else y + residual

    def pair(self) -> tuple[BSRLinear, BSRLinear] | None:
        """``fc1`` and ``fc2``, if they are all there is now, or ``None``."""
        parts: dict[str, Any] = self._modules
        first, second = parts["fc1"], parts["fc2"]
        idle = passes(parts["act"], parts["drop1"], parts["norm"], parts["drop2"])
        return (first, second) if idle and is_pair(first, second) else None


def feed_forward(
    x: Tensor, first: BSRLinear, second: BSRLinear, residual: Tensor | None = None, norm: nn.Module | None = None
) -> Tensor:
    """``second(first(norm(x))) + residual``, in one pass over the tokens where the native core can; so in training."""
    up, down = first.tensors, second.tensors
    taking_part = (up[0], up[3], down[0], down[3], residual)
    inside = norm_of(norm, x, first) if norm is not None and fusible(x, *taking_part) else None
    if norm is not None and inside is None:
        x = norm(x)
    if inside is None and not alike(x, *taking_part):
        return second(first(x)) if residual is None else second.project(first(x), second.activation, residual)
    in_features, hidden, out_features = first.in_features, first.out_features, second.out_features
    tensors, sizes = (*up, *down, residual), (in_features, hidden, out_features, first.activation)
    into, out = (*up, hidden, in_features), (*down, out_features, hidden)
    if graded(x, *taking_part):
        trained = direct_training.feed_forward(x, into, first.activation, out, residual)
        if trained is None:
            trained = torch.ops.superblock.feed_forward_with_preactivation(x, *tensors, *sizes)[0]
        return trained
    whole = direct.feed_forward(x, into, first.activation, out, residual, inside)
    if whole is None:
        whole = torch.ops.superblock.feed_forward(x, *tensors, *(inside or (None, None, None)), *sizes)
    return whole


def normalized(mlp: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``mlp(norm(x)) + residual``, in one pass where ``mlp`` can, seen by nobody."""
    if _takes_a_norm(mlp):
        whole: Tensor = mlp(x, residual, norm)
        return whole
    y: Tensor = mlp(norm(x))
    return y if residual is None else residual + y


def chain_of_feed_forward(mlp: nn.Module, norm: nn.Module, x: Tensor) -> tuple[Chain, object] | None:
    """``mlp(norm(x)) + x`` prepared for tokens like ``x`` in plain inference, and the tensors that it reads.

    ``None`` where it must be called.
    """
    if not _takes_a_norm(mlp) or cpu.splits(x):
        return None
    pair = mlp.pair()
    if pair is None:
        return None
    first, second = pair
    up, down = first.tensors, second.tensors
    in_features, hidden, out_features = first.in_features, first.out_features, second.out_features
    inside = norm_of(norm, x, first) if in_features == out_features == x.shape[-1] else None
    if inside is None or not fusible(x, up[0], up[3], down[0], down[3]):
        return None
    into, out = (*up, hidden, in_features), (*down, out_features, hidden)
    return cpu.feed_forward_chain(into, first.activation, out, inside), (inside, into, out)


def _takes_a_norm(mlp: nn.Module) -> TypeGuard[FeedForwardMlp | FeedForwardSequential]:
    return isinstance(mlp, FeedForwardMlp | FeedForwardSequential) and not watched(mlp)


def passes(*modules: object) -> bool:
    """Whether modules hand on their input now, seen by nobody."""
    for module in modules:
        if not isinstance(module, _STILL) or type(module) not in _STILL or watched(module):
            return False
        if module.training and isinstance(module, nn.Dropout) and module.p > 0:
            return False
    return True


def _may_pass(*modules: object) -> bool:
    """The same in inference."""
    return all(type(module) in _STILL and not watched(module) for module in modules)  # type: ignore[arg-type]


def is_pair(first: object, second: object) -> bool:
    """Whether two layers can run as one, seen by nobody."""
    return (
        type(first) is BSRLinear
        and type(second) is BSRLinear
        and first.out_features == second.in_features
        and second.activation == "none"
        and not watched(first, second)
    )

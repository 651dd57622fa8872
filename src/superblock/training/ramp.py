"""Masks that grow: sparsity rises over the first part of a run, and the largest tiles stay.

Gradual magnitude pruning (Zhu and Gupta, "To prune, or not to prune", 2017), with tiles in the place of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from superblock.masks import Supermask, live_tiles, tile_magnitudes
from superblock.surgery import mask_input, masked_weights


def ramped(sparsity: float, progress: float) -> float:
    """The sparsity after a share of the ramp: ``sparsity · (1 - (1 - progress)³)``, steep at first, then gentle."""
    return sparsity * (1 - (1 - min(1.0, progress)) ** 3)


@dataclass(frozen=True)
class _Place:
    """A mask and where its weight is."""

    module: nn.Module
    name: str
    mask: Supermask
    live: int


class Ramp:
    """Makes the masks of a model grow from dense to their targets, then leaves them as they are.

    After every update the scores become the magnitudes of the tiles, and fewer tiles live. What it does follows from
    epoch and update alone, so there is nothing of it in a checkpoint but the scores.

    Args:
        model: masked; its scores are no longer trained.
        epochs: how long the ramp is; 0 begins and ends with the masks as they are.
        average: the moving average of ``model``, which gets the same masks: an average of scores would lag behind.
    """

    def __init__(self, model: nn.Module, epochs: float, average: nn.Module | None = None) -> None:
        self.epochs = epochs
        self.places = _places(model)
        self.followers = [] if average is None else _places(average)
        self.epoch, self.update, self.updates = 0, 0, 1
        for place in self.places:
            place.mask.scores.requires_grad_(False)

    def begin_epoch(self, epoch: int, updates: int = 1) -> None:
        """Take the place in the ramp that belongs to the beginning of an epoch of so many updates."""
        self.epoch, self.update, self.updates = epoch, 0, updates
        self._set_live()

    def step(self) -> None:
        """Follow an update of the weights."""
        if self._progress() >= 1:
            return
        self.update += 1
        with torch.no_grad():
            for place in self.places:
                weight = mask_input(place.module, place.name, place.mask)
                place.mask.scores.copy_(tile_magnitudes(weight, place.mask.tile))
            for place, follower in zip(self.places, self.followers, strict=False):
                follower.mask.scores.copy_(place.mask.scores)
        self._set_live()

    def _progress(self) -> float:
        return 1.0 if self.epochs == 0 else (self.epoch + self.update / self.updates) / self.epochs

    def _set_live(self) -> None:
        progress = self._progress()
        for place in (*self.places, *self.followers):
            mask = place.mask
            now = live_tiles(mask.scores.numel(), ramped(mask.target.sparsity, progress))
            mask.live = place.live if progress >= 1 else max(place.live, now)


def _places(model: nn.Module) -> list[_Place]:
    """Every mask once, with one of the places that share it."""
    found = {id(mask): _Place(module, name, mask, mask.live) for _, module, name, mask in masked_weights(model)}
    return list(found.values())

"""Which mask a rule makes of a weight: ours, or that of the original SuperBlock for its checkpoints."""

from __future__ import annotations

import math

from torch import Tensor

from superblock.config import Rule, TileSparsity
from superblock.masks import Supermask


def make_mask(weight: Tensor, target: TileSparsity, rule: Rule = "exact") -> Supermask:
    """The mask of a weight.

    ``exact``: square tiles over outputs and inputs, exactly ``round(density · n)`` of them alive.
    ``original``: tiles cut every dimension of the weight, kernel positions too, and all tiles live whose score is
    at least the k-th smallest (:func:`original_live_tiles`), ties included.
    """
    if rule == "exact":
        return Supermask(weight, target)
    tile = tuple(min(target.tile_size, side) for side in weight.shape)
    mask = Supermask(weight, target, tile=tile, keep_ties=True)
    mask.live = original_live_tiles(math.prod(mask.grid), target.sparsity)
    return mask


def original_live_tiles(tiles: int, sparsity: float) -> int:
    """How many tiles reach the original's threshold: all but ``round(min(sparsity, 1 - 1/n) · (n - 1))`` of ``n``.

    The original went by per cent, and the rounding error of that decides the halves: 70 % of 15 is 11 there,
    while ``round(0.7 * 15)`` is 10.
    """
    percent = min(sparsity, 1 - 1 / tiles) * 100
    return tiles - round(0.01 * percent * (tiles - 1))

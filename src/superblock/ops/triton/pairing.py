"""Which block rows share a panel: those that need the same columns, so that fewer columns are walked in all."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are compared with every other one of their batch: more would take memory that grows with the square.
BATCH = 1024  # even: only the last batch can leave a row alone


def panels_of(living: Tensor, merged: int) -> Tensor:
    """Block rows in panels of ``merged``, a power of two: ``[panels, merged]``, filled up with the number of rows.

    Panels are paired again and again, each time those that share the most columns.

    Args:
        living: ``[rows, columns]`` bool, where a row has a block.
    """
    rows = living.shape[0]
    panels = torch.arange(rows)[:, None]
    while panels.shape[1] < merged:
        used = torch.cat([living, living.new_zeros(1, living.shape[1])])[panels].any(1)
        nobody = panels.new_full((1, panels.shape[1]), rows)
        pairs = torch.cat([start + _pairs(part) for start, part in _batches(used)])
        panels = torch.cat([panels, nobody])[pairs.clamp(max=len(panels))].flatten(1)
    return panels


def _batches(used: Tensor) -> list[tuple[int, Tensor]]:
    return [(start, used[start : start + BATCH]) for start in range(0, len(used), BATCH)]


def _pairs(used: Tensor) -> Tensor:
    """``[⌈n / 2⌉, 2]``: whoever prefers one another goes together, round after round; the odd one gets ``n``."""
    count = len(used)
    shared = used.float() @ used.float().mT
    # A little noise, the same at every run, breaks ties, of which only one pair a round would find one another.
    noise = torch.rand(count, count, generator=torch.Generator().manual_seed(0)).triu_(1)
    shared += (noise + noise.mT).fill_diagonal_(-torch.inf)
    own = torch.arange(count)
    alone = torch.ones(count, dtype=torch.bool)
    found = []
    while int(alone.sum()) > 1:
        best = shared.argmax(1)
        first = alone & (best[best] == own) & (own < best)
        pairs = torch.stack([own[first], best[first]], 1)
        found.append(pairs)
        alone[pairs] = False
        shared[pairs.flatten()] = -torch.inf
        shared[:, pairs.flatten()] = -torch.inf
    return torch.cat([*found, torch.stack([own[alone], own[alone].new_full((int(alone.sum()),), count)], 1)])

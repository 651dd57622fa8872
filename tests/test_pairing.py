"""Rows that share columns go together, every row once, the same way every time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from superblock.ops.triton import pairing
from superblock.ops.triton.pairing import panels_of


@pytest.mark.parametrize("merged", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 71])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_every_row_once(rows: int, merged: int, density: float) -> None:
    living = torch.rand(rows, 20, generator=torch.Generator().manual_seed(rows)) < density
    panels = panels_of(living, merged)
    assert panels.shape[1] == merged
    assert len(panels) <= -(-rows // merged) + merged.bit_length()
    assert sorted(panels[panels < rows].tolist()) == list(range(rows))
    assert torch.equal(panels, panels_of(living, merged))


def test_rows_of_the_same_columns_find_one_another() -> None:
    patterns = torch.eye(8, dtype=torch.bool).repeat_interleave(3, 1)
    living = patterns.repeat(2, 1)
    assert {tuple(sorted(pair)) for pair in panels_of(living, 2).tolist()} == {(row, row + 8) for row in range(8)}
    four = panels_of(living.repeat(2, 1), 4)
    assert {tuple(sorted(panel)) for panel in four.tolist()} == {(r, r + 8, r + 16, r + 24) for r in range(8)}


def test_fewer_columns_are_walked_than_by_neighbours() -> None:
    living = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.2
    walked = living[panels_of(living, 2)].any(1).sum()
    assert walked < 0.9 * living.view(32, 2, 64).any(1).sum()


def test_many_rows_are_paired_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "BATCH", 4)
    panels = panels_of(torch.ones(11, 3, dtype=torch.bool), 2)
    assert sorted(panels.flatten().tolist()) == list(range(12))
    assert all(row // 4 == panels[0, 0] // 4 for row in panels[0])

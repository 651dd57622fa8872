"""The value gradient and the mask side."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DTYPES, MASKS, SAMPLED, Product, check_masks, check_sampled

from superblock.ops.triton import masks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_value_gradient(case: Product, dtype: torch.dtype, device: str) -> None:
    check_sampled(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "tile"), MASKS)
def test_masks(shape: tuple[int, ...], tile: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_masks(shape, tile, dtype, device)


@pytest.mark.parametrize("live", range(1, 8))
def test_nan_and_infinite_scores_rank_as_torch_ranks_them(live: int, device: str) -> None:
    scores = torch.tensor([float("nan"), 1.0, float("inf"), float("nan"), -1.0, 0.0, -0.0])
    order = scores.argsort(descending=True, stable=True)[:live]
    want = torch.zeros(7, dtype=torch.bool).scatter(0, order, True)
    assert torch.equal(masks.threshold(scores.to(device), live).cpu(), want)


def test_what_the_mask_kernels_leave_to_torch() -> None:
    weight = torch.randn(8, 8, 3, 3)
    assert masks.takes(weight, (4, 4, 3, 3))
    assert not masks.takes(weight, (4, 4, 1, 1))
    assert not masks.takes(weight.mT, (4, 4, 3, 3))
    assert not masks.takes(weight.double(), (4, 4, 3, 3))
    assert not masks.takes(torch.randn(8), (4,))
    assert masks.ranks(weight)
    assert not masks.ranks(weight.double())
    assert not masks.ranks(torch.empty(masks.MOST_SCORES + 1))

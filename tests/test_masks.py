"""Scores to masks: which tiles live, what is multiplied, where gradients go, when masks are computed again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from superblock import Supermask, TileSparsity
from superblock import masks as masks_module
from superblock.errors import ConfigError, ModelError
from superblock.masks import live_tiles, mask_tiles, threshold, tile_grid, tile_of, tile_sums

SHAPES = [(64, 32), (70, 50), (1, 7), (5, 3), (20, 12, 3, 3), (20, 1, 3, 3), (33, 17, 1, 1), (9, 8, 5)]


def full_mask(mask: torch.Tensor, shape: tuple[int, ...], tile: tuple[int, ...]) -> torch.Tensor:
    """The mask of every single weight, built the slow way."""
    index = torch.meshgrid(*(torch.arange(side) // step for side, step in zip(shape, tile, strict=True)), indexing="ij")
    return mask[index]


def test_literal_scores_give_the_literal_mask() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]])
    assert threshold(scores, 3).tolist() == [[False, True, False], [True, False, True]]


def test_ties_live_by_index_and_the_count_is_exact() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    assert threshold(scores, 2).tolist() == [True, True, False, False, False]
    assert threshold(scores, 3).tolist() == [True, True, True, False, False]


def test_all_ties_live_by_the_original_rule() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    assert threshold(scores, 2, keep_ties=True).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("tiles", "sparsity", "live"), [(100, 0.9, 10), (10, 0.99, 1), (1, 0.9, 1), (7, 0.0, 7), (48, 0.8, 10), (3, 0.5, 2)]
)
def test_live_tiles_are_the_rounded_density_and_at_least_one(tiles: int, sparsity: float, live: int) -> None:
    assert live_tiles(tiles, sparsity) == live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile_size", [1, 4, 16])
def test_masking_matches_the_full_mask(shape: tuple[int, ...], tile_size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    supermask = Supermask(weight, TileSparsity(0.6, tile_size))
    mask = supermask.mask()
    assert int(mask.sum()) == live_tiles(mask.numel(), 0.6)
    expected = weight * full_mask(mask, shape, supermask.tile)
    assert torch.equal(supermask(weight), expected)
    assert supermask(weight).dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile_size", [1, 4, 16])
def test_gradients_are_straight_through(shape: tuple[int, ...], tile_size: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    supermask = Supermask(weight, TileSparsity(0.5, tile_size))
    upstream = torch.randn(shape, dtype=torch.float64)
    supermask(weight).backward(upstream)
    full = full_mask(supermask.mask(), shape, supermask.tile)
    torch.testing.assert_close(weight.grad, upstream * full)
    expected = torch.zeros(supermask.grid, dtype=torch.float64)
    index = full_mask(torch.arange(expected.numel()).view(supermask.grid), shape, supermask.tile)
    expected.view(-1).index_add_(0, index.flatten(), (upstream * weight.detach()).flatten())
    torch.testing.assert_close(supermask.scores.grad, expected)


def test_tile_sums_accumulate_half_precision_in_float32() -> None:
    ones = torch.ones(4096, 2, dtype=torch.float16)
    assert tile_sums(ones, (4096, 2)).item() == 8192
    assert tile_sums(ones, (4096, 2)).dtype == torch.float32


def test_a_tile_is_cut_over_channels_only() -> None:
    assert tile_of((64, 32, 3, 3), 16) == (16, 16, 3, 3)
    assert tile_grid((64, 20, 3, 3), (16, 16, 3, 3)) == (4, 2, 1, 1)


def test_nothing_larger_than_the_weight_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask = torch.ones(64, 64), torch.ones(4, 4)
    sizes: list[int] = []
    original = torch.Tensor.repeat_interleave

    def recording(self: torch.Tensor, *args: int) -> torch.Tensor:
        spread = original(self, *args)
        sizes.append(spread.numel())
        return spread

    monkeypatch.setattr(torch.Tensor, "repeat_interleave", recording)
    mask_tiles(weight, mask, (16, 16))
    assert sizes == [weight.numel() // 16]


def test_the_mask_is_computed_only_when_scores_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(scores: torch.Tensor, live: int, keep_ties: bool = False) -> torch.Tensor:
        calls.append(live)
        return threshold(scores, live, keep_ties)

    monkeypatch.setattr(masks_module, "threshold", counting)
    weight = torch.randn(32, 32)
    supermask = Supermask(weight, TileSparsity(0.5, 8))
    for _ in range(3):
        supermask(weight)
    assert len(calls) == 1
    with torch.no_grad():
        supermask.scores.neg_()
    supermask(weight)
    assert len(calls) == 2
    supermask.scores = nn.Parameter(torch.rand(4, 4))
    supermask(weight)
    assert len(calls) == 3
    supermask.live = 3
    assert int(supermask.mask().sum()) == 3


def test_a_copy_does_not_inherit_a_stale_mask() -> None:
    supermask = Supermask(torch.randn(32, 32), TileSparsity(0.5, 8))
    supermask.mask()
    twin = copy.deepcopy(supermask)
    with torch.no_grad():
        twin.scores.neg_()
    assert torch.equal(twin.mask(), threshold(twin.scores, twin.live))


def test_a_mask_cached_in_inference_mode_serves_training() -> None:
    weight = torch.randn(32, 32, requires_grad=True)
    supermask = Supermask(weight, TileSparsity(0.5, 8))
    with torch.inference_mode():
        supermask(weight)
    supermask(weight).sum().backward()
    assert weight.grad is not None


def test_scores_start_at_the_tiles_relative_magnitude() -> None:
    weight = torch.ones(8, 8)
    weight[:4, :4] = 3.0
    scores = Supermask(weight, TileSparsity(0.75, 4)).scores
    torch.testing.assert_close(scores / scores[1, 1], torch.tensor([[3.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize(
    "weight", [torch.tensor(1.0), torch.zeros(0, 4), torch.ones(4, 4, dtype=torch.int64), torch.ones(4, 4).cfloat()]
)
def test_a_weight_that_cannot_be_masked_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(
        ModelError, match="a mask needs a weight of floating point, of one dimension or more and not empty"
    ):
        Supermask(weight, TileSparsity(0.5, 2))


def test_a_mask_is_of_one_shape() -> None:
    mask = Supermask(torch.randn(64, 64), TileSparsity(0.5, 16))
    for shape in ((32, 64), (64, 128), (64,)):
        with pytest.raises(ModelError, match="the mask is of a weight of 64 × 64, got one of"):
            mask(torch.randn(shape))


def test_a_target_and_a_tile_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the target must be a TileSparsity\(sparsity, tile_size\), got 0\.5"):
        Supermask(torch.randn(8, 8), 0.5)  # type: ignore[arg-type]
    for tile in ((0, 4), (-1, 4), (4,), (4, 4, 4), (4, 4.0), 4, "44"):
        with pytest.raises(ConfigError, match="a tile of this weight is 2 whole numbers of at least 1, got"):
            Supermask(torch.randn(8, 8), TileSparsity(0.5, 4), tile=tile)  # type: ignore[arg-type]


def test_frozen_scores_get_no_gradient() -> None:
    weight = torch.randn(16, 16, requires_grad=True)
    supermask = Supermask(weight, TileSparsity(0.5, 8))
    supermask.scores.requires_grad_(False)
    supermask(weight).sum().backward()
    assert supermask.scores.grad is None

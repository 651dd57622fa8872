"""Masks that grow while their model trains: how many tiles live when, which ones, and when that ends."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from few_digits import few_digits  # noqa: F401 (a fixture)
from torch import nn
from torch.nn.utils import parametrizations

from superblock import SupermaskConfig, TileSparsity, apply_supermask
from superblock.masks import Supermask, tile_magnitudes
from superblock.surgery import masked_weights
from superblock.training import AverageConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig, fit
from superblock.training.ramp import Ramp, ramped

MASKS = SupermaskConfig(linear=TileSparsity(0.75, 2))


def masked(*, sparsity: float = 0.75) -> tuple[nn.Sequential, Supermask]:
    """A layer of 4 × 5 tiles, the last column partial."""
    model = nn.Sequential(nn.Linear(9, 8))
    apply_supermask(model, SupermaskConfig(linear=TileSparsity(sparsity, 2)))
    (mask,) = (mask for *_, mask in masked_weights(model))
    return model, mask


def original(model: nn.Sequential) -> nn.Parameter:
    return model[0].parametrizations.weight.original


def test_sparsity_rises_by_a_cube() -> None:
    assert [ramped(0.8, share) for share in (0.0, 0.5, 1.0, 2.0)] == [0.0, 0.8 * 0.875, 0.8, 0.8]


def test_the_largest_tiles_stay_and_are_left_alone_in_the_end() -> None:
    model, mask = masked()
    ramp = Ramp(model, 1.5)
    assert not mask.scores.requires_grad
    living: list[int] = []
    ended: list[tuple[torch.Tensor, torch.Tensor]] = []
    for epoch in range(3):
        ramp.begin_epoch(epoch, 2)
        living.append(int(mask.mask().sum()))
        for update in range(2):
            with torch.no_grad():
                original(model).normal_()
            ramp.step()
            if epoch == 0:
                magnitudes = tile_magnitudes(original(model), (2, 2))
                assert torch.equal(mask.scores, magnitudes)
                assert magnitudes[mask.mask()].min() > magnitudes[~mask.mask()].max()
            if (epoch, update) == (1, 0):
                ended.append((mask.scores.clone(), mask.mask().clone()))
    assert living == [20, round((1 - 0.75 * (1 - (1 / 3) ** 3)) * 20), 5]
    scores, final = ended[0]
    assert torch.equal(mask.scores, scores)
    assert torch.equal(mask.mask(), final)
    assert int(final.sum()) == 5


def test_every_update_of_the_ramp_takes_its_share() -> None:
    model, mask = masked()
    ramp = Ramp(model, 1.0)
    ramp.begin_epoch(0, 4)
    found = []
    for _ in range(4):
        ramp.step()
        found.append(mask.live)
    assert found == [round((1 - ramped(0.75, update / 4)) * 20) for update in (1, 2, 3, 4)]


def test_magnitudes_are_of_whole_and_partial_tiles_alike() -> None:
    weight = torch.ones(3, 4)
    weight[2, :2] = 2.0
    expected = torch.tensor([[1.0, 1.0], [2.0, 1.0]]) / math.sqrt(18 / 12)
    torch.testing.assert_close(tile_magnitudes(weight, (2, 2)), expected)


def test_a_ramp_of_no_length_keeps_the_masks() -> None:
    model, mask = masked()
    before = mask.mask().clone()
    with torch.no_grad():
        original(model).normal_()
    ramp = Ramp(model, 0.0)
    ramp.begin_epoch(0, 1)
    ramp.step()
    assert torch.equal(mask.mask(), before)


def test_the_average_has_the_same_masks() -> None:
    model, mask = masked()
    average = copy.deepcopy(model)
    (follower,) = (mask for *_, mask in masked_weights(average))
    ramp = Ramp(model, 1.0, average)
    ramp.begin_epoch(0, 2)
    assert mask.live == follower.live == 20
    with torch.no_grad():
        original(model).normal_()
    ramp.step()
    assert mask.live == follower.live == round((1 - ramped(0.75, 0.5)) * 20)
    assert torch.equal(follower.mask(), mask.mask())
    ramp.step()
    assert mask.live == follower.live == 5
    assert torch.equal(follower.mask(), mask.mask())


def test_a_mask_measures_the_weight_that_it_is_given() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8, bias=False)))
    apply_supermask(model, MASKS)
    ramp = Ramp(model, 1.0)
    ramp.begin_epoch(0, 1)
    norms, directions = (model[0].parametrizations.weight.get_parameter(f"original{at}") for at in (0, 1))
    with torch.no_grad():
        norms.copy_(torch.arange(1.0, 9.0)[:, None])
    ramp.step()
    weight = norms * directions / directions.norm(dim=1, keepdim=True)
    (mask,) = (mask for *_, mask in masked_weights(model))
    torch.testing.assert_close(mask.scores.detach(), tile_magnitudes(weight, (2, 2)))


def run(folder: Path | None = None, **changes: object) -> TrainConfig:
    options: dict[str, object] = {
        "model": "vit_digits",
        "supermask": SupermaskConfig(linear=TileSparsity(0.9, 16)),
        "data": DataConfig(dataset="digits", batch_size=16),
        "optimizer": OptimizerConfig(name="adamw", lr=1e-3),
        "schedule": ScheduleConfig(name="cosineannealinglr"),
        "epochs": 4,
        "output_dir": None if folder is None else str(folder),
    }
    return TrainConfig(**{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.usefixtures("few_digits")
def test_a_run_ramps_and_its_masks_are_kept_by_a_run_from_its_weights(tmp_path: Path) -> None:
    first = fit(run(tmp_path, average=AverageConfig(steps=1, decay=0.9)), quiet=True)
    assert first.average is not None
    for (*_, mask), (*_, follower) in zip(masked_weights(first.model), masked_weights(first.average), strict=True):
        assert torch.equal(mask.mask(), follower.mask())
    sparsities = [record["masked_sparsity"] for record in first.history]
    assert 0.7 < sparsities[0] < 0.85 < sparsities[1] == sparsities[2] == sparsities[3]
    changed = [record["tiles_changed"] for record in first.history]
    assert changed[0] > 0.7
    assert changed[2:] == [0, 0]
    second = fit(run(weights_path=str(tmp_path / "checkpoint.pth"), supermask=SupermaskConfig(), epochs=2), quiet=True)
    assert [record["tiles_changed"] for record in second.history] == [0, 0]
    assert [record["masked_sparsity"] for record in second.history] == sparsities[2:]


@pytest.mark.usefixtures("few_digits")
def test_scores_with_a_rate_of_their_own_are_trained_without_a_ramp() -> None:
    result = fit(run(optimizer=OptimizerConfig(name="adamw", lr=1e-3, score_lr=0.1), epochs=2), quiet=True)
    assert [round(record["masked_sparsity"], 2) for record in result.history] == [0.9, 0.9]
    assert all(mask.scores.requires_grad for *_, mask in masked_weights(result.model))
    assert all(record["tiles_changed"] > 0 for record in result.history)

"""The original SuperBlock's masks, outputs, gradients and logits come out equal, and its checkpoints load."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from superblock import SupermaskConfig, TileSparsity, sparsify_weights, to_bsr
from superblock.errors import CheckpointError, ConfigError
from superblock.masks import threshold
from superblock.original import is_original, load_layer, load_original
from superblock.rules import make_mask, original_live_tiles
from superblock.surgery import masked_weights, supermask_report

VisionTransformer = pytest.importorskip("torchvision").models.VisionTransformer

DATA = Path(__file__).parent / "data" / "original"
CASES = torch.load(DATA / "cases.pt", weights_only=True)
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def flags_of(case: dict[str, Any]) -> SupermaskConfig:
    return SupermaskConfig(
        linear=TileSparsity(case["sparsity_linear"], case["sp_linear_tile_size"]),
        skip_last_layer=case["skip_last_layer_sparsity"],
        skip_first_transformer=case["skip_first_transformer_sparsity"],
    )


@pytest.mark.parametrize("case", CASES["linear"])
def test_linear_layers_give_the_original_masks_outputs_and_gradients(case: dict[str, Any]) -> None:
    layer = nn.Linear(case["in_features"], case["out_features"], bias=case["bias"])
    load_layer(layer, case["state_dict"], case["sparsity"], case["tile_size"])
    x = case["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(case["grad_y"])
    chain = layer.parametrizations.weight
    assert torch.equal(layer.weight != 0, case["mask"])
    for got, expected in (
        (y, case["y"]),
        (x.grad, case["grad_x"]),
        (chain.original.grad, case["grad_weight"]),
        (chain[0].scores.grad, case["grad_scores"]),
    ):
        torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("case", CASES["conv"])
def test_convolutions_give_the_original_outputs(case: dict[str, Any]) -> None:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
    layer = nn.Conv2d(**{name: case[name] for name in names})
    load_layer(layer, case["state_dict"], case["sparsity"], case["tile_size"])
    torch.testing.assert_close(layer(case["x"]), case["y"], **TOLERANCE)
    sparsify_weights(layer)
    torch.testing.assert_close(layer(case["x"]), case["y"], **TOLERANCE)


@pytest.mark.parametrize("case", CASES["vit"])
@torch.inference_mode()
def test_vision_transformers_give_the_original_logits_in_every_form(case: dict[str, Any]) -> None:
    model = VisionTransformer(**case["model_kwargs"]).eval()
    translation = load_original(model, case["state_dict"], flags_of(case))
    torch.testing.assert_close(model(case["x"]), case["logits"], **TOLERANCE)
    sparsify_weights(model)
    torch.testing.assert_close(model(case["x"]), case["logits_offline"], **TOLERANCE)
    to_bsr(model)
    torch.testing.assert_close(model(case["x"]), case["logits_offline"], **TOLERANCE)
    assert "attention projections carry scores that the original never applied" in translation.notices[0]


@pytest.mark.parametrize("shape", [(20, 12), (7, 5, 3, 3), (6, 2, 3, 3), (9, 4, 1, 1), (3, 1)])
@pytest.mark.parametrize("tile_size", [1, 2, 3, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("ties", [False, True])
def test_masks_follow_the_original_rule(shape: tuple[int, ...], tile_size: int, sparsity: float, ties: bool) -> None:
    weight = torch.randn(shape)
    mask = make_mask(weight, TileSparsity(sparsity, tile_size), "original")
    scores = torch.randn(mask.grid)
    if ties:
        scores = scores.mul(2).round()
    mask.scores.data.copy_(scores)
    torch.testing.assert_close(mask(weight), weight * original_mask(scores, shape, tile_size, sparsity))


@pytest.mark.parametrize(
    ("tiles", "sparsity", "live"), [(16, 0.7, 5), (10, 0.95, 2), (2, 0.9, 2), (1, 0.9, 1), (32, 0, 32)]
)
def test_how_many_tiles_reach_the_original_threshold(tiles: int, sparsity: float, live: int) -> None:
    assert original_live_tiles(tiles, sparsity) == live


def test_ties_at_the_threshold_all_live() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0], [1.0, 0.0, 2.0]])
    mask = make_mask(torch.ones(4, 6), TileSparsity(0.5, 2), "original")
    assert mask.live == 6 - round(0.5 * 5)
    assert threshold(scores, mask.live, mask.keep_ties).tolist() == [[True, True, True], [True, False, True]]


def test_shift_and_scale_are_folded_into_the_weight() -> None:
    weight, scores = torch.randn(8, 12), torch.randn(2, 3)
    state = {"weight": weight, "scores": scores, "shift": torch.tensor([0.5]), "scale": torch.tensor([-2.0])}
    layer = nn.Linear(12, 8, bias=False)
    assert load_layer(layer, state, 0.5) is layer
    expected = (weight * -2 + 0.5) * original_mask(scores, (8, 12), 4, 0.5)
    torch.testing.assert_close(layer.weight, expected)


def test_a_target_that_would_empty_a_layer_is_lowered() -> None:
    layer = nn.Linear(8, 8)
    state = {**dense_state(layer), "scores": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), **identity()}
    load_layer(layer, state, 1.0, 4)
    assert (layer.weight != 0).sum() == 2 * 16
    assert supermask_report(layer).layers[0].note == "too small for its target: 2 of 4 tiles must live"


def test_the_tile_is_read_off_the_scores_where_they_leave_one_choice() -> None:
    layer = nn.Linear(64, 64)
    load_layer(layer, {**dense_state(layer), "scores": torch.randn(4, 4), **identity()}, 0.5)
    (mask,) = (mask for *_, mask in masked_weights(layer))
    assert mask.tile == (16, 16)


@pytest.mark.parametrize(
    ("tile_size", "grid", "message"),
    [
        (None, (2, 2), r"\(\(30, 40\) has \(2, 2\)\): expected one of 20, 21, 22, .*, it is not known"),
        (8, (1, 1), r"expected one of 40, got 8"),
        (8, (5, 1), r"expected none does, got 8"),
    ],
)
def test_a_tile_that_does_not_explain_the_scores_is_refused(
    tile_size: int | None, grid: tuple[int, int], message: str
) -> None:
    layer = nn.Linear(40, 30)
    state = {**dense_state(layer), "scores": torch.randn(grid), **identity()}
    with pytest.raises(ConfigError, match=message):
        load_layer(layer, state, 0.5, tile_size)


def test_a_checkpoint_is_recognised_by_its_keys() -> None:
    case = CASES["vit"][0]
    assert is_original(case["state_dict"])
    assert not is_original(VisionTransformer(**case["model_kwargs"]).state_dict())


def test_swins_attention_stays_dense_for_it_reads_its_weights_directly_too() -> None:
    from torchvision.models import SwinTransformer

    options = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": [4, 4]}
    dense = SwinTransformer(**options, num_classes=5)
    state = dense_state(dense)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear):
            grid = [math.ceil(side / 4) for side in module.weight.shape]
            state |= {f"{name}.{key}": value for key, value in {"scores": torch.randn(grid), **identity()}.items()}
    model = SwinTransformer(**options, num_classes=5)
    flags = SupermaskConfig(linear=TileSparsity(0.5, 4))
    translation = load_original(model, state, flags)
    masked = {name for name, *_ in masked_weights(model)}
    assert masked == {*(f"features.1.{block}.mlp.{layer}" for block in (0, 1) for layer in (0, 3)), "head"}
    assert translation.notices[0].startswith("4 attention projections")
    for name in ("qkv", "proj"):
        attention = f"features.1.0.attn.{name}.weight"
        assert torch.equal(model.get_parameter(attention), dense.get_parameter(attention))


def test_flags_are_asked_for_where_nothing_says_the_sparsity() -> None:
    case = CASES["vit"][0]
    with pytest.raises(ConfigError, match="does not say how sparse they are: give --sparsity-linear"):
        load_original(VisionTransformer(**case["model_kwargs"]), case["state_dict"])


def test_flags_that_leave_a_masked_layer_dense_are_refused() -> None:
    case = CASES["vit"][0]
    flags = SupermaskConfig(linear=TileSparsity(0.8, 16), skip_last_layer=True)
    with pytest.raises(ConfigError, match=r"the flags leave heads\.head dense, the checkpoint masks it"):
        load_original(VisionTransformer(**case["model_kwargs"]), case["state_dict"], flags)


def test_flags_for_layers_that_the_checkpoint_does_not_mask_are_refused() -> None:
    case = CASES["vit"][0]
    flags = SupermaskConfig(linear=TileSparsity(0.8, 16), conv=TileSparsity(0.5, 4))
    with pytest.raises(ConfigError, match="the flags give other convolutions a sparsity, the checkpoint masks none"):
        load_original(VisionTransformer(**case["model_kwargs"]), case["state_dict"], flags)


def test_another_models_checkpoint_names_its_keys() -> None:
    case = CASES["vit"][0]
    other = VisionTransformer(**{**case["model_kwargs"], "num_layers": 2})
    with pytest.raises(CheckpointError, match=r"unknown \(encoder\.layers\.encoder_layer_2\.ln_1\.weight, .*…\)"):
        load_original(other, case["state_dict"], flags_of(case))


def original_mask(scores: Tensor, shape: tuple[int, ...], tile_size: int, sparsity: float) -> Tensor:
    """The rule as the reference's README states it, written out."""
    count = scores.numel()
    rank = 1 + round(0.01 * (min(sparsity, 1 - 1 / count) * 100) * (count - 1))
    mask = (scores >= scores.flatten().sort().values[rank - 1]).float()
    assert scores.shape == tuple(math.ceil(side / tile_size) for side in shape)
    for dim, side in enumerate(shape):
        mask = mask.repeat_interleave(tile_size, dim).narrow(dim, 0, side)
    return mask


def dense_state(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


def identity() -> dict[str, Tensor]:
    return {"shift": torch.zeros(1), "scale": torch.ones(1)}


def test_the_documented_example_runs() -> None:
    document = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/checkpoints.md", "exec"), names)
    assert (names["layer"].weight == 0).float().mean() > 0.7

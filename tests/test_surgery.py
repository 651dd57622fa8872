"""Masks on whole models: what survives, what folds, what is reported."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from networks import ConvNet, FeedForward, Tied, Transformer
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from superblock import SupermaskConfig, TileSparsity, apply_supermask, score_parameters, sparsify_weights
from superblock.errors import ModelError
from superblock.surgery import masked_weights, supermask_report

LINEAR = SupermaskConfig(linear=TileSparsity(0.75, 8))
EVERYTHING = SupermaskConfig(
    linear=TileSparsity(0.75, 8), conv1x1=TileSparsity(0.5, 4), conv=TileSparsity(0.5, 4), skip_last_layer=True
)
IMAGES = torch.randn(2, 3, 9, 9)
TOKENS = torch.randn(2, 5, 12)


def encoder(width: int = 16) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CASES = [
    (Transformer, LINEAR, TOKENS),
    (ConvNet, EVERYTHING, IMAGES),
    (encoder, LINEAR, torch.randn(2, 5, 16)),
    (Tied, LINEAR, torch.randint(0, 40, (2, 5))),
]


def masked(build: type, config: SupermaskConfig) -> nn.Module:
    model = build()
    apply_supermask(model, config)
    return model


@pytest.mark.parametrize(("build", "config", "x"), CASES)
def test_folding_changes_no_output_and_leaves_plain_parameters(
    build: type, config: SupermaskConfig, x: torch.Tensor
) -> None:
    model = masked(build, config).eval()
    before = model(x)
    report = sparsify_weights(model)
    torch.testing.assert_close(model(x), before)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert set(model.state_dict()) == set(build().state_dict())
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters() if parameter.dim() > 1)
    assert zeros >= sum(layer.zeros for layer in report.layers) > 0


@pytest.mark.parametrize(("build", "config", "x"), CASES)
def test_every_parameter_and_every_score_gets_a_gradient(build: type, config: SupermaskConfig, x: torch.Tensor) -> None:
    model = masked(build, replace(config, linear=TileSparsity(0.5, 4)))
    y = model(x)
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert all(scores.grad.abs().sum() > 0 for scores in score_parameters(model))  # type: ignore[union-attr]


@pytest.mark.parametrize(("build", "config", "x"), CASES)
def test_folding_a_copy_leaves_the_original_and_its_ema_whole(
    build: type, config: SupermaskConfig, x: torch.Tensor
) -> None:
    model = masked(build, config).eval()
    ema = AveragedModel(model).eval()
    before = model(x)
    twin = copy.deepcopy(model)
    sparsify_weights(twin)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(ema(x), before)
    torch.testing.assert_close(copy.deepcopy(model)(x), before)
    folded_ema = copy.deepcopy(ema.module)
    sparsify_weights(folded_ema)
    torch.testing.assert_close(folded_ema(x), before)
    torch.testing.assert_close(ema(x), before)
    sparsify_weights(model)
    torch.testing.assert_close(ema(x), before)


def test_a_state_dict_round_trips_with_its_masks() -> None:
    source, target = masked(Transformer, LINEAR), masked(Transformer, LINEAR)
    with torch.no_grad():
        for scores in score_parameters(source):
            scores.uniform_()
    target(TOKENS)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(TOKENS), source(TOKENS))


def test_training_mode_dtype_and_requires_grad_survive() -> None:
    model = Transformer().to(torch.bfloat16).eval()
    model.head.weight.requires_grad_(False)
    model.blocks[0].train()
    modes = {name: module.training for name, module in model.named_modules()}
    apply_supermask(model, LINEAR)
    assert {name: model.get_submodule(name).training for name in modes} == modes
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not model.head.parametrizations.weight.original.requires_grad
    sparsify_weights(model)
    assert {name: model.get_submodule(name).training for name in modes} == modes
    assert not model.head.weight.requires_grad


def test_the_parameter_object_survives_so_optimizers_keep_it() -> None:
    model = Transformer()
    before = {id(parameter) for parameter in model.parameters()}
    apply_supermask(model, LINEAR)
    scores = {id(scores) for scores in score_parameters(model)}
    assert {id(parameter) for parameter in model.parameters()} - scores == before


def test_a_tied_weight_has_one_mask_and_stays_tied() -> None:
    model = masked(Tied, LINEAR)
    head, embedding = model.head.parametrizations.weight, model.embedding.parametrizations.weight
    assert head.original is embedding.original
    assert head[0] is embedding[0]
    assert [layer.name for layer in supermask_report(model).layers] == ["hidden", "head"]
    sparsify_weights(model)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype: torch.dtype) -> None:
    model = masked(Transformer, LINEAR)
    with torch.autocast("cpu", dtype):
        y = model(TOKENS)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(scores.grad.dtype == torch.float32 for scores in score_parameters(model))  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_masked_transformer_compiles_whole(mode: str) -> None:
    model = masked(encoder, LINEAR).train(mode == "train")
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    if mode == "train":
        compiled(x).sum().backward()
        assert all(scores.grad is not None for scores in score_parameters(model))


def test_a_mask_on_top_of_another_parametrization_applies_and_folds() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    apply_supermask(model, LINEAR)
    x = torch.randn(3, 16)
    before = model(x)
    sparsify_weights(model)
    torch.testing.assert_close(model(x), before)
    assert int((model[0].weight == 0).sum()) == 192


def test_convolutions_behave_as_torchs_own_with_the_mask_multiplied_in() -> None:
    model = ConvNet()
    plain = copy.deepcopy(model)
    apply_supermask(model, EVERYTHING)
    for name, _, _, mask in masked_weights(model):
        weight = plain.get_submodule(name).weight
        spread = mask.mask()
        for dim, step in enumerate(mask.tile):
            spread = spread.repeat_interleave(step, dim).narrow(dim, 0, weight.shape[dim])
        weight.data.mul_(spread)
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))


def test_the_report_counts_tiles_weights_and_both_totals() -> None:
    model = FeedForward(24, 50)
    report = apply_supermask(model, SupermaskConfig(linear=TileSparsity(0.75, 16)))
    fc1 = report.layers[0]
    assert (fc1.shape, fc1.tile, fc1.grid, fc1.target) == ((50, 24), (16, 16), (4, 2), 0.75)
    assert fc1.sparsity == 6 / 8
    weight = model.fc1.weight
    assert fc1.zeros == int((weight == 0).sum())
    assert report.parameters == 50 * 24 * 2 + 50 + 24
    assert report.model_sparsity == sum(layer.zeros for layer in report.layers) / report.parameters
    assert report.masked_sparsity == sum(layer.zeros for layer in report.layers) / (2 * 50 * 24)
    assert "sparsity of the 2 masked weights" in str(report)


def test_a_layer_too_small_for_its_target_is_reported() -> None:
    report = apply_supermask(FeedForward(8, 24), SupermaskConfig(linear=TileSparsity(0.9, 16)))
    assert report.layers[0].sparsity == 0.5
    assert report.layers[0].note == "too small for its target: 1 of 2 tiles must live"
    report = apply_supermask(FeedForward(8, 8), SupermaskConfig(linear=TileSparsity(0.4, 8)))
    assert report.notes == (
        "fc1: too small for its target: all 1 tile live",
        "fc2: too small for its target: all 1 tile live",
    )


def test_masking_twice_or_folding_nothing_is_refused() -> None:
    model = masked(Transformer, LINEAR)
    with pytest.raises(ModelError, match="Transformer has Supermasks or folded weights already"):
        apply_supermask(model, LINEAR)
    sparsify_weights(model)
    with pytest.raises(ModelError, match="Transformer has Supermasks or folded weights already"):
        apply_supermask(model, LINEAR)
    with pytest.raises(ModelError, match="Transformer has no masks to fold: call apply_supermask first"):
        sparsify_weights(model)


def test_weights_without_a_shape_or_a_parameter_are_refused() -> None:
    with pytest.raises(ModelError, match="0 is on the meta device, without values: load weights before masking them"):
        apply_supermask(nn.Sequential(nn.Linear(16, 16, device="meta")), LINEAR)
    with pytest.raises(ModelError, match="0 has no shape yet: run one batch"):
        apply_supermask(nn.Sequential(nn.LazyLinear(16)), LINEAR)
    with pytest.warns(FutureWarning, match="weight_norm"):
        hooked = nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 16)))
    with pytest.raises(ModelError, match="0 is computed by a hook, not a parameter"):
        apply_supermask(hooked, LINEAR)

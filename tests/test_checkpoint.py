"""Deployable files: what is saved comes back, is as small as it should be, and damage is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import ConvNet, Tied, Transformer
from safetensors.torch import load_file, save_file
from torch import nn

import superblock as sb
from superblock.checkpoint import describe
from superblock.errors import CheckpointError, ConfigError, ModelError

LINEAR = sb.SupermaskConfig(linear=sb.TileSparsity(0.75, 8))
EVERYTHING = sb.SupermaskConfig(
    linear=sb.TileSparsity(0.5, 8), conv1x1=sb.TileSparsity(0.5, 4), conv=sb.TileSparsity(0.5, 4)
)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def converted(build: type, config: sb.SupermaskConfig = LINEAR) -> nn.Module:
    model = build()
    sb.apply_supermask(model, config)
    sb.sparsify_weights(model)
    sb.to_bsr(model)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "config", "x"),
    [
        (Transformer, LINEAR, torch.randn(2, 5, 12)),
        (ConvNet, EVERYTHING, torch.randn(2, 3, 9, 9)),
        (encoder, LINEAR, torch.randn(2, 5, 16)),
        (encoder, sb.SupermaskConfig(linear=sb.TileSparsity(0.5, 8), include=("*.out_proj",)), torch.randn(2, 5, 16)),
        (Tied, LINEAR, torch.randint(0, 40, (2, 5))),
    ],
)
def test_round_trip(build: type, config: sb.SupermaskConfig, x: torch.Tensor, tmp_path: Path) -> None:
    model = converted(build, config)
    sb.save(model, tmp_path / "model.safetensors", note="kept")
    loaded = sb.load(tmp_path / "model.safetensors", build()).eval()
    state = loaded.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(loaded(x), model(x))  # A dense product may round by where its operands lie in memory.
    assert describe(tmp_path / "model.safetensors")["note"] == "kept"
    assert {key: tensor.shape for key, tensor in loaded.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }


def test_a_folded_model_that_was_not_converted_round_trips(tmp_path: Path) -> None:
    model = Transformer()
    sb.apply_supermask(model, LINEAR)
    sb.sparsify_weights(model)
    sb.save(model, tmp_path / "model.safetensors")
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(sb.load(tmp_path / "model.safetensors", Transformer())(x), model(x))


class InTwoPlaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.sequence = nn.Sequential(nn.Linear(16, 16), nn.GELU(), self.layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.sequence(self.layer(x))
        return y


def test_a_module_in_two_places_round_trips_as_one(tmp_path: Path) -> None:
    model = converted(InTwoPlaces)
    sb.save(model, tmp_path / "model.safetensors")
    loaded = sb.load(tmp_path / "model.safetensors", InTwoPlaces())
    assert loaded.sequence[2] is loaded.layer
    assert isinstance(loaded.layer, sb.BSRLinear)
    x = torch.randn(3, 16)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize(
    ("saved", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64")]
)
@pytest.mark.parametrize("build", [Transformer, encoder, ConvNet])
def test_the_models_dtype_wins(build: type, saved: str, wanted: str, tmp_path: Path) -> None:
    model = converted(build, EVERYTHING).to(getattr(torch, saved))
    sb.save(model, tmp_path / "model.safetensors")
    state = sb.load(tmp_path / "model.safetensors", build().to(getattr(torch, wanted))).state_dict()
    for key, tensor in model.state_dict().items():
        expected = tensor.to(getattr(torch, wanted)) if tensor.is_floating_point() else tensor
        assert state[key].dtype == expected.dtype, key
        assert torch.equal(state[key], expected), key


def test_layers_that_share_their_values_round_trip(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        model[2].weight = model[0].weight
        return model

    model = converted(build)
    sb.save(model, tmp_path / "model.safetensors")
    loaded = sb.load(tmp_path / "model.safetensors", build().bfloat16())
    assert loaded[0].values is loaded[2].values
    assert torch.equal(loaded[0].values, model[2].values.bfloat16())
    assert torch.equal(loaded[2].bias, model[2].bias.bfloat16())


def test_a_bias_that_others_hold_stays_theirs(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(16, 16)
            self.bias = self.decoder.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.decoder(x)
            return y

    model = converted(Head)
    assert model.decoder.bias is model.bias
    sb.save(model, tmp_path / "model.safetensors")
    loaded = sb.load(tmp_path / "model.safetensors", Head())
    assert loaded.decoder.bias is loaded.bias
    assert torch.equal(loaded.bias, model.bias)


def test_the_file_is_near_density_times_dense(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512, bias=False))

    model = converted(build, sb.SupermaskConfig(linear=sb.TileSparsity(0.9, 32)))
    sb.save(model, tmp_path / "model.safetensors")
    dense = 512 * 512 * 4
    assert (tmp_path / "model.safetensors").stat().st_size < dense * 0.11 + 2048


def test_strided_values_are_saved_as_plain_bsr(tmp_path: Path) -> None:
    model = converted(Transformer)
    expected = model.head.values.detach().clone()
    model.head.values = nn.Parameter(expected.mT.contiguous().mT)
    sb.save(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["head.values"], expected)


def test_masks_must_be_folded_first(tmp_path: Path) -> None:
    model = Transformer()
    sb.apply_supermask(model, LINEAR)
    with pytest.raises(ModelError, match="the masks are not folded yet: call sparsify_weights before save"):
        sb.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["format", "version", "layers", "aliases"])
def test_the_files_own_names_are_not_descriptions(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is a name of the file's own \(format, version, layers, aliases\)"):
        sb.save(converted(Transformer), tmp_path / "model.safetensors", **{name: 7})
    assert not list(tmp_path.iterdir())


def test_a_description_is_json(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="note cannot be stored as JSON: Object of type Tensor is not JSON serializable"
    ):
        sb.save(converted(Transformer), tmp_path / "model.safetensors", note=torch.zeros(1))
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"no model at .*: give the path of a .safetensors file"):
        sb.load(path, Transformer())
    sb.save(converted(Transformer), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        sb.load(path, Transformer())
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"was not written by SuperBlock: expected a 'superblock' description"):
        sb.load(path, Transformer())
    save_file({"x": torch.zeros(1)}, path, {"superblock": json.dumps({"version": 99})})
    with pytest.raises(CheckpointError, match="has format version 99, expected 1: upgrade"):
        sb.load(path, Transformer())


def test_another_model_names_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sb.save(converted(Transformer), path)
    with pytest.raises(CheckpointError, match="is of another model than ConvNet: it describes embed"):
        sb.load(path, ConvNet())
    with pytest.raises(CheckpointError, match="another model than Transformer: head is 10 × 24 there and 7 × 24 here"):
        sb.load(path, Transformer(classes=7))
    with pytest.raises(CheckpointError, match="embed is block-sparse already: load into a dense Transformer"):
        sb.load(path, converted(Transformer))


def test_a_damaged_layer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sb.save(converted(Transformer), path)
    description = describe(path)
    tensors = load_file(path)
    tensors["head.col_indices"] = tensors["head.col_indices"] + 100
    save_file(tensors, path, {"superblock": json.dumps(description)})
    with pytest.raises(CheckpointError, match=r"is damaged: head cannot be rebuilt: col_indices must be in \[0, 3\)"):
        sb.load(path, Transformer())


def test_without_an_architecture_a_model_is_needed(tmp_path: Path) -> None:
    sb.save(converted(Transformer), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="names no architecture: pass the dense model as the second argument"):
        sb.load(tmp_path / "model.safetensors")

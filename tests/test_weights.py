"""Every file that weights come in loads through one entry; every bad one is refused in one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, serve
from networks import Transformer
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from superblock import SupermaskConfig, TileSparsity, apply_supermask, save, sparsify_weights, to_bsr
from superblock.errors import CheckpointError, ConfigError
from superblock.files import write_checkpoint
from superblock.weights import load_weights, take_form

ORIGINAL = Path(__file__).parent / "data" / "original"
CONFIG = SupermaskConfig(linear=TileSparsity(0.75, 4), skip_last_layer=True)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 12)


@pytest.fixture
def masked() -> nn.Module:
    model = Transformer()
    apply_supermask(model, CONFIG)
    return model


@pytest.fixture
def checkpoint(masked: nn.Module, tmp_path: Path) -> Path:
    """A training checkpoint whose averaged model differs from the model."""
    average = AveragedModel(masked)
    for parameter in average.module.parameters():
        parameter.data.mul_(0.5)
    content = training_content(masked, CONFIG) | {"model_ema": average.state_dict()}
    write_checkpoint(tmp_path / "checkpoint.pth", content)
    return tmp_path / "checkpoint.pth"


def training_content(model: nn.Module, config: SupermaskConfig) -> dict[str, Any]:
    return {
        "format": "superblock",
        "version": 1,
        "model": model.state_dict(),
        "epoch": 3,
        "config": {"architecture": "transformer", "supermask": config.to_dict()},
    }


def same(a: nn.Module, b: nn.Module, x: torch.Tensor) -> bool:
    return torch.allclose(a(x), b(x), atol=1e-6)


def test_a_training_checkpoint_brings_its_masks(checkpoint: Path, masked: nn.Module, x: torch.Tensor) -> None:
    model = Transformer()
    loaded = load_weights(model, checkpoint)
    assert (loaded.form, loaded.supermask) == ("masked", CONFIG)
    assert loaded.content is not None
    assert loaded.content["epoch"] == 3
    assert same(model, masked, x)


def test_flags_that_agree_with_the_checkpoint_change_nothing(checkpoint: Path) -> None:
    assert load_weights(Transformer(), checkpoint, CONFIG).supermask == CONFIG


def test_the_averaged_model_is_loaded_on_request(checkpoint: Path, masked: nn.Module) -> None:
    model = Transformer()
    load_weights(model, checkpoint, ema=True)
    torch.testing.assert_close(model.head.weight, masked.head.weight / 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            SupermaskConfig(linear=TileSparsity(0.9, 4)),
            r"linear layers sparsity 0\.9 in tiles of 4, .* 0\.75 in tiles of 4",
        ),
        (SupermaskConfig(linear=TileSparsity(0.75, 8)), r"in tiles of 8, .* 0\.75 in tiles of 4"),
        (SupermaskConfig(conv=TileSparsity(0.5)), r"the flags give other convolutions a sparsity, .* masks none"),
        (SupermaskConfig(linear=TileSparsity(0.75, 4), scope="mlp"), r"the flags leave embed dense, .* masks it"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(
    checkpoint: Path, flags: SupermaskConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_weights(Transformer(), checkpoint, flags)


@pytest.mark.parametrize("bsr", [None, 0, 2])
def test_a_deployable_model_brings_its_layers(
    masked: nn.Module, tmp_path: Path, x: torch.Tensor, bsr: int | None
) -> None:
    y = masked(x)
    sparsify_weights(masked)
    if bsr is not None:
        to_bsr(masked, bsr or None)
    save(masked, tmp_path / "model.safetensors", supermask=CONFIG.to_dict())
    model = Transformer()
    loaded = load_weights(model, tmp_path / "model.safetensors", CONFIG)
    assert (loaded.form, loaded.supermask) == ("folded" if bsr is None else "bsr", CONFIG)
    assert "is sparse already" in loaded.notices[0]
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ConfigError, match="the flags give linear layers sparsity"):
        load_weights(Transformer(), tmp_path / "model.safetensors", SupermaskConfig(linear=TileSparsity(0.5, 4)))
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_weights(Transformer(), tmp_path / "model.safetensors", ema=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
)
def test_a_dense_state_takes_the_masks_of_the_flags(wrap: Any, tmp_path: Path, x: torch.Tensor) -> None:
    dense = Transformer()
    torch.save(wrap(dense.state_dict()), tmp_path / "dense.pth")
    model = Transformer()
    assert load_weights(model, tmp_path / "dense.pth").form == "dense"
    assert same(model, dense, x)
    model = Transformer()
    loaded = load_weights(model, tmp_path / "dense.pth", CONFIG)
    assert (loaded.form, loaded.supermask) == ("masked", CONFIG)
    apply_supermask(dense, CONFIG)
    assert same(model, dense, x)


def test_a_plain_safetensors_state_is_a_dense_state(tmp_path: Path, x: torch.Tensor) -> None:
    dense, model = Transformer(), Transformer()
    save_file(dense.state_dict(), tmp_path / "timm.safetensors")
    assert load_weights(model, tmp_path / "timm.safetensors").form == "dense"
    assert same(model, dense, x)


def test_an_original_checkpoint_needs_no_flags() -> None:
    vision = pytest.importorskip("torchvision").models
    case = torch.load(ORIGINAL / "cases.pt", weights_only=True)["vit"][0]
    model = vision.VisionTransformer(**case["model_kwargs"]).eval()
    loaded = load_weights(model, ORIGINAL / "model_3.pth")
    assert loaded.form == "masked"
    assert loaded.content is not None
    assert loaded.content["epoch"] == 3
    assert loaded.supermask is not None
    assert loaded.supermask.linear == TileSparsity(0.8, 16)
    assert "stay dense" in loaded.notices[0]
    torch.testing.assert_close(model(case["x"]), case["logits"], rtol=0, atol=1e-5)


def test_an_original_checkpoint_survives_being_saved_as_ours(tmp_path: Path) -> None:
    vision = pytest.importorskip("torchvision").models
    case = torch.load(ORIGINAL / "cases.pt", weights_only=True)["vit"][0]
    first = load_weights(vision.VisionTransformer(**case["model_kwargs"]), ORIGINAL / "model_3.pth")
    assert first.content is not None
    write_checkpoint(tmp_path / "ours.pth", first.content)
    for ema in (False, True):
        model = vision.VisionTransformer(**case["model_kwargs"]).eval()
        loaded = load_weights(model, tmp_path / "ours.pth", SupermaskConfig(linear=TileSparsity(0.8, 16)), ema=ema)
        assert loaded.supermask == first.supermask
        reference = vision.VisionTransformer(**case["model_kwargs"]).eval()
        load_weights(reference, ORIGINAL / "model_3.pth", ema=ema)
        torch.testing.assert_close(model(case["x"]), reference(case["x"]))


def test_flags_that_contradict_an_original_checkpoint_are_refused() -> None:
    vision = pytest.importorskip("torchvision").models
    kwargs = torch.load(ORIGINAL / "cases.pt", weights_only=True)["vit"][0]["model_kwargs"]
    with pytest.raises(ConfigError, match=r"sparsity 0\.9 in tiles of 16, .*model_3\.pth has 0\.8 in tiles of 16"):
        load_weights(
            vision.VisionTransformer(**kwargs), ORIGINAL / "model_3.pth", SupermaskConfig(linear=TileSparsity(0.9, 16))
        )


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    with serve(Hub({"someone/model": {}})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_a_file_on_the_hub_is_loaded(server: Hub, checkpoint: Path, masked: nn.Module, x: torch.Tensor) -> None:
    server.files["someone/model"]["weights/last.pth"] = checkpoint.read_bytes()
    model = Transformer()
    assert load_weights(model, "hf://someone/model/weights/last.pth").form == "masked"
    assert same(model, masked, x)


def test_another_models_checkpoint_names_its_keys(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of another model than Transformer: keys .* of another shape \(embed"):
        load_weights(Transformer(width=32), checkpoint)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*: give the path of a \.pth or \.safetensors file"):
        load_weights(Transformer(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"fetch it with: superblock download sp0\.80-ts32"):
        load_weights(Transformer(), tmp_path / "superblock-vit-b-16-sp0.80-ts32.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("length", [0, 5, 200, 5000])
def test_a_truncated_file_is_named(checkpoint: Path, masked: nn.Module, suffix: str, length: int) -> None:
    path = checkpoint.with_suffix(suffix)
    if suffix == ".safetensors":
        sparsify_weights(masked)
        save(masked, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"checkpoint.* is truncated or not a"):
        load_weights(Transformer(), path)


class Touching:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_foreign_classes_is_refused_and_never_executed(
    checkpoint: Path, tmp_path: Path, zipped: bool
) -> None:
    content = {"model": Transformer().state_dict(), "args": argparse.Namespace(hook=Touching(tmp_path / "executed"))}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        load_weights(Transformer(), checkpoint)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {"weight": 3}}, {1: torch.zeros(2)}, torch.zeros(2)])
def test_a_file_without_a_model_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth holds no model: expected a state_dict"):
        load_weights(Transformer(), tmp_path / "other.pth")


def test_a_checkpoint_of_a_later_version_is_refused(masked: nn.Module, tmp_path: Path) -> None:
    torch.save({**training_content(masked, CONFIG), "version": 99}, tmp_path / "later.pth")
    with pytest.raises(CheckpointError, match="has format version 99, expected 1: upgrade"):
        load_weights(Transformer(), tmp_path / "later.pth")


def test_averaged_weights_that_are_not_there_are_not_made_up(masked: nn.Module, tmp_path: Path) -> None:
    torch.save(training_content(masked, CONFIG), tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"no averaged weights \(model_ema\): load it without --model-ema"):
        load_weights(Transformer(), tmp_path / "plain.pth", ema=True)


def test_a_model_takes_the_form_asked_for(masked: nn.Module, x: torch.Tensor) -> None:
    y = masked(x)
    assert take_form(masked, sparsify=False, bsr=None) is None
    report = take_form(masked, sparsify=True, bsr=0)
    assert report is not None
    assert {layer.tile for layer in report.layers} == {(4, 4)}
    torch.testing.assert_close(masked(x), y)
    assert take_form(masked, sparsify=True, bsr=0) is None
    with pytest.raises(ConfigError, match="--sparsify-weights has no masks to fold: give --sparsity-linear"):
        take_form(Transformer(), sparsify=True, bsr=None)

"""Models by name: those of torchvision and timm, the small ones, and what is said to a wrong name."""

from __future__ import annotations

import urllib.error

import pytest
import torch

from superblock import models
from superblock.errors import CheckpointError, ConfigError

SPELLED_OUT = "vit:image_size=32,patch_size=8,num_layers=1,num_heads=2,hidden_dim=16,mlp_dim=32"


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_digits", 8), ("vit_fashion", 28), ("shufflenet_v2_x0_5", 64), ("timm:test_vit", 32), (SPELLED_OUT, 16)],
)
def test_a_model_is_built_by_name_for_its_classes_and_images(name: str, size: int) -> None:
    model = models.build(name, num_classes=7, image_size=size).eval()
    with torch.inference_mode():
        assert model(torch.rand(2, 3, size, size)).shape == (2, 7)


def test_a_vit_of_torchvision_takes_another_image_size() -> None:
    with torch.device("meta"):
        model = models.build("vit_b_16", num_classes=10, image_size=32)
    assert model.encoder.pos_embedding.shape[1] == 5  # type: ignore[union-attr]


def test_a_vit_that_is_spelled_out_has_a_size_of_its_own() -> None:
    assert models.native_size(SPELLED_OUT) == 32
    assert models.takes_image_size(SPELLED_OUT)
    assert models.build(SPELLED_OUT).encoder.pos_embedding.shape == (1, 17, 16)  # type: ignore[union-attr]


def test_auxiliary_heads_are_left_out() -> None:
    model = models.build("googlenet", num_classes=3)
    assert isinstance(model.train()(torch.rand(2, 3, 64, 64)), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_b16", r"unknown model 'vit_b16' \(did you mean vit_b_16 or"),
        ("resnet_50", r"did you mean resnet50"),
        ("timm:vit_base_patch16_225", r"did you mean timm:vit_base_patch16_224"),
        ("vit:image_size=32", r"expected vit:image_size=<n>,patch_size=<n>,num_layers=<n>"),
        (SPELLED_OUT.replace("hidden_dim=16", "hidden_dim=wide"), r"expected vit:image_size=<n>"),
        (SPELLED_OUT.replace("image_size=32", "image_size=33"), r"cannot be built"),
        ("zzz", r"unknown model 'zzz': take one of torchvision's, or timm:<name>"),
    ],
)
def test_an_unknown_model_names_close_ones(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_b_16", "unknown weights 'V9' of vit_b_16: there are IMAGENET1K_V1, IMAGENET1K_SWAG_E2E_V1"),
        ("timm:resnet18", "unknown weights 'V9' of timm:resnet18: there are DEFAULT, a1_in1k"),
        ("vit_digits", "no published weights of vit_digits"),
    ],
)
def test_unknown_weights_are_answered_with_those_there_are(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(name, weights="V9")


def test_weights_of_another_number_of_classes_are_refused_before_a_download() -> None:
    with pytest.raises(ConfigError, match=r"resnet18 cannot be built with weights DEFAULT: .*1000 but got 10"):
        models.build("resnet18", num_classes=10, weights="DEFAULT")


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(models.zoo, "get_model", fail)
    with pytest.raises(CheckpointError, match=r"cannot download the weights DEFAULT of resnet18: .*no network"):
        models.build("resnet18", weights="DEFAULT")


def test_sizes_that_a_model_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vit_fashion cannot be built for images of 30×30 \(.*: Input shape indivis"):
        models.build("vit_fashion", image_size=30)
    with pytest.raises(ConfigError, match=r"alexnet cannot take images of 16×16 \(.*\): set --train-crop-size"):
        models.check_image_size(models.build("alexnet"), "alexnet", 16)


def test_pretrained_weights_say_how_images_are_cut_for_them() -> None:
    assert models.preprocessing("efficientnet_b1", "IMAGENET1K_V1") == (256, 240, "bicubic")
    assert models.preprocessing("resnet50", "ResNet50_Weights.IMAGENET1K_V2") == (232, 224, "bilinear")
    assert models.preprocessing("vit_digits", "DEFAULT") is None
    assert models.preprocessing("timm:resnet18", "DEFAULT") is None

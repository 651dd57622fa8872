"""Which layers a configuration means, on models of every style."""

from __future__ import annotations

import pytest
import torch
from networks import ConvNet, FeedForward, Transformer
from torch import nn

from superblock import SupermaskConfig, TileSparsity
from superblock.errors import ConfigError, ModelError
from superblock.targets import feed_forward_layers, first_transformer_block, select, weight_sites

HALF = TileSparsity(0.5, 4)
torchvision = pytest.importorskip("torchvision", reason="needs the vision extra")
timm = pytest.importorskip("timm", reason="needs the vision extra")


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
    )


def chosen(model: nn.Module, **options: object) -> list[str]:
    return [site.name for site in select(model, SupermaskConfig(**options))]  # type: ignore[arg-type]


def test_every_kind_of_layer_is_found_with_its_kind() -> None:
    kinds = {site.name: site.kind for site in weight_sites(ConvNet())}
    assert kinds == {
        "stem": "conv",
        "depthwise": "conv",
        "pointwise": "conv1x1",
        "grouped": "conv",
        "grouped1x1": "conv1x1",
        "head": "linear",
    }


def test_both_projections_of_torchs_attention_are_found() -> None:
    names = chosen(tiny_vit(), linear=HALF)
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in names
    assert "encoder.layers.encoder_layer_0.self_attention.out_proj" in names


def test_separate_projections_are_found() -> None:
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, kdim=8, vdim=12)})
    assert chosen(attention, linear=HALF) == [
        "attn.q_proj_weight",
        "attn.k_proj_weight",
        "attn.v_proj_weight",
        "attn.out_proj",
    ]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Transformer, ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        (
            tiny_vit,
            [f"encoder.layers.encoder_layer_{layer}.mlp.{linear}" for layer in (0, 1) for linear in (0, 3)],
        ),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False),
            ["layers.0.linear1", "layers.0.linear2"],
        ),
        (lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), ["0", "2"]),
    ],
)
def test_scope_mlp_keeps_to_feed_forward_layers(build: type, expected: list[str]) -> None:
    assert chosen(build(), linear=HALF, scope="mlp") == expected


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("vit_tiny_patch16_224", "blocks.0.mlp.fc1", "blocks.0.attn.qkv"),
        ("mixer_s32_224", "blocks.0.mlp_tokens.fc1", "head"),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.mlp.fc2", "layers.0.blocks.0.attn.proj"),
        ("convnext_atto", "stages.0.blocks.0.mlp.fc1", "stem.0"),
        ("eva02_tiny_patch14_224", "blocks.0.mlp.fc1", "blocks.0.attn.qkv"),
    ],
)
def test_scope_mlp_on_timm_models(name: str, inside: str, outside: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = feed_forward_layers(model)
    assert inside in layers
    assert outside not in layers


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("maxvit_t", "blocks.0.layers.0.layers.window_attention.mlp_layer.1", "attn_layer.1.to_qkv"),
        ("swin_v2_t", "features.1.0.mlp.0", "features.1.0.attn.qkv"),
        ("convnext_tiny", "features.1.0.block.3", "features.1.0.block.0"),
    ],
)
def test_scope_mlp_on_torchvision_models(name: str, inside: str, outside: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    layers = feed_forward_layers(model)
    assert inside in layers
    assert not any(layer.endswith(outside) for layer in layers)


def test_the_last_linear_layer_and_the_first_block_can_stay_dense() -> None:
    names = chosen(Transformer(), linear=HALF, skip_last_layer=True, skip_first_transformer=True)
    assert names == ["embed", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


def test_the_first_block_of_torchvision_and_timm() -> None:
    assert first_transformer_block(tiny_vit()) == "encoder.layers.encoder_layer_0"
    with torch.device("meta"):
        assert first_transformer_block(timm.create_model("vit_tiny_patch16_224")) == "blocks.0"
        assert first_transformer_block(timm.create_model("swin_tiny_patch4_window7_224")) == "layers.0.blocks.0"
    assert first_transformer_block(ConvNet()) is None


def test_patterns_choose_by_name() -> None:
    assert chosen(Transformer(), linear=HALF, include=("blocks.*.mlp.*",), exclude=("*.fc2",)) == [
        "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc1",
    ]


def test_a_pattern_without_a_match_lists_what_there_was() -> None:
    with pytest.raises(ConfigError, match=r"pattern 'fc9' matches no layer; there were: fc1 \(linear\), fc2"):
        chosen(FeedForward(), linear=HALF, exclude=("fc9",))


def test_nothing_to_mask_lists_what_there_was() -> None:
    with pytest.raises(ModelError, match=r"nothing to mask in FeedForward; there were: fc1 \(linear\), fc2 \(linear\)"):
        chosen(FeedForward(), conv=HALF)
    with pytest.raises(ModelError, match="it has no linear layer and no convolution"):
        chosen(nn.ReLU(), linear=HALF)


def test_no_transformer_block_to_skip_is_an_error() -> None:
    with pytest.raises(ConfigError, match="ConvNet has no transformer block to skip: drop skip_first_transformer"):
        chosen(ConvNet(), conv=HALF, skip_first_transformer=True)

"""Folded models to BSR: same outputs, the right layers, honest notes."""

from __future__ import annotations

import copy

import pytest
import torch
from native_cases import needs_core
from networks import ConvNet, FeedForward, Tied, Transformer
from torch import nn

from superblock import (
    BSRConv2d,
    BSRLinear,
    BSRMultiheadAttention,
    SupermaskConfig,
    TileSparsity,
    apply_supermask,
    sparsify_weights,
    to_bsr,
)
from superblock.errors import ConfigError, ModelError
from superblock.inspection import model_report

LINEAR = SupermaskConfig(linear=TileSparsity(0.75, 8))
CONVOLUTIONS = SupermaskConfig(conv1x1=TileSparsity(0.5, 8), conv=TileSparsity(0.5, 8))
EVERYTHING = SupermaskConfig(linear=TileSparsity(0.5, 8), conv1x1=TileSparsity(0.5, 4), conv=TileSparsity(0.5, 4))
IMAGES, TOKENS = torch.randn(2, 3, 9, 9), torch.randn(2, 5, 12)
torchvision = pytest.importorskip("torchvision", reason="needs the vision extra")
timm = pytest.importorskip("timm", reason="needs the vision extra")


def folded(model: nn.Module, config: SupermaskConfig = LINEAR) -> nn.Module:
    apply_supermask(model, config)
    sparsify_weights(model)
    return model.eval()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def torchvision_model(name: str) -> nn.Module:
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    nn.init.normal_(next(iter(reversed(list(model.parameters())))))
    return model


@pytest.mark.parametrize(
    ("build", "config", "x"),
    [
        (Transformer, LINEAR, TOKENS),
        (ConvNet, EVERYTHING, IMAGES),
        (encoder, LINEAR, torch.randn(2, 5, 16)),
        (encoder, SupermaskConfig(linear=TileSparsity(0.75, 8), scope="mlp"), torch.randn(2, 5, 16)),
        (Tied, LINEAR, torch.randint(0, 40, (2, 5))),
    ],
)
@pytest.mark.parametrize("blocksize", [None, 4, 16])
def test_outputs_agree(build: type, config: SupermaskConfig, x: torch.Tensor, blocksize: int | None) -> None:
    model = folded(build(), config)
    expected = model(x)
    report = to_bsr(model, blocksize)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, BSRLinear) for module in model.modules())
    assert all(layer.target is not None for layer in report.layers)


@pytest.mark.parametrize(
    ("name", "size", "config"),
    [
        ("swin_t", 64, SupermaskConfig(linear=TileSparsity(0.8, 32))),
        ("swin_v2_t", 64, SupermaskConfig(linear=TileSparsity(0.8, 32))),
        ("convnext_tiny", 32, SupermaskConfig(linear=TileSparsity(0.8, 32))),
        ("mobilenet_v2", 32, SupermaskConfig(conv1x1=TileSparsity(0.5, 8))),
        ("resnet18", 40, CONVOLUTIONS),
        ("resnet50", 40, CONVOLUTIONS),
        ("efficientnet_b0", 32, CONVOLUTIONS),
        ("googlenet", 32, CONVOLUTIONS),
        ("regnet_x_400mf", 32, CONVOLUTIONS),
        ("densenet121", 32, CONVOLUTIONS),
    ],
)
def test_torchvision_models_whose_weights_are_read_in_other_ways(name: str, size: int, config: SupermaskConfig) -> None:
    model = folded(torchvision_model(name), config)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        expected = model(x)
        to_bsr(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_timm_models(name: str) -> None:
    kwargs = {"img_size": 28 if "14" in name else 32, "depth": 2, "num_classes": 10}
    model = folded(timm.create_model(name, **kwargs), SupermaskConfig(linear=TileSparsity(0.8, 32)))
    x = torch.randn(1, 3, kwargs["img_size"], kwargs["img_size"])
    with torch.inference_mode():
        expected = model(x)
        to_bsr(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_attention_becomes_block_sparse_in_both_projections() -> None:
    model = folded(encoder())
    to_bsr(model)
    attention = model.layers[0].self_attn
    assert isinstance(attention, BSRMultiheadAttention)
    assert isinstance(attention.in_proj, BSRLinear)
    assert isinstance(attention.out_proj, BSRLinear)


@pytest.mark.parametrize("scope", ["all", "mlp"])
def test_an_encoder_takes_padding_masks(scope: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    dense = folded(nn.TransformerEncoder(layer, 2).eval(), SupermaskConfig(linear=TileSparsity(0.5, 8), scope=scope))
    sparse, x = copy.deepcopy(dense), torch.randn(3, 10, 32)
    to_bsr(sparse)
    padding = torch.zeros(3, 10, dtype=torch.bool)
    padding[0, 7:] = True
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            got, want = (model(x, src_key_padding_mask=padding) for model in (sparse, dense))
            torch.testing.assert_close(got[~padding], want[~padding], rtol=1e-4, atol=1e-5)


def test_half_masked_attention_keeps_the_other_half_dense() -> None:
    config = SupermaskConfig(linear=TileSparsity(0.75, 8), include=("*.in_proj_weight",))
    model = folded(encoder(), config)
    x = torch.randn(2, 5, 16)
    expected = model(x)
    to_bsr(model)
    assert type(model.layers[0].self_attn.out_proj) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_hooks_move_to_the_new_layers() -> None:
    kinds = TileSparsity(0.5, 8)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    apply_supermask(model, SupermaskConfig(linear=kinds, conv1x1=kinds))
    sparsify_weights(model)
    heard = []
    doubles = [model[at].register_forward_hook(lambda module, args, y: 2 * y) for at in (0, 3)]
    model[3].register_forward_pre_hook(lambda module, args, kwargs: heard.append("pre"), with_kwargs=True)
    model[5].register_full_backward_hook(lambda module, *_: heard.append("back"))
    dense, x = copy.deepcopy(model), torch.randn(3, 16, 2, 2)
    to_bsr(model)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    assert heard == ["pre", "pre"]
    model(x).sum().backward()
    assert heard[2:] == ["pre", "back"]
    for handle in doubles:
        handle.remove()
    assert not torch.allclose(model(x), dense(x), rtol=1e-2)


def test_what_has_no_bsr_form_stays_dense_and_says_why() -> None:
    model = folded(ConvNet(), EVERYTHING)
    notes = {layer.name: layer.note for layer in to_bsr(model).layers}
    assert isinstance(model.pointwise, BSRConv2d)
    sides = "stays dense: the native core takes block sides that are multiples of 8, not 4 × 4"
    assert notes["stem"] == notes["grouped"] == notes["grouped1x1"] == sides
    assert notes["pointwise"] == ""


def convolution_notes(config: SupermaskConfig, device: str = "cpu") -> dict[str, str]:
    model = nn.ModuleDict(
        {
            "full": nn.Conv2d(32, 32, 3),
            "few": nn.Conv2d(3, 32, 3),
            "narrow": nn.Conv2d(32, 32, 3, groups=4),
            "narrow1x1": nn.Conv2d(32, 32, 1, groups=4),
            "grouped": nn.Conv2d(32, 32, 3, groups=2),
            "pointwise": nn.Conv2d(32, 32, 1),
        }
    )
    return {layer.name: layer.note for layer in to_bsr(folded(model, config).to(device)).layers}


@needs_core
def test_convolutions_without_a_kernel_say_why() -> None:
    tiles = TileSparsity(0.5, 16)
    notes = convolution_notes(SupermaskConfig(conv1x1=tiles, conv=tiles))
    assert notes["few"] == "stays dense: its 9 living blocks of 16 × 16 would hold more than the dense weight"
    assert notes["narrow"] == "stays dense: the 8 outputs of a group do not divide into blocks of 16"
    assert notes["narrow1x1"] == notes["narrow"]
    assert notes["full"] == notes["grouped"] == notes["pointwise"] == ""


@needs_core
def test_a_convolution_is_reported_alike_by_conversion_and_later() -> None:
    model = folded(nn.Sequential(nn.Conv2d(24, 40, 3)), SupermaskConfig(conv=TileSparsity(0.5, 16)))
    (line,) = to_bsr(model).layers
    (later,) = model_report(model).layers
    assert (line.kind, line.shape, line.grid) == ("conv", (40, 24, 3, 3), (3, 18))
    assert (later.kind, later.shape, later.grid) == (line.kind, line.shape, line.grid)
    assert line.zeros == later.zeros == int((model[0].dense() == 0).sum())


def test_convolutions_on_another_device_stay_dense() -> None:
    tiles = TileSparsity(0.5, 16)
    notes = convolution_notes(SupermaskConfig(conv1x1=tiles, conv=tiles, exclude=("pointwise",)), "meta")
    assert notes["full"] == "stays dense: no kernel for k×k convolutions on meta"
    assert notes["narrow1x1"] == "stays dense: no kernel for grouped convolutions on meta"


@pytest.mark.parametrize(
    ("module", "note"),
    [
        (nn.MultiheadAttention(16, 2, kdim=8), "its query, key and value projections are of different widths"),
        (nn.MultiheadAttention(16, 2, add_bias_kv=True), "it appends to keys and values (add_bias_kv, add_zero_attn)"),
        (type("Lora", (nn.Linear,), {"forward": lambda self, x: x})(16, 16), "Lora has a forward of its own"),
        (type("Own", (nn.MultiheadAttention,), {"forward": lambda self, x: x})(16, 2), "Own has a forward of its own"),
        (type("Conv", (nn.Conv2d,), {"forward": lambda self, x: x})(16, 16, 1), "Conv has a forward of its own"),
        (nn.Conv1d(16, 16, 1), "no BSR form of Conv1d"),
    ],
)
def test_layers_that_cannot_be_swapped_say_why(module: nn.Module, note: str) -> None:
    config = SupermaskConfig(linear=TileSparsity(0.75, 8), conv1x1=TileSparsity(0.75, 8))
    report = to_bsr(folded(nn.Sequential(module), config))
    assert {layer.note for layer in report.layers} == {f"stays dense: {note}"}


def test_a_layer_whose_forward_was_replaced_keeps_it() -> None:
    model = folded(nn.Sequential(nn.Linear(16, 16)))
    model[0].forward = lambda x: x + 1
    assert to_bsr(model).layers[0].note == "stays dense: its forward has been replaced"
    assert model(torch.zeros(1, 16)).eq(1).all()


def test_the_model_itself_cannot_be_swapped() -> None:
    report = to_bsr(folded(nn.Linear(16, 16)))
    assert report.layers[0].note == "stays dense: it is the model itself: wrap it in a module"


def test_partial_edge_blocks() -> None:
    model = folded(FeedForward(24, 50), SupermaskConfig(linear=TileSparsity(0.5, 16)))
    report = to_bsr(model)
    assert report.layers[0].grid == (4, 2)
    zeros = [int((layer.matrix.to_dense() == 0).sum()) for layer in (model.fc1, model.fc2)]
    assert [layer.zeros for layer in report.layers] == zeros


def test_trainability_mode_and_shared_modules_survive() -> None:
    shared = nn.Linear(16, 16)
    shared.weight.requires_grad_(False)
    model = nn.ModuleDict({"a": shared, "b": shared}).eval()
    apply_supermask(model, LINEAR)
    sparsify_weights(model)
    to_bsr(model)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], BSRLinear)
    assert not model["a"].values.requires_grad
    assert not model["a"].training


def tied_linears() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    return model


def test_linear_layers_that_share_a_weight_share_its_values() -> None:
    model = folded(tied_linears())
    x = torch.randn(3, 16)
    expected, dense = model(x), copy.deepcopy(model)
    report = to_bsr(model)
    assert model[0].values is model[2].values
    assert [layer.name for layer in report.layers] == ["0", "4"]
    assert report.parameters == sum(parameter.numel() for parameter in dense.parameters())
    assert model_report(model).totals() == report.totals()
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    dense(x).sum().backward()
    living = dense[0].weight != 0
    torch.testing.assert_close(model[0].dense(model[0].values.grad)[living], dense[0].weight.grad[living])


def test_ties_that_conversion_breaks_are_told() -> None:
    model = folded(Tied())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = to_bsr(model)
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes["embedding"] == "stays dense: no BSR form of Embedding"
    assert notes["head"] == "no longer tied to embedding.weight"
    assert report.parameters == parameters + 40 * 16
    assert 0 < report.model_sparsity <= report.masked_sparsity < 1


def test_convolutions_that_share_a_weight_come_apart_and_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
    model[2].weight = model[0].weight
    report = to_bsr(folded(model, CONVOLUTIONS))
    assert [layer.note for layer in report.layers] == ["", "no longer tied to 0.weight"]
    assert report.parameters == 2 * (16 * 16 + 16)


def test_a_converted_model_trains() -> None:
    model = folded(Transformer()).train()
    to_bsr(model)
    model(TOKENS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_converted_vision_transformer_compiles_and_exports(backend: str) -> None:
    model = folded(
        torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
        )
    )
    nn.init.normal_(model.heads.head.bias)
    to_bsr(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), expected)
    torch.testing.assert_close(torch.export.export(copy.deepcopy(model), (x,)).module()(x), expected)


def test_a_model_without_values_cannot_be_converted() -> None:
    with pytest.raises(ModelError, match=r"0\.weight is on the meta device, without values: load weights first"):
        to_bsr(folded(nn.Sequential(nn.Linear(16, 16))).to("meta"))


def test_order_and_blocks_are_checked_before_anything_changes() -> None:
    model = Transformer()
    with pytest.raises(ModelError, match="Transformer has no folded weights: call apply_supermask and sparsify"):
        to_bsr(model)
    apply_supermask(model, LINEAR)
    with pytest.raises(ModelError, match="the masks are not folded yet: call sparsify_weights before to_bsr"):
        to_bsr(model)
    sparsify_weights(model)
    with pytest.raises(ConfigError, match=r"block 12 and tile 8 of embed\.weight must divide one another"):
        to_bsr(model, 12)
    for block in (0, 16.0, "16", (16, 16), True):
        with pytest.raises(ConfigError, match="block size must be a whole number of at least 1, got"):
            to_bsr(model, block)  # type: ignore[arg-type]
    assert not any(isinstance(module, BSRLinear) for module in model.modules())

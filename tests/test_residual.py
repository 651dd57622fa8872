"""Residual blocks add in their products' epilogues where that is safe, and give the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from native_cases import assert_compiles_whole, needs_core
from test_batch_norm import EVERY, folded
from torch import nn

import superblock as sb
from superblock.nn import BSRConv2d
from superblock.residual import (
    ResidualBlock,
    ResidualConvolutions,
    ResidualEncoderBlock,
    ResidualEncoderLayer,
)
from superblock.scaled import ScaledCNBlock, ScaledConvNeXtBlock

torchvision = pytest.importorskip("torchvision", reason="needs the vision extra")
timm = pytest.importorskip("timm", reason="needs the vision extra")
resnet = torchvision.models.resnet
LINEAR = sb.SupermaskConfig(linear=sb.TileSparsity(0.5, 8))
IMAGES, TOKENS = torch.randn(2, 16, 9, 9), torch.randn(2, 70, 16)


def downsample() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))


def encoder_block() -> nn.Module:
    return torchvision.models.vision_transformer.EncoderBlock(2, 16, 32, 0.1, 0.1)


def torch_layer(**options: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, **{"batch_first": True, **options})


BLOCKS: list[tuple[Callable[[], nn.Module], type, torch.Tensor]] = [
    (lambda: resnet.BasicBlock(16, 32, 2, downsample()), ResidualConvolutions, IMAGES),
    (lambda: resnet.BasicBlock(16, 16), ResidualConvolutions, IMAGES),
    (lambda: resnet.Bottleneck(16, 8, 2, downsample()), ResidualConvolutions, IMAGES),
    (lambda: timm.models.resnet.BasicBlock(16, 16), ResidualConvolutions, IMAGES),
    (lambda: timm.models.resnet.Bottleneck(16, 8, 2, downsample(), act_layer=nn.SiLU), ResidualConvolutions, IMAGES),
    (encoder_block, ResidualEncoderBlock, TOKENS),
    (lambda: timm.models.vision_transformer.Block(16, 2, qkv_bias=True), ResidualBlock, TOKENS),
    (lambda: timm.models.vision_transformer.Block(16, 2, qk_norm=True, init_values=0.1), ResidualBlock, TOKENS),
    (lambda: timm.models.vision_transformer.Block(16, 2, init_values=0.1), ResidualBlock, TOKENS),
    (torch_layer, ResidualEncoderLayer, TOKENS),
    (lambda: torchvision.models.convnext.CNBlock(16, 0.1, 0.1), ScaledCNBlock, IMAGES),
    (lambda: timm.models.convnext.ConvNeXtBlock(16, drop_path=0.1), ScaledConvNeXtBlock, IMAGES),
    (lambda: timm.models.convnext.ConvNeXtBlock(16, ls_init_value=None), ScaledConvNeXtBlock, IMAGES),
    (lambda: torch_layer(norm_first=True, batch_first=False), ResidualEncoderLayer, TOKENS),
]
cases = pytest.mark.parametrize(("build", "kind", "x"), BLOCKS)


def converted(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A folded model of one block, and the same converted."""
    model = nn.Sequential(build(), nn.Identity())  # Blocks alone would run as an encoder.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    folded(model, dataclasses.replace(EVERY, linear=LINEAR.linear) if convolutional else LINEAR)
    twin = copy.deepcopy(model)
    sb.to_bsr(model)
    return twin, model


@needs_core
@cases
def test_the_result_stays(build: Callable[[], nn.Module], kind: type, x: torch.Tensor) -> None:
    twin, model = converted(build)
    assert type(model[0]) is kind
    with torch.no_grad():
        expected = twin(x)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            torch.testing.assert_close(one(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one(x), expected, rtol=1e-4, atol=1e-4)
    grads = []
    for one in (twin, model):
        leaf = x.clone().requires_grad_()
        one(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


@needs_core
@cases
def test_inference_compiles_whole(build: Callable[[], nn.Module], kind: type, x: torch.Tensor) -> None:
    _, model = converted(build)
    assert_compiles_whole(model, x)


@needs_core
@cases
def test_the_product_adds_and_every_hook_is_heard(
    build: Callable[[], nn.Module], kind: type, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin, model = converted(build)
    with torch.inference_mode():
        expected = twin(x)
        additions = []
        monkeypatch.setattr(torch.Tensor, "__add__", lambda a, b: additions.append(1) or torch.add(a, b))
        model(x)
        unscaled = type(model[0]) is ScaledConvNeXtBlock and model[0].gamma is None
        apart = any(
            isinstance(module, nn.LayerNorm) for name, module in model.named_modules() if name.endswith("q_norm")
        )
        assert len(additions) == (1 if unscaled or apart else 0)
        monkeypatch.undo()
        called: dict[str, int] = {}
        wanted: dict[str, int] = {}
        for one, counts in ((twin, wanted), (model, called)):
            for name, module in one[0].named_modules():
                counts[name] = 0

                def count(*_: object, name: str = name, counts: dict[str, int] = counts) -> None:
                    counts[name] += 1

                module.register_forward_hook(count)
        twin(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert all(called[name] == wanted[name] for name in called.keys() & wanted.keys() if wanted[name])


@needs_core
def test_training_drops_out() -> None:
    for build in (encoder_block, torch_layer, lambda: timm.models.vision_transformer.Block(16, 2, drop_path=0.5)):
        _, model = converted(build)
        model.train()
        torch.manual_seed(1)
        dropped = model(TOKENS)
        torch.manual_seed(2)
        assert not torch.equal(model(TOKENS), dropped)


@needs_core
def test_an_attention_that_trains_alone_drops_out() -> None:
    _, model = converted(lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True))
    model.eval()
    attention = model[0].self_attn.train()
    with torch.no_grad():
        for drops in (True, False):
            attention.dropout *= drops
            torch.manual_seed(1)
            dropped = model(TOKENS)
            torch.manual_seed(2)
            assert torch.equal(model(TOKENS), dropped) is not drops


def test_masks_reach_the_attention() -> None:
    later = torch.ones(70, 70, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 70, dtype=torch.bool)
    padding[:, 60:] = True
    twin, model = converted(torch_layer)
    with torch.inference_mode():
        options = {"src_mask": later, "src_key_padding_mask": padding}
        torch.testing.assert_close(model[0](TOKENS, **options), twin[0](TOKENS, **options), rtol=1e-4, atol=1e-4)
        twin, model = converted(lambda: timm.models.vision_transformer.Block(16, 2))
        for options in ({"attn_mask": ~later}, {"is_causal": True}):
            torch.testing.assert_close(model[0](TOKENS, **options), twin[0](TOKENS, **options), rtol=1e-4, atol=1e-4)


def test_blocks_with_more_in_between_stay_as_they_are() -> None:
    squeezed = timm.models.resnet.Bottleneck(16, 8, 2, downsample(), attn_layer="se")
    dropping = timm.models.resnet.BasicBlock(16, 16, drop_path=timm.layers.DropPath(0.1))
    for block in (squeezed, dropping):
        kind = type(block)
        twin, model = converted(lambda block=block: block)
        assert type(model[0]) is kind
        with torch.inference_mode():
            torch.testing.assert_close(model(IMAGES), twin(IMAGES), rtol=1e-4, atol=1e-4)


@needs_core
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_stay_in_channels_last(memory_format: torch.memory_format) -> None:
    model = torchvision.models.resnet18(num_classes=10)
    folded(model, sb.SupermaskConfig(conv1x1=EVERY.conv1x1, conv=EVERY.conv, exclude=("conv1",)))
    sb.to_bsr(model)
    seen = []
    for module in model.modules():
        if isinstance(module, BSRConv2d | nn.MaxPool2d):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(torch.randn(2, 3, 64, 64).to(memory_format=memory_format))
    assert len(seen) == 20
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)


@needs_core
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", [TOKENS, TOKENS.transpose(0, 1)], ids=["contiguous", "transposed"])
def test_dense_attention_beside_a_sparse_feed_forward_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, bias: bool
) -> None:
    model = nn.Sequential(encoder_block())
    model[0].self_attention = nn.MultiheadAttention(16, 2, bias=bias, batch_first=True)
    folded(model, sb.SupermaskConfig(linear=sb.TileSparsity(0.5, 8), scope="mlp"))
    twin = copy.deepcopy(model)
    sb.to_bsr(model)
    calls: list[int] = []
    original = nn.MultiheadAttention.forward

    def counted(*args: object, **options: object) -> object:
        calls.append(1)
        return original(*args, **options)  # type: ignore[arg-type]

    def compare() -> None:
        given = x.clone()
        torch.testing.assert_close(model(given), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(given, x)

    with torch.inference_mode():
        expected = twin(x)
        monkeypatch.setattr(nn.MultiheadAttention, "forward", counted)
        compare()
        assert not calls
        model[0].self_attention.register_forward_hook(lambda *_: None)
        compare()
    compare()
    assert len(calls) == 2


@needs_core
def test_dense_attention_where_its_projection_cannot_add() -> None:
    model = nn.Sequential(encoder_block(), nn.Identity())
    folded(model, sb.SupermaskConfig(linear=sb.TileSparsity(0.5, 8), scope="mlp"))
    sb.to_bsr(model)
    weights = {"0.self_attention.out_proj.weight": torch.randn(3, 16, 16)}

    def run(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, TOKENS)

    with torch.no_grad():
        batch = torch.func.vmap(run)(weights)
        for one, y in zip(weights["0.self_attention.out_proj.weight"], batch, strict=True):
            torch.testing.assert_close(run({"0.self_attention.out_proj.weight": one}), y, rtol=1e-4, atol=1e-4)
        narrow = copy.deepcopy(model)
        narrow[0].self_attention.bfloat16()
        narrow[0].ln_1.register_forward_hook(lambda _, __, y: y.bfloat16())
        torch.testing.assert_close(narrow(TOKENS), model(TOKENS), rtol=0.1, atol=0.1)

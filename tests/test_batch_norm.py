"""Batch norms move into the convolution before them where that changes nothing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from native_cases import needs_core
from torch import nn

import superblock as sb
from superblock.batch_norm import fold_batch_norms
from superblock.nn import BSRConv2d, FoldedBatchNorm
from superblock.ops.convolution import matrix_of

torchvision = pytest.importorskip("torchvision", reason="needs the vision extra")
TILES = sb.TileSparsity(0.5, 8)
EVERY = sb.SupermaskConfig(conv1x1=TILES, conv=TILES)


def randomized(model: nn.Module) -> nn.Module:
    """With batch norms that have learned something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return model


def folded(model: nn.Module, config: sb.SupermaskConfig = EVERY) -> nn.Module:
    sb.apply_supermask(randomized(model), config)
    sb.sparsify_weights(model)
    return model.eval()


def sparse(bias: bool = True) -> BSRConv2d:
    kernel = torch.randn(20, 12, 3, 3)
    return BSRConv2d(matrix_of(kernel, 8), torch.randn(20) if bias else None, kernel_shape=(20, 12, 3, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_stays(bias: bool, affine: bool, dtype: torch.dtype) -> None:
    model = randomized(nn.Sequential(sparse(bias), nn.BatchNorm2d(20, affine=affine), nn.SiLU())).eval()
    x = torch.randn(2, 12, 6, 7)
    expected = model(x)
    assert fold_batch_norms(model.to(dtype)) == {}
    assert isinstance(model[1], FoldedBatchNorm)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model(x.to(dtype)).float(), expected, rtol=tolerance, atol=tolerance)
    assert model[0].values.stride() == (64, 1, 8)
    assert set(dict(model.named_parameters())) == {"0.values", "0.bias"}
    model(x.to(dtype)).sum().backward()
    assert model[0].bias.grad is not None


def test_what_must_stay_does() -> None:
    training = nn.Sequential(sparse(), nn.BatchNorm2d(20))
    notes = fold_batch_norms(training)
    told = "its batch norm stays a layer, for it is in training mode: call eval() before to_bsr"
    assert notes == {id(training[0]): told}
    shared = sparse()
    norm = nn.BatchNorm2d(20)
    twice = nn.Sequential(nn.Sequential(shared, norm), nn.Sequential(shared, nn.BatchNorm2d(20))).eval()
    without = nn.Sequential(sparse(), nn.BatchNorm2d(20, track_running_stats=False)).eval()
    hooked = nn.Sequential(sparse(), nn.BatchNorm2d(20)).eval()
    hooked[1].register_forward_hook(lambda *_: None)
    dense = nn.Sequential(nn.Conv2d(12, 20, 3), nn.BatchNorm2d(20)).eval()
    for model in (training, twice, without, hooked, dense):
        fold_batch_norms(model)
        assert not any(isinstance(module, FoldedBatchNorm) for module in model.modules())


@needs_core
def test_a_model_in_training_mode_keeps_them_and_says_so() -> None:
    model = folded(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)), EVERY).train()
    (line,) = sb.to_bsr(model).layers
    assert line.note.startswith("its batch norm stays a layer")
    assert isinstance(model[0], BSRConv2d)
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_a_converted_network_has_none_left_and_survives_its_file(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, num_classes=10)

    config = sb.SupermaskConfig(conv1x1=TILES, conv=TILES, exclude=("conv1",) if "resnet" in name else ())
    model = folded(build(), config)
    x = torch.randn(1, 3, 40, 40)
    with torch.inference_mode():
        expected = model(x)
        sb.to_bsr(model)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        sb.save(model, tmp_path / "model.safetensors")
        loaded = sb.load(tmp_path / "model.safetensors", build()).eval()
        for one in (model, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(one(x), expected, rtol=1e-3, atol=1e-3)
    assert {key: tensor.shape for key, tensor in loaded.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }

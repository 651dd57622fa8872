"""Activations move into the product before them, and nowhere else."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from test_bsr import blocky
from torch import nn

from superblock import BSRLinear, BSRMatrix
from superblock.fuse import activation_name, fuse_activations

timm = pytest.importorskip("timm", reason="needs the vision extra")


def sparse(out_features: int = 16, in_features: int = 16) -> BSRLinear:
    return BSRLinear(BSRMatrix.from_dense(blocky((out_features, in_features), 8), 8), torch.randn(out_features))


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.SiLU(), "silu")],
)
def test_a_sequence_keeps_its_result_and_its_length(activation: nn.Module, name: str) -> None:
    model = nn.Sequential(sparse(32, 16), activation, nn.Dropout(0.0), sparse(16, 32))
    x = torch.randn(5, 16, requires_grad=True)
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    fuse_activations(model)
    assert model[0].activation == name
    assert isinstance(model[1], nn.Identity)
    assert f"activation={name}" in repr(model)
    torch.testing.assert_close(model(x), expected)
    # Sums of hundreds of terms in float32, in another order.
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-4)


def test_torchs_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=F.gelu, batch_first=True).eval()
    layer.linear1, layer.linear2 = sparse(32, 16), sparse(16, 32)
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    fuse_activations(layer)
    assert layer.linear1.activation == "gelu"
    torch.testing.assert_close(layer(x), expected)


def test_timms_mlp() -> None:
    mlp = timm.layers.Mlp(16, 32)
    mlp.fc1, mlp.fc2 = sparse(32, 16), sparse(16, 32)
    x = torch.randn(2, 5, 16)
    expected = mlp(x)
    fuse_activations(mlp)
    assert mlp.fc1.activation == "gelu"
    torch.testing.assert_close(mlp(x), expected)


def test_what_must_stay_outside_does() -> None:
    shared = sparse()
    twice = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared)
    fuse_activations(twice)
    assert shared.activation == "none"
    hooked = nn.Sequential(OrderedDict(a=sparse(), b=nn.ReLU()))
    hooked.b.register_forward_hook(lambda *_: None)
    fuse_activations(hooked)
    assert isinstance(hooked.b, nn.ReLU)
    unknown = nn.Sequential(sparse(), nn.Tanh())
    fuse_activations(unknown)
    assert isinstance(unknown[1], nn.Tanh)
    assert activation_name(nn.LeakyReLU()) is None
    for name in ("gelu", "gelu_tanh"):  # timm has classes of its own for these.
        assert activation_name(timm.layers.get_act_layer(name)()) == name
    assert activation_name(torch.tanh) is None

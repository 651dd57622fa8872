"""Feed-forward layers run as one where that is safe, and give the same."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from test_bsr import blocky
from torch import nn

from superblock import BSRLinear, BSRMatrix
from superblock.feed_forward import FeedForwardMlp, FeedForwardSequential, fuse_feed_forward
from superblock.fuse import fuse_activations

timm = pytest.importorskip("timm", reason="needs the vision extra")


def sparse(out_features: int, in_features: int, block: int = 8) -> BSRLinear:
    return BSRLinear(BSRMatrix.from_dense(blocky((out_features, in_features), block), block), torch.randn(out_features))


def sequence(block: int = 8) -> nn.Sequential:
    return nn.Sequential(sparse(32, 16, block), nn.GELU(), nn.Dropout(0.5), sparse(16, 32, block), nn.Dropout(0.5))


def mlp() -> nn.Module:
    module = timm.layers.Mlp(16, 32, drop=0.5)
    module.fc1, module.fc2 = sparse(32, 16), sparse(16, 32)
    return module


@pytest.mark.parametrize(("make", "kind"), [(sequence, FeedForwardSequential), (mlp, FeedForwardMlp)])
@pytest.mark.parametrize("tokens", [3, 150])
def test_the_result_and_the_state_stay(make, kind, tokens: int) -> None:
    model = make().eval()
    x = torch.randn(tokens, 16)
    expected, keys = model(x), list(model.state_dict())
    fuse_activations(model)
    fuse_feed_forward(model)
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            # Sums of 32 products in another order.
            torch.testing.assert_close(one(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one(x), expected, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.train()
    torch.manual_seed(1)
    dropped = model(x)
    torch.manual_seed(2)
    assert not torch.equal(model(x), dropped)


@pytest.mark.parametrize("trained", ["0.bias", "3.values", "3.bias"])
def test_one_parameter_in_training_is_enough_for_gradients(trained: str) -> None:
    model = sequence().eval().requires_grad_(False)
    fuse_activations(model)
    fuse_feed_forward(model)
    norm, x = nn.LayerNorm(16).requires_grad_(False), 3 * torch.randn(70, 16) + 1
    with torch.inference_mode():
        expected = model(x, x, norm)
    parameter = model.get_parameter(trained).requires_grad_(True)
    y = model(x, x, norm)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert parameter.grad is not None


@pytest.mark.parametrize("how", ["hook", "hook on all modules", "backward hook", "forward of its own"])
def test_who_listens_is_heard(how: str) -> None:
    model = sequence().eval()
    fuse_activations(model)
    fuse_feed_forward(model)
    heard = []
    last, own, listening = model[3], model[3].forward, contextlib.nullcontext()

    def hear(module: nn.Module, *_: object) -> None:
        if module is last:
            heard.append(1)

    if how == "hook":
        last.register_forward_hook(hear)
    elif how == "hook on all modules":
        listening = nn.modules.module.register_module_forward_hook(hear)
    elif how == "backward hook":
        last.register_full_backward_hook(hear)
    else:
        last.forward = lambda x: heard.append(1) or own(x)
    with listening:
        model(torch.randn(2, 16)).sum().backward()
    assert heard


def test_blocks_the_core_does_not_take_run_one_after_the_other() -> None:
    model = sequence(block=4).eval()
    x = torch.randn(70, 16)
    expected = model(x)
    fuse_activations(model)
    fuse_feed_forward(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_it_compiles_whole_and_under_autocast() -> None:
    model = sequence().eval()
    fuse_activations(model)
    fuse_feed_forward(model)
    x = torch.randn(70, 16)
    with torch.inference_mode():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16


def test_what_does_not_chain_is_left_alone() -> None:
    for model in (nn.Sequential(sparse(32, 16), nn.Tanh(), sparse(16, 32)), nn.Sequential(nn.Linear(4, 4))):
        fuse_feed_forward(model)
        assert type(model) is nn.Sequential


def test_what_only_shares_the_name_of_timms_mlp_stays_as_it_is() -> None:
    mlp = timm.models.swiftformer.Mlp(16, 32)
    kind = type(mlp)
    fuse_activations(mlp)
    fuse_feed_forward(mlp)
    assert type(mlp) is kind

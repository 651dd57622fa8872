"""The short way to the native core: the same result, and never taken where something else must see the product."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from native_cases import Seen, needs_core, random_weight
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from superblock import SupermaskConfig, TileSparsity, apply_supermask, sparsify_weights, to_bsr
from superblock.bsr import BSRMatrix
from superblock.errors import BackendError, ConfigError, MatrixError
from superblock.nn import BSRLinear
from superblock.ops import cpu, direct, indices, native, prepared, reference

pytestmark = needs_core


@pytest.fixture
def layer() -> BSRLinear:
    values, crow, col = random_weight(48, 32, (16, 16))
    return BSRLinear(BSRMatrix(crow, col, values, (48, 32)), torch.randn(48)).requires_grad_(False)


def expected(layer: BSRLinear, x: torch.Tensor) -> torch.Tensor:
    tensors = layer.values.double(), layer.crow_indices, layer.col_indices, layer.bias.double()
    return reference.linear(x.double(), *tensors, None, 48, 32, "none").float()


def taken(layer: BSRLinear, x: torch.Tensor) -> bool:
    tensors = layer.values, layer.crow_indices, layer.col_indices, layer.bias
    return direct.product(x, *tensors, (48, 32), "none") is not None


def test_inference_takes_it(layer: BSRLinear) -> None:
    for shape in ((32,), (5, 32), (2, 3, 32), (0, 32)):
        x = torch.randn(*shape)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert taken(layer, x)
                torch.testing.assert_close(layer(x), expected(layer, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_what_must_see_the_product_does(layer: BSRLinear) -> None:
    class SeenFunction(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        pass

    def refused(each: torch.Tensor) -> torch.Tensor:
        assert not taken(layer, each)
        return each

    x = torch.randn(5, 32)
    assert not taken(layer, x)  # Gradients are on.
    with torch.no_grad():
        for mode in (Seen, SeenFunction):
            with mode() as seen:
                layer(x)
            assert any("bsr_linear" in name for name in seen.names)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.profiler.profile() as profile:
            layer(x)
        assert any("bsr_linear" in event.name for event in profile.events())
        assert "bsr_linear" in make_fx(layer)(x).code
        assert "bsr_linear" in str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)
        assert not taken(layer, x.as_subclass(Own))
        assert not taken(layer, x.to("meta"))
        with torch.autograd.forward_ad.dual_level():
            assert not taken(layer, x)
        torch.func.vmap(refused)(x)


@pytest.mark.parametrize("trained", [False, True])
def test_forward_mode_derivatives_are_refused_not_dropped(layer: BSRLinear, trained: bool) -> None:
    layer.requires_grad_(trained)
    conv = nn.Sequential(nn.Conv2d(32, 32, 3))
    apply_supermask(conv, SupermaskConfig(conv=TileSparsity(0.5, 8)))
    sparsify_weights(conv)
    to_bsr(conv)
    conv.requires_grad_(trained)
    images = torch.randn(1, 32, 5, 5)
    for module, x in ((layer, torch.randn(5, 32)), (nn.Sequential(layer), torch.randn(5, 32)), (conv, images)):
        with pytest.raises(
            BackendError, match=r"no forward-mode derivatives, got a dual tensor: take derivatives back"
        ):
            torch.func.jvp(module, (x,), (torch.ones_like(x),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(BackendError, match="forward-mode"):
            module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_bad_input_is_refused_on_the_short_way_too(layer: BSRLinear) -> None:
    with torch.no_grad():
        with pytest.raises(MatrixError, match=r"expected \[..., 32\] of torch.float32 on cpu, got \(2, 31\)"):
            layer(torch.zeros(2, 31))
        with pytest.raises(MatrixError, match=r"x must be \[..., 32\] .* got \(\)"):
            layer(torch.zeros(()))
        with pytest.raises(ConfigError, match=r"activation must be one of .*, got 'tan'"):
            layer.project(torch.zeros(2, 32), "tan")


@torch.no_grad()
def test_indices_that_change_unnoticed_are_not_read(layer: BSRLinear) -> None:
    x = torch.randn(5, 32)
    y = layer(x)
    layer.col_indices.data[0] = 10**8  # Which no version counts.
    layer.crow_indices.numpy()[-1] = 10**6
    assert torch.equal(layer(x), y)


def test_threads_that_turn_an_index_at_once_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, crow, col = random_weight(48, 32, (16, 16))
    index, both = indices.indices_of(crow, col, len(col), 3, 2), threading.Barrier(2)
    find = indices.row_indices

    def find_together(*args: object) -> torch.Tensor:
        both.wait()
        return find(*args)

    monkeypatch.setattr(indices, "row_indices", find_together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: index.transposed(), range(2))
    assert all(a is b for a, b in zip(first, second, strict=True))


@torch.no_grad()
def test_replaced_tensors_are_seen(layer: BSRLinear) -> None:
    """Each change leaves the layer's tensor objects what they were."""
    x = torch.randn(5, 32)
    layer(x)
    layer.values.data = torch.randn_like(layer.values)
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.values.data = layer.values.data.transpose(1, 2)  # The same address, other strides.
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.bias.data = torch.randn(48)
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.bias.data = torch.randn(96)[::2]
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.bias.data = layer.bias.data[:40]
    with pytest.raises(MatrixError, match=r"bias must be \[48\]"):
        layer(x)


@torch.no_grad()
def test_what_is_negated_only_when_it_is_read_is_read_so(layer: BSRLinear) -> None:
    x = torch.randn(5, 32)
    want = expected(layer, x)
    torch.testing.assert_close(layer(torch._neg_view(-x)), want)
    layer.values.data = torch._neg_view(-layer.values.data)
    layer.bias.data = torch._neg_view(-layer.bias.data)
    torch.testing.assert_close(layer(x), want)
    layer.values.data = torch._neg_view(layer.values.data.resolve_neg())
    layer(x)
    before = layer.values.data
    layer.values.data = torch._neg_view(before)  # The same address, the other sign.
    torch.testing.assert_close(layer(x), expected(layer, x))


@torch.no_grad()
def test_changed_indices_are_seen() -> None:
    crow, col = torch.arange(4), torch.tensor([0, 1, 0])  # One block a row.
    layer, x = BSRLinear(BSRMatrix(crow, col, torch.randn(3, 16, 16), (48, 32)), torch.randn(48)), torch.randn(5, 32)
    layer(x)
    layer.col_indices.copy_(1 - layer.col_indices)
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.col_indices.data = 1 - layer.col_indices
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.crow_indices, layer.col_indices = crow.int(), torch.tensor([1, 1, 1], dtype=torch.int32)
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.col_indices[0] = 2
    with pytest.raises(MatrixError, match=r"col_indices must be in \[0, 2\)"):
        layer(x)


@torch.no_grad()
def test_parameters_may_be_parametrized_or_plain_tensors(layer: BSRLinear) -> None:
    class Twice(torch.nn.Module):
        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            return 2 * bias

    x = torch.randn(5, 32)
    bias = layer.bias.clone()
    without = layer(x) - bias
    given = {"values": 3 * layer.values, "bias": 4 * bias}
    torch.testing.assert_close(torch.func.functional_call(layer, given, x), 3 * without + 4 * bias)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Twice())
    torch.testing.assert_close(layer(x), without + 2 * bias)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "bias")
    for name in ("values", "bias"):
        value = getattr(layer, name).data
        delattr(layer, name)
        setattr(layer, name, value)
    torch.testing.assert_close(layer(x), without + 2 * bias)


def test_threads_share_what_is_prepared(layer: BSRLinear) -> None:
    inputs = [torch.randn(tokens, 32) for tokens in range(1, 65)]

    @torch.no_grad()
    def repeated(x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for x, results in zip(inputs, pool.map(repeated, inputs), strict=True):
            for y in results:
                torch.testing.assert_close(y, expected(layer, x))


@torch.no_grad()
def test_nothing_is_kept_of_a_dead_layer(layer: BSRLinear) -> None:
    before = len(prepared._memory)
    other = copy.deepcopy(layer)
    other(torch.randn(5, 32))
    assert len(prepared._memory) == before + 1
    del other
    assert len(prepared._memory) == before


@torch.no_grad()
def test_a_weight_used_in_two_ways_stays_itself() -> None:
    """The kept product of a weight is the last one asked for, never another's."""
    values, crow, col = random_weight(48, 32, (16, 16))
    x, bias = torch.randn(5, 32), torch.randn(48)
    for _ in range(2):
        for added, activation in ((None, "none"), (bias, "relu"), (bias, "none")):
            y = cpu.linear(x, values, crow, col, added, None, 48, 32, activation)
            wide = None if added is None else added.double()
            want = reference.linear(x.double(), values.double(), crow, col, wide, None, 48, 32, activation)
            torch.testing.assert_close(y, want.float())


@torch.no_grad()
def test_values_move_to_huge_pages_once_and_stay_as_they_are(layer: BSRLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    core, moved = native.library(), []
    move = core.sb_move_to_huge_pages
    monkeypatch.setattr(core, "sb_move_to_huge_pages", lambda *memory: (moved.append(memory), move(*memory)))
    x = torch.randn(3, 32)
    for _ in range(2):
        layer(x)
    layer.values.mul_(2)
    torch.testing.assert_close(layer(x), expected(layer, x))
    assert moved == [(layer.values.data_ptr(), layer.values.nbytes)]
    with torch.autocast("cpu", torch.bfloat16):  # Of values that last for one call.
        layer(x)
    monkeypatch.setattr(native, "PROCESS", -1)  # In a child, whose pages are its parent's too.
    copy.deepcopy(layer)(x)
    assert len(moved) == 1


def test_memory_of_any_size_and_place_may_move_to_huge_pages() -> None:
    values = torch.randn(5 << 20)
    before = values.clone()
    for start, end in ((0, 0), (0, 100), (1, 1 << 20), (1, (1 << 20) + 3), (7, 4 << 20), (0, 5 << 20)):
        part = values[start:end]
        native.library().sb_move_to_huge_pages(part.data_ptr(), part.nbytes)
        assert torch.equal(values, before)


def test_training_prepares_a_weight_once(layer: BSRLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    layer.requires_grad_(True)
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    monkeypatch.setattr(prepared, "_build", lambda *_: pytest.fail("prepared again"))
    layer(x).sum().backward()


def test_a_bias_of_another_shape_is_refused_however_often_the_right_one_came(layer: BSRLinear) -> None:
    tensors = layer.values, layer.crow_indices, layer.col_indices
    with torch.inference_mode():
        layer(torch.randn(3, 32))
        with pytest.raises(MatrixError, match=r"bias must be \[48\] .*, got \(1, 48\)"):
            direct.product(torch.randn(3, 32), *tensors, layer.bias.view(1, 48), (48, 32), "none")

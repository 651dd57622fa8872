"""The feed-forward with gradients as one node: its ops, and the layers that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from native_cases import DTYPES, Seen, assert_near, isa, needs_core, random_weight, read_features
from test_bsr import blocky
from torch import nn

from superblock import BSRLinear, BSRMatrix
from superblock.errors import MatrixError
from superblock.feed_forward import FeedForwardMlp, fuse_feed_forward
from superblock.fuse import fuse_activations
from superblock.ops import ACTIVATIONS, cpu, reference
from superblock.residual import fuse_residuals

ops = torch.ops.superblock
on_every_set = pytest.mark.usefixtures("nan_filled", isa.__name__)

# (leading, in, hidden, out, first block, second block): odd sizes, tails, features that only one of the blocks reaches,
# and preactivations of 9 MB, which are written around the caches.
CHAINS = [
    ((200,), 64, 128, 64, (16, 16), (16, 16)),
    ((2, 49), 72, 100, 40, (32, 24), (8, 16)),
    ((131,), 96, 90, 70, (16, 8), (64, 64)),
    ((60,), 32, 33, 32, (64, 32), (8, 8)),
    ((47,), 40, 300, 170, (80, 40), (32, 64)),
    ((3001,), 32, 768, 40, (64, 32), (40, 64)),
    ((3,), 32, 64, 32, (16, 16), (16, 16)),
    ((0,), 32, 64, 32, (16, 16), (16, 16)),
]


def chain(in_: int, hidden: int, out: int, first_block, second_block, dtype, density: float = 0.3):
    first = (*random_weight(hidden, in_, first_block, dtype, 0.3), torch.randn(hidden).to(dtype), hidden, in_)
    second = (*random_weight(out, hidden, second_block, dtype, density), torch.randn(out).to(dtype), out, hidden)
    return first, second


def slope(grad: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    z = z.requires_grad_()
    return torch.autograd.grad(reference.activate(z, activation), z, grad)[0]


@needs_core
@on_every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.05])  # Of few blocks, which leave most hidden features unread.
@pytest.mark.parametrize(("leading", "in_", "hidden", "out", "first_block", "second_block"), CHAINS)
def test_forward_and_gradients_match_the_reference(
    leading, in_, hidden, out, first_block, second_block, density, dtype
) -> None:
    first, second = chain(in_, hidden, out, first_block, second_block, dtype, density)
    read = read_features(second[2], hidden, second_block[1])
    x, residual, grad = (torch.randn(*leading, size).to(dtype) for size in (in_, out, out))
    wide = [(weight[0].double(), *weight[1:3], weight[3].double(), *weight[4:]) for weight in (first, second)]
    index, rows = second[1:3], grad.reshape(-1, out)
    for activation in ACTIVATIONS if hidden < 700 else ["gelu"]:
        y, z = cpu.feed_forward_with_preactivation(x, first, activation, second, residual)
        want = reference.linear(x.double(), *wide[0][:4], None, *wide[0][4:], "none")
        assert_near(z[..., read], want[..., read])
        assert z.isfinite().all()
        inside = reference.activate(want, activation)
        assert_near(y, reference.linear(inside, *wide[1][:4], residual.double(), *wide[1][4:], "none"))
        dx, dz, dbias = cpu.feed_forward_gradient(grad, z, first, activation, second)
        dh = reference.grad_input(grad.double(), *wide[1][:3], out, hidden)
        want = slope(dh, z.double(), activation)
        assert_near(dz, want)
        assert_near(dx, reference.grad_input(want, *wide[0][:3], hidden, in_))
        assert dbias.shape == (hidden,)
        if len(rows) > cpu.FUSED_TOKENS:  # Which sums what it has not rounded.
            assert_near(dbias, want.reshape(-1, hidden).sum(0))
        dvalues = cpu.grad_values(grad, z, *index, out, hidden, *second_block, activation)
        inside = reference.activate(z.double(), activation)
        want = reference.grad_values(grad.double(), inside, *index, out, hidden, *second_block)
        assert_near(dvalues, want)
        if not cpu.splits(x):
            at_once = cpu.feed_forward_gradients(grad, x, z, first, activation, second, (True, True, True))
            for got, same in zip((at_once[0], at_once[1], at_once[3]), (dx, dbias, dvalues), strict=True):
                assert torch.equal(got, same)
            dz = dz.double(), x.double(), *first[1:3], hidden, in_, *first_block
            assert_near(at_once[2], reference.grad_values(*dz))
    assert_near(cpu.bias_gradient(grad), rows.double().sum(0))


@needs_core
@on_every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    first, second = chain(192, 256, 160, (32, 32), (16, 32), dtype)
    x, grad = torch.randn(301, 192).to(dtype), torch.randn(301, 160).to(dtype)
    results = []
    for threads in (1, 2, 3, 5, 2):
        torch.set_num_threads(threads)
        y, z = cpu.feed_forward_with_preactivation(x, first, "gelu", second, None)
        gradients = cpu.feed_forward_gradient(grad, z, first, "gelu", second)
        values = cpu.grad_values(grad, z, *second[1:3], 160, 256, 16, 32, "gelu")
        results.append((y, z, *gradients, values, cpu.bias_gradient(grad)))
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_core
def test_preactivations_that_do_not_fit_are_refused() -> None:
    first, second = chain(32, 64, 32, (16, 16), (16, 16), torch.float32)
    with pytest.raises(MatrixError, match=r"z must be \(3, 64\), got \(2, 64\)"):
        cpu.feed_forward_gradient(torch.zeros(3, 32), torch.zeros(2, 64), first, "relu", second)
    with pytest.raises(MatrixError, match=r"must take the first's 64 outputs in torch\.float32, got 48"):
        cpu.feed_forward_with_preactivation(torch.zeros(2, 32), first, "relu", (*second[:5], 48), None)


@needs_core
@pytest.mark.parametrize("tokens", [3, 200])  # In two steps, and as one.
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_preactivations_of_another_dtype_are_refused(tokens: int, dtype: torch.dtype) -> None:
    first, second = chain(32, 64, 32, (16, 16), (16, 16), torch.float32)
    grad, z = torch.zeros(tokens, 32), torch.zeros(tokens, 64, dtype=dtype)
    with pytest.raises(MatrixError, match=rf"expected \[..., 64\] of .*{dtype}"):
        cpu.feed_forward_gradient(grad, z, first, "gelu", second)
    with pytest.raises(MatrixError, match=rf"expected \[..., 64\] of {dtype} on cpu, got .* of torch.float32 on cpu"):
        cpu.activation_gradient(z.float(), z, "gelu")
    with pytest.raises(MatrixError, match=rf"expected \[..., 64\] of torch.float32 on cpu, got .* of {dtype} on cpu"):
        cpu.grad_values(grad, z, *second[1:3], 32, 64, 16, 16, "gelu")


def arguments(activation: str, dtype: torch.dtype = torch.float32, block: int = 8, tokens: int = 6):
    """``x`` to ``residual``, with the sizes and the activation."""
    parts = []
    for shape in ((24, 20), (12, 24)):
        matrix = BSRMatrix.from_dense(blocky(shape, block).to(dtype), block)
        bias = torch.randn(shape[0], dtype=dtype, requires_grad=True)
        parts += [matrix.values.requires_grad_(), matrix.crow_indices, matrix.col_indices, bias]
    x, residual = (torch.randn(tokens, size, dtype=dtype, requires_grad=True) for size in (20, 12))
    return x, *parts, residual, 20, 24, 12, activation


@pytest.mark.parametrize("block", [8, 4], ids=["native", "steps"])
def test_opcheck(block: int) -> None:
    all_of_it = arguments("gelu", block=block, tokens=40)
    torch.library.opcheck(ops.feed_forward_with_preactivation, all_of_it)
    _, values1, crow1, col1, _, values2, crow2, col2, _, grad, *sizes = all_of_it
    grad, z = grad.detach(), torch.randn(40, 24)
    bare = [values1.detach(), crow1, col1, values2.detach(), crow2, col2]
    torch.library.opcheck(ops.feed_forward_gradient, (grad, z, *bare, *sizes))
    torch.library.opcheck(ops.bsr_grad_values_activated, (grad, z, crow2, col2, 12, 24, block, block, "gelu"))
    torch.library.opcheck(ops.bias_gradient, (grad,))


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_and_their_gradients(activation: str) -> None:
    given = arguments(activation, torch.float64, tokens=2)
    crow1, col1, crow2, col2 = (given[place] for place in (2, 3, 6, 7))
    inputs = [given[place] for place in (0, 1, 4, 5, 8, 9)]

    def forward(x, values1, bias1, values2, bias2, residual):
        return ops.feed_forward_with_preactivation(
            x, values1, crow1, col1, bias1, values2, crow2, col2, bias2, residual, 20, 24, 12, activation
        )

    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(lambda *tensors: forward(*tensors)[0], inputs)


def layer(out_features: int, in_features: int, block: int = 8) -> BSRLinear:
    bias = torch.randn(out_features, requires_grad=True)
    return BSRLinear(BSRMatrix.from_dense(blocky((out_features, in_features), block), block), bias)


def sequence(dropout: float = 0.0, block: int = 8) -> nn.Sequential:
    """As ``to_bsr`` leaves it."""
    steps = (layer(32, 16, block), nn.GELU(), nn.Dropout(dropout), layer(16, 32, block), nn.Dropout(dropout))
    model = nn.Sequential(*steps)
    fuse_activations(model)
    fuse_feed_forward(model)
    return model


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The training nodes that a model runs."""
    ran = []
    kernel = cpu.feed_forward_with_preactivation

    def noted(*given: object) -> object:
        result = kernel(*given)
        ran.append("feed_forward")
        return result

    monkeypatch.setattr(cpu, "feed_forward_with_preactivation", noted)
    return ran


def gradients(model: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> list[torch.Tensor | None]:
    model.zero_grad()
    x.grad = None
    y = model(x) if residual is None else model(x, residual)
    y.square().sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in model.parameters())]


@needs_core
@pytest.mark.parametrize("tokens", [3, 150])
@pytest.mark.parametrize(
    "frozen",
    [(), ("0.values",), ("0.bias", "3.bias"), ("3.values",), ("0.values", "0.bias"), ("x",), ("x", "0.values")],
)
def test_training_as_one_gives_the_gradients_of_two_layers(tokens: int, frozen: tuple[str, ...], nodes) -> None:
    model = sequence()
    x, residual = torch.randn(tokens, 16, requires_grad="x" not in frozen), torch.randn(tokens, 16)
    for name in frozen:
        if name != "x":
            model.get_parameter(name).requires_grad_(False)
    apart = copy.deepcopy(model)
    apart.__class__ = nn.Sequential
    for got, want in zip(gradients(model, x), gradients(apart, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x, residual), apart(x) + residual, rtol=1e-4, atol=1e-4)
    assert nodes == ["feed_forward"] * 2


@needs_core
def test_what_is_watched_or_dropped_runs_layer_by_layer(nodes) -> None:
    x = torch.randn(70, 16, requires_grad=True)
    dropping = sequence(0.5)
    torch.manual_seed(1)
    dropped = dropping(x)
    torch.manual_seed(2)
    assert not torch.equal(dropping(x), dropped)
    hooked, heard = sequence(), []
    hooked[0].register_forward_hook(lambda *_: heard.append(1))
    gradients(hooked, x)
    assert heard
    gradients(sequence(block=4), x)  # Which the core does not take.
    with torch.autocast("cpu", torch.bfloat16):
        assert sequence()(x).dtype == torch.bfloat16
    assert not nodes
    gradients(dropping.eval(), x)
    assert nodes


@needs_core
def test_an_mlp_of_timm_trains_as_one(nodes) -> None:
    timm = pytest.importorskip("timm", reason="needs the vision extra")
    model = timm.layers.Mlp(16, 32)
    model.fc1, model.fc2 = layer(32, 16), layer(16, 32)
    x = torch.randn(70, 16, requires_grad=True)
    want = gradients(model, x)
    fuse_activations(model)
    fuse_feed_forward(model)
    assert type(model) is FeedForwardMlp
    for got, expected in zip(gradients(model, x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert nodes


@needs_core
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer_of_torch_trains_as_one_unless_it_drops_out(norm_first: bool, nodes) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model.linear1, model.linear2 = layer(32, 16), layer(16, 32)
    x = torch.randn(2, 40, 16, requires_grad=True)
    want = gradients(model, x)
    fuse_activations(model)
    fuse_residuals(model)
    for got, expected in zip(gradients(model, x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert nodes
    nodes.clear()
    model.dropout.p = 0.5
    gradients(model, x)
    assert not nodes


@needs_core
def test_it_compiles_whole_in_training() -> None:
    model, x = sequence(), torch.randn(70, 16, requires_grad=True)
    want = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled, x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def undispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op must not be called."""
    name = "feed_forward_with_preactivation"
    monkeypatch.setattr(torch.ops.superblock, name, lambda *_: pytest.fail("dispatched"), raising=False)


@needs_core
@pytest.mark.usefixtures("undispatched", "nan_filled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_training_goes_past_the_dispatcher(dtype: torch.dtype) -> None:
    model = sequence().to(dtype)
    apart = copy.deepcopy(model)
    apart.__class__ = nn.Sequential
    inputs = [torch.randn(70, 16), torch.randn(2, 80, 32)[..., ::2], torch.randn(2, 40, 16).transpose(0, 1)]
    for x in (tensor.to(dtype).requires_grad_() for tensor in inputs):
        near = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}[dtype]
        for got, want in zip(_of_a_sum(model, x), _of_a_sum(apart, x), strict=True):
            torch.testing.assert_close(got, want, rtol=near, atol=near * float(want.detach().abs().max()))


def _of_a_sum(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Results and gradients, from one that has no strides."""
    model.zero_grad()
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    y.sum().backward(inputs=list(model.parameters()))
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
    return [y, dx, *gradients]


@needs_core
@pytest.mark.usefixtures("undispatched")
def test_its_gradients_have_gradients() -> None:
    model, x = sequence(), torch.randn(70, 16, requires_grad=True)
    apart = copy.deepcopy(model)
    apart.__class__ = nn.Sequential
    results = []
    for one in (model, apart):
        y = one(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *one.parameters()]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.detach().abs().max()))


@needs_core
@pytest.mark.usefixtures("undispatched")
def test_what_is_kept_can_be_packed_and_must_not_change() -> None:
    model, x = sequence(), torch.randn(70, 16, requires_grad=True)
    want = gradients(model, x)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: (packed.append(1), kept.clone())[1], lambda kept: kept):
        model.zero_grad()
        x.grad = None
        model(x).square().sum().backward()
    assert packed
    torch.testing.assert_close(x.grad, want[1])
    x.grad = None
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, want[1])
    y = model(x)
    with torch.no_grad():
        model[0].values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_core
def test_who_could_tell_a_training_step_is_told() -> None:
    model, x = sequence(), torch.randn(70, 16, requires_grad=True)
    want = gradients(model, x)
    with Seen() as seen:
        got = gradients(model, x)
    assert any("feed_forward_with_preactivation" in name for name in seen.names)
    torch.testing.assert_close(got, want)
    y = model(x)
    with Seen() as seen:
        (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert any("feed_forward_gradient" in name for name in seen.names)
    torch.testing.assert_close(dx, want[1])


@needs_core
def test_gradients_of_a_batch_of_gradients() -> None:
    model, x = sequence(), torch.randn(60, 16, requires_grad=True)
    y, upstream = model(x), torch.randn(3, 60, 16)
    (batch,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for gradient, grad in zip(batch, upstream, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


class Wrapped(torch.Tensor):
    """A tensor without data of its own, as libraries that shard or quantize have them."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def inner(value: object) -> object:
            return value.inner if isinstance(value, Wrapped) else value

        return function(*map(inner, args), **{name: inner(value) for name, value in (kwargs or {}).items()})


@needs_core
@pytest.mark.parametrize("place", [0, 3])
def test_a_bias_that_wraps_another_is_unwrapped(place: int) -> None:
    model, x = sequence(), torch.randn(70, 16, requires_grad=True)
    expected = model(x)
    bias = model[place].bias.detach()
    del model[place].bias
    model[place].bias = Wrapped(bias)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)

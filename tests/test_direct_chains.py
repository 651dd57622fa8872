"""Feed-forwards and self-attention on the short way to the native core: never stale, never hidden from who must see."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from native_cases import Seen, near, needs_core, random_weight
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from superblock.bsr import BSRMatrix
from superblock.errors import MatrixError
from superblock.feed_forward import feed_forward
from superblock.nn import BSRLinear
from superblock.ops import direct, native, prepared
from superblock.self_attention import attend_as_one

pytestmark = needs_core
WIDTH, HEADS = 32, 2


@dataclass
class Block:
    """``x + inside(norm(x))``."""

    name: str  # Of the op.
    norm: nn.LayerNorm
    first: BSRLinear
    second: BSRLinear
    run: Callable[[Block, Tensor], Tensor | None]
    inside: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.run(self, x)
        assert y is not None
        return y

    def expected(self, x: Tensor) -> Tensor:
        wide = x.double()
        weight, bias = self.norm.weight.double(), self.norm.bias.double()
        normalized = F.layer_norm(wide, (WIDTH,), weight, bias, self.norm.eps)
        hidden = self.inside(F.linear(normalized, self.first.dense().double(), self.first.bias.double()))
        return (F.linear(hidden, self.second.dense().double(), self.second.bias.double()) + wide).float()


def heads_of(qkv: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture(params=["feed_forward", "self_attention"])
def block(request: pytest.FixtureRequest) -> Block:
    is_attention = request.param == "self_attention"
    hidden, inner = (3 * WIDTH, WIDTH) if is_attention else (2 * WIDTH, 2 * WIDTH)
    layers = []
    for out, in_ in ((hidden, WIDTH), (WIDTH, inner)):
        values, crow, col = random_weight(out, in_, (16, 16), density=0.8)
        layers.append(BSRLinear(BSRMatrix(crow, col, values, (out, in_)), torch.randn(out)).requires_grad_(False))
    norm = nn.LayerNorm(WIDTH).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    if is_attention:
        return Block("self_attention", norm, *layers, run_attention, heads_of)
    layers[0].activation = "gelu"
    return Block("feed_forward", norm, *layers, run_feed_forward, F.gelu)


def run_attention(block: Block, x: Tensor) -> Tensor | None:
    return attend_as_one(block.first, block.second, HEADS, block.norm, x)


def run_feed_forward(block: Block, x: Tensor) -> Tensor:
    return feed_forward(x, block.first, block.second, x, block.norm)


def tokens(count: int = 40) -> Tensor:
    return torch.randn(2, count, WIDTH)


def test_inference_takes_it(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.superblock, block.name, lambda *_: pytest.fail("dispatched"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for x in (tokens(), tokens(41), tokens(80)[:, ::2]):
                near(block(x), block.expected(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_what_must_see_it_does(block: Block) -> None:
    x = tokens()
    with torch.no_grad():
        with Seen() as seen:
            near(block(x), block.expected(x))
        assert any(block.name in name for name in seen.names)
        with torch.profiler.profile() as profile:
            block(x)
        assert any(block.name in event.name for event in profile.events())
        assert block.name in make_fx(block)(x).code
    with Seen() as seen:  # Gradients are on, though nothing asks for one.
        near(block(x), block.expected(x))
    assert any(block.name in name for name in seen.names)


@torch.no_grad()
def test_whatever_is_replaced_is_seen(block: Block) -> None:
    x = tokens()
    first, second, norm = block.first, block.second, block.norm
    block(x)
    strided = torch.randn(2 * WIDTH)
    changes: list[Callable[[], object]] = [
        lambda: setattr(first.values, "data", torch.randn_like(first.values) / 8),
        lambda: setattr(second.values, "data", second.values.data.transpose(1, 2)),
        lambda: first.values.mul_(2),
        lambda: setattr(second.bias, "data", torch.randn(WIDTH)),
        lambda: second.col_indices.copy_(_moved(second)),
        lambda: setattr(norm.weight, "data", torch.randn(WIDTH)),
        lambda: norm.weight.mul_(2),
        lambda: setattr(norm, "eps", 0.5),
        lambda: setattr(norm.bias, "data", strided[::2]),
        lambda: strided.add_(1),
        lambda: setattr(norm.bias, "data", torch._neg_view(torch.randn(WIDTH))),
        lambda: setattr(second.bias, "data", torch.randn(2 * WIDTH)[::2]),
        lambda: first.bias.add_(1),
    ]
    for change in changes:
        change()
        for _ in range(2):
            near(block(x), block.expected(x))
    norm.weight.data = norm.weight.data[:-1]
    with pytest.raises(MatrixError, match=r"the norm's weight must be \[32\]"):
        block(x)


def _moved(layer: BSRLinear) -> Tensor:
    """Other columns for the same blocks, in order."""
    columns = layer.in_features // 16
    rows = layer.crow_indices.diff().tolist()
    return torch.cat([torch.randperm(columns)[:count].sort().values for count in rows]).to(layer.col_indices.dtype)


@torch.no_grad()
def test_what_is_negated_only_when_it_is_read_is_read_so(block: Block) -> None:
    x = tokens()
    near(block(torch._neg_view(-x)), block.expected(x))
    if block.name == "feed_forward":
        y = feed_forward(x, block.first, block.second, torch._neg_view(-x), block.norm)
        near(y, block.expected(x))


@torch.no_grad()
def test_what_is_prepared_serves_any_input_from_any_thread(block: Block) -> None:
    inputs = [tokens(count) for count in range(25, 60)]
    block(inputs[0])
    made = block_of(block)
    with ThreadPoolExecutor(8) as pool:
        for x, y in zip(inputs, pool.map(torch.no_grad()(block), inputs), strict=True):
            near(y, block.expected(x))
    assert block_of(block) is made


def block_of(block: Block) -> prepared.Chain:
    values, crow, col, bias = block.first.tensors
    shape = block.first.out_features, block.first.in_features
    return prepared.prepare(values, crow, col, bias, shape, block.first.activation).made[block.name]


@torch.no_grad()
def test_what_the_core_does_not_take_goes_the_long_way(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens()
    monkeypatch.setattr(native, "unsupported", lambda *_: "not today")
    first = (*block.first.tensors, block.first.out_features, WIDTH)
    second = (*block.second.tensors, WIDTH, block.second.in_features)
    prepared._memory.clear()
    if block.name == "feed_forward":
        assert direct.feed_forward(x, first, "gelu", second, x, None) is None
    else:
        assert direct.self_attention(x, None, first, second, HEADS) is None

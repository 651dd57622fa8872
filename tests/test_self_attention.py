"""Self-attention a sequence at a time: what its projections and its attention give one after the other."""

from __future__ import annotations

import pytest
import torch
from native_cases import DTYPES, assert_near, isa, needs_core, random_weight
from torch import Tensor, nn

from superblock import BSRMatrix
from superblock.bsr import row_indices
from superblock.errors import MatrixError
from superblock.nn import BSRLinear, BSRMultiheadAttention
from superblock.ops import cpu, reference
from superblock.ops.arguments import Weight
from superblock.ops.attention import attention
from superblock.self_attention import attend_as_one

pytestmark = needs_core
native = pytest.mark.usefixtures("nan_filled", isa.__name__)

# (sequences, tokens, heads, features of a head, block): a block a head, several, a part of one; tails of every kind.
CASES = [(2, 1, 2, 8, 8), (2, 37, 4, 16, 16), (4, 70, 4, 16, 32), (2, 131, 2, 48, 24), (2, 50, 1, 64, 16)]
HEADS = [
    (1, 1, 2, 8, 8),
    (1, 37, 4, 16, 16),
    (3, 70, 8, 16, 32),
    (1, 131, 2, 48, 24),
    (1, 290, 4, 16, 16),
    (5, 50, 2, 64, 32),
]


def weights(inner: int, block: int, dtype: torch.dtype) -> tuple[Weight, Weight]:
    first = (*random_weight(3 * inner, inner, (block, 8), dtype), torch.randn(3 * inner).to(dtype), 3 * inner, inner)
    second = (*random_weight(inner, inner, (8, 8), dtype), torch.randn(inner).to(dtype), inner, inner)
    return first, second


def steps(x: Tensor, first: Weight, second: Weight, heads: int) -> Tensor:
    qkv = cpu.linear(x, *first[:4], None, *first[4:], "none")
    parts = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return cpu.linear(attention(*parts).transpose(1, 2).flatten(2), *second[:4], x, *second[4:], "none")


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sequences", "tokens", "heads", "features", "block"), CASES)
def test_it_is_its_three_steps(sequences, tokens, heads, features, block, dtype) -> None:
    inner = heads * features
    x = torch.randn(sequences, tokens, inner).to(dtype)
    first, second = weights(inner, block, dtype)
    y = cpu.self_attention(x, None, first, second, heads)
    assert y is not None
    assert_near(y, steps(x, first, second, heads).double())
    norm = torch.randn(inner).to(dtype), torch.randn(inner).to(dtype), 1e-5
    normalized = torch.nn.functional.layer_norm(x, (inner,), *norm)
    z = cpu.self_attention(x, norm, first, second, heads)
    assert z is not None
    assert_near(z, (steps(normalized, first, second, heads).double() - normalized.double() + x.double()))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sequences", "tokens", "heads", "features", "block"), HEADS)
def test_threads_take_heads_of_few_sequences(sequences, tokens, heads, features, block, dtype) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        test_it_is_its_three_steps(sequences, tokens, heads, features, block, dtype)
    finally:
        torch.set_num_threads(threads)


@native
@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "block"), [(16, 16), (16, 32), (32, 16)])
def test_heads_that_nothing_reads_are_left_out(features, block, dtype, sequences) -> None:
    heads, threads = 8, torch.get_num_threads()
    inner = heads * features
    x = torch.randn(sequences, 70, inner).to(dtype)
    first, _ = weights(inner, block, dtype)
    dead = torch.zeros(3, heads, features, dtype=torch.bool)
    dead[:, [0, 3, 4, 5]] = True  # In units of one head and of two.
    values, crow, col = random_weight(inner, inner, (8, 8), dtype)
    living = ~dead[0].flatten()[col.long() * 8]
    rows = row_indices(crow, len(col))[living]
    crow = torch.cat([crow[:1], torch.bincount(rows, minlength=len(crow) - 1).cumsum(0).int()])
    second = values[living], crow, col[living], None, inner, inner
    torch.set_num_threads(2)
    try:
        for spoiled in (False, True):
            if spoiled:
                first[3][dead.flatten()] = torch.nan
            y = cpu.self_attention(x, None, first, second, heads)
            assert y is not None
            assert_near(y, steps(x, first, second, heads).double())
    finally:
        torch.set_num_threads(threads)


@native
def test_it_agrees_with_float64() -> None:
    first, second = weights(32, 16, torch.float32)
    x = torch.randn(2, 45, 32)
    wide = [[part.double() if part.is_floating_point() else part for part in weight[:4]] for weight in (first, second)]
    qkv = reference.linear(x.double(), *wide[0], None, 96, 32, "none")
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = cpu.self_attention(x, None, first, second, 2)
    assert y is not None
    assert_near(y, reference.linear(heads, *wide[1], x.double(), 32, 32, "none"))


def test_what_would_not_pay_or_fit_is_left_to_the_steps() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for sequences, tokens, heads, features, block in ((3, 9, 2, 8, 16), (2, 9000, 2, 16, 16), (2, 9, 3, 8, 16)):
            first, second = weights(heads * features, block, torch.float32)
            x = torch.randn(sequences, tokens, heads * features)
            assert cpu.self_attention(x, None, first, second, heads) is None
            if tokens < 100:
                expected = steps(x, first, second, heads)
                op = torch.ops.superblock.self_attention
                torch.testing.assert_close(
                    op(x, None, None, None, *first[:4], *second[:4], heads, heads * features), expected
                )
    finally:
        torch.set_num_threads(threads)


def test_weights_of_two_dtypes_are_refused() -> None:
    first, second = weights(32, 16, torch.float32)
    second = (second[0].bfloat16(), *second[1:3], second[3].bfloat16(), *second[4:])
    with pytest.raises(MatrixError, match=r"one dtype, got torch\.float32 and torch\.bfloat16"):
        cpu.self_attention(torch.randn(2, 40, 32), None, first, second, 2)


@pytest.mark.parametrize("heads", [0, -1, -4, 3, 64, 2**40])
def test_heads_that_do_not_divide_the_features_are_refused(heads: int) -> None:
    first, second = weights(32, 16, torch.float32)
    x = torch.randn(2, 5, 32)
    message = rf"num_heads must be at least 1 and divide the 32 features of all heads, got {heads}"
    for device in ("cpu", "meta"):
        tensors = [tensor.to(device) for tensor in (x, *first[:4], *second[:4])]
        with pytest.raises(MatrixError, match=message):
            torch.ops.superblock.self_attention(tensors[0], None, None, None, *tensors[1:], heads, 32)
    into, out = (
        BSRLinear(BSRMatrix(crow, col, values, sizes), bias) for values, crow, col, bias, *sizes in (first, second)
    )
    with torch.no_grad(), pytest.raises(MatrixError, match=message):
        attend_as_one(into, out, heads, None, x)
    with pytest.raises(MatrixError, match=message):
        BSRMultiheadAttention(into, out, heads)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (3, 2, 5, 32)])
def test_the_op_refuses_all_but_sequences_of_tokens(shape: tuple[int, ...]) -> None:
    first, second = weights(32, 16, torch.float32)
    with pytest.raises(MatrixError, match=r"x must be \[sequences, tokens, features\], got \("):
        torch.ops.superblock.self_attention(torch.randn(shape), None, None, None, *first[:4], *second[:4], 2, 32)


def test_the_op_is_well_formed() -> None:
    first, second = weights(32, 16, torch.float32)
    for norm in ((None, None, None), (torch.ones(32), None, 1e-5)):
        arguments = (torch.randn(2, 5, 32), *norm, *first[:4], *second[:4], 2, 32)
        torch.library.opcheck(torch.ops.superblock.self_attention.default, arguments)


def test_it_stands_aside_where_somebody_could_tell() -> None:
    def layer(weight: Weight) -> BSRLinear:
        return BSRLinear(BSRMatrix(weight[1], weight[2], weight[0], weight[4:]), weight[3])

    first, second = (layer(weight) for weight in weights(32, 16, torch.float32))
    x = torch.randn(2, 5, 32)
    assert attend_as_one(first, second, 2, None, x) is None  # Gradients.
    with torch.inference_mode():
        assert attend_as_one(first, second, 2, nn.LayerNorm(32), x) is not None
        assert attend_as_one(first, nn.Linear(32, 32), 2, None, x) is None
        assert attend_as_one(first, second, 2, nn.RMSNorm(32), x) is None
        assert attend_as_one(first, second, 2, None, x.bfloat16()) is None
        assert attend_as_one(first, second, 2, None, x[0]) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert attend_as_one(first, second, 2, None, x) is None
        second.register_forward_hook(lambda *_: None)
        assert attend_as_one(first, second, 2, None, x) is None

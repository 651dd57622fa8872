"""The native core's products against the float64 reference: every instruction set, dtype and kind of shape."""

from __future__ import annotations

import pytest
import torch
from native_cases import DTYPES, assert_near, before_a_hole, isa, needs_core, random_weight, read_features

from superblock.errors import MatrixError
from superblock.ops import ACTIVATIONS, cpu, reference
from superblock.ops.layout import feature_major

pytestmark = [needs_core, pytest.mark.usefixtures("nan_filled", isa.__name__)]

# (tokens, out, in, block): odd tokens, partial edges, blocks of one to eight panels, square and not, nothing at all.
CASES = [
    ((1,), 64, 64, (16, 16)),
    ((5,), 100, 72, (32, 16)),
    ((3, 67), 384, 192, (64, 64)),
    ((33,), 130, 260, (48, 24)),
    ((17,), 90, 91, (8, 8)),
    ((2, 2, 16), 256, 128, (24, 40)),
    ((29,), 96, 96, (128, 32)),
    ((50,), 200, 100, (16, 16)),
    ((37,), 200, 90, (32, 48)),
    ((0,), 64, 64, (16, 16)),
    ((3,), 40, 8, (40, 8)),
    # Weights of 64 outputs beyond L1, rows of unequal length, groups of 17 to 32 tokens.
    ((47,), 300, 1600, (64, 32)),
    ((70,), 208, 1280, (16, 16)),
    ((41,), 170, 1040, (80, 40)),
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("leading", "out", "in_", "block"), CASES)
def test_products_match_the_reference(leading, out, in_, block, dtype, packed) -> None:
    values, crow, col = random_weight(out, in_, block, dtype, packed=packed)
    x, grad = torch.randn(*leading, in_).to(dtype), torch.randn(*leading, out).to(dtype)
    bias, residual = torch.randn(out).to(dtype), torch.randn(*leading, out).to(dtype)
    wide = [tensor.double() for tensor in (x, values, grad, bias, residual)]
    index = crow, col
    for activation in ACTIVATIONS:
        y = cpu.linear(x, values, *index, bias, residual, out, in_, activation)
        assert_near(y, reference.linear(wide[0], wide[1], *index, wide[3], wide[4], out, in_, activation))
        both = cpu.linear_with_preactivation(x, values, *index, bias, out, in_, activation)
        for got, want in zip(
            both,
            reference.linear_with_preactivation(wide[0], wide[1], *index, wide[3], out, in_, activation),
            strict=True,
        ):
            assert_near(got, want)
    assert_near(
        cpu.grad_input(grad, values, *index, out, in_), reference.grad_input(wide[2], wide[1], *index, out, in_)
    )
    assert_near(
        cpu.grad_values(grad, x, *index, out, in_, *block),
        reference.grad_values(wide[2], wide[0], *index, out, in_, *block),
    )


# Rows of whole lines, which AMX reads where they lie, in groups of 16 or 32; the last one may be full or nearly empty.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [16, 17, 31, 32, 33, 64, 69, 97, 200])
@pytest.mark.parametrize(("out", "in_", "block"), [(64, 192, (32, 32)), (256, 2048, (64, 64)), (48, 256, (16, 16))])
def test_no_row_past_the_last_is_read(tokens, out, in_, block, dtype) -> None:
    values, crow, col = random_weight(out, in_, block, dtype)
    bias, rows = torch.randn(out).to(dtype), before_a_hole(torch.randn(tokens, 2 * in_).to(dtype))
    for x in (before_a_hole(torch.randn(tokens, in_).to(dtype)), rows[:, :in_], rows[:, in_:]):
        y = cpu.linear(x, values, crow, col, bias, None, out, in_, "relu")
        wide = x.double(), values.double(), crow, col, bias.double()
        assert_near(y, reference.linear(*wide, None, out, in_, "relu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "in_", "block"), [(64, 500, (16, 16)), (96, 1024, (32, 64)), (40, 330, (8, 24))])
def test_features_that_no_block_reads_do_not_matter(out, in_, block, dtype) -> None:
    values, crow, col = random_weight(out, in_, block, dtype, density=0.06)
    unread = ~read_features(col, in_, block[1])
    assert unread.any()
    x, norm = torch.randn(70, in_).to(dtype), (torch.randn(in_).to(dtype), None, 1e-5)
    normalized = torch.nn.functional.layer_norm(x.double(), (in_,), norm[0].double(), None, norm[2])
    y = cpu.linear_normalized(x, norm, values, crow, col, None, None, out, in_, "none")
    assert_near(
        y, reference.linear(normalized.to(dtype).double(), values.double(), crow, col, None, None, out, in_, "none")
    )
    wanted = reference.linear(x.double(), values.double(), crow, col, None, None, out, in_, "none")
    x[:, unread] = torch.nan
    assert_near(cpu.linear(x, values, crow, col, None, None, out, in_, "none"), wanted)


def test_rows_beside_the_given_ones_are_not_looked_at() -> None:
    values, crow, col = random_weight(128, 256, (64, 64), torch.bfloat16)
    x = torch.full((120, 256), torch.nan, dtype=torch.bfloat16)
    for first, tokens in ((0, 50), (7, 33), (40, 80)):
        own = torch.randn(tokens, 256).bfloat16()
        x[first : first + tokens] = own
        y = cpu.linear(x[first : first + tokens], values, crow, col, None, None, 128, 256, "none")
        assert_near(y, reference.linear(own.double(), values.double(), crow, col, None, None, 128, 256, "none"))
        x.fill_(torch.nan)


# Beyond 8 MB results are written around the caches; beyond 1 MB weights are fetched ahead of their use; beyond 1400
# living features a row is multiplied in slabs (random weights here live by 0.4).
LARGE = [
    (70, 136, 8000, (8, 16)),
    (131, 200, 7700, (64, 48)),
    (2900, 768, 40, (24, 8)),
    (2900, 768, 64, (16, 16)),
    (2900, 768, 64, (64, 64)),
    (75, 1024, 1024, (64, 32)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "out", "in_", "block"), LARGE)
def test_large_results_and_weights(tokens, out, in_, block, dtype) -> None:
    values, crow, col = random_weight(out, in_, block, dtype)
    x, bias, residual = (
        torch.randn(tokens, in_).to(dtype),
        torch.randn(out).to(dtype),
        torch.randn(tokens, out).to(dtype),
    )
    for added in (None, residual):
        y = cpu.linear(x, values, crow, col, bias, added, out, in_, "none")
        z = None if added is None else added.double()
        wide = reference.linear(x.double(), values.double(), crow, col, bias.double(), z, out, in_, "none")
        assert_near(y, wide)


@pytest.mark.parametrize("block", [16, 48])
def test_parts_of_the_block_rows_write_whole_lines_around_the_caches(block: int) -> None:
    tokens, out = 40, 131040  # 10 MB of bfloat16; groups of tokens for two threads, so that block rows are shared out.
    values, crow, col = random_weight(out, 16, (block, 16), torch.bfloat16)
    x = torch.randn(tokens, 16).bfloat16()
    want = reference.linear(x.double(), values.double(), crow, col, None, None, out, 16, "relu")
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        y, z = cpu.linear_with_preactivation(x, values, crow, col, None, out, 16, "relu")
        assert_near(cpu.linear(x, values, crow, col, None, None, out, 16, "relu"), want)
    finally:
        torch.set_num_threads(threads)
    assert_near(y, want)
    assert_near(z.relu(), want)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_strided_rows_and_either_index_type(index_dtype: torch.dtype) -> None:
    values, crow, col = random_weight(48, 64, (16, 16))
    whole = torch.randn(9, 2, 64)
    x = whole[:, 1]
    y = cpu.linear(x, values, crow.to(index_dtype), col.to(index_dtype), None, None, 48, 64, "none")
    assert_near(y, reference.linear(x.double(), values.double(), crow, col, None, None, 48, 64, "none"))


def test_a_last_dimension_that_is_not_dense_is_copied() -> None:
    values, crow, col = random_weight(48, 64, (16, 16))
    x = torch.randn(64, 9).T
    y = cpu.linear(x, values, crow, col, None, None, 48, 64, "none")
    assert_near(y, reference.linear(x.double(), values.double(), crow, col, None, None, 48, 64, "none"))


def test_values_of_any_strides() -> None:
    values, crow, col = random_weight(48, 64, (16, 16))
    odd = values.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    x = torch.randn(9, 64)
    y = cpu.linear(x, odd, crow, col, None, None, 48, 64, "none")
    assert_near(y, reference.linear(x.double(), values.double(), crow, col, None, None, 48, 64, "none"))


def test_no_blocks_at_all() -> None:
    crow, col, values = torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, 16, 16)
    bias = torch.randn(48)
    y = cpu.linear(torch.randn(5, 32), values, crow, col, bias, None, 48, 32, "none")
    assert torch.equal(y, bias.expand(5, 48))
    assert torch.equal(cpu.grad_input(torch.randn(5, 48), values, crow, col, 48, 32), torch.zeros(5, 32))
    assert cpu.grad_values(torch.randn(5, 48), torch.randn(5, 32), crow, col, 48, 32, 16, 16).shape == (0, 16, 16)


def test_large_results_and_more_tokens_than_a_tile() -> None:
    """9 MB of float32, written past the caches."""
    values, crow, col = random_weight(768, 32, (32, 32), density=0.5)
    x = torch.randn(3001, 32)
    for activation in ("none", "gelu"):
        y = cpu.linear(x, values, crow, col, None, None, 768, 32, activation)
        assert_near(y, reference.linear(x.double(), values.double(), crow, col, None, None, 768, 32, activation))
    both = cpu.linear_with_preactivation(x, values, crow, col, None, 768, 32, "gelu")
    wide = reference.linear_with_preactivation(x.double(), values.double(), crow, col, None, 768, 32, "gelu")
    for got, want in zip(both, wide, strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "in_", "block"), [(2200, 90, (48, 16)), (100, 2100, (32, 64)), (1100, 1050, (24, 40))])
def test_gradients_of_values_over_many_cells_and_tiles(
    out: int, in_: int, block: tuple[int, int], dtype: torch.dtype
) -> None:
    _, crow, col = random_weight(out, in_, block, density=0.2)
    grad, x = torch.randn(301, out).to(dtype), torch.randn(301, in_ + 3).to(dtype)[:, :in_]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        values = cpu.grad_values(grad, x, crow, col, out, in_, *block)
        assert_near(values, reference.grad_values(grad.double(), x.double(), crow, col, out, in_, *block))
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "living",
    [(70, slice(None)), (slice(None), 3), (slice(130, None), slice(125, None))],
    ids=["a row", "a column", "a corner"],
)
def test_gradients_of_values_that_lie_unevenly(living: tuple[int | slice, int | slice], dtype: torch.dtype) -> None:
    """The parts of a weight have as much work each, so that some have no panel at all."""
    where = torch.zeros(137, 131, dtype=torch.bool)
    where[living] = True
    crow = torch.zeros(138, dtype=torch.int32)
    crow[1:] = where.sum(1).cumsum(0)
    col = where.nonzero()[:, 1].int()
    sizes = (137 * 16, 131 * 16, 16, 16)
    grad, x = torch.randn(70, sizes[0]).to(dtype), torch.randn(70, sizes[1]).to(dtype)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        values = cpu.grad_values(grad, x, crow, col, *sizes)
        assert_near(values, reference.grad_values(grad.double(), x.double(), crow, col, *sizes))
    torch.set_num_threads(1)


@pytest.mark.parametrize("tokens", [6001, 22001])
def test_large_results_in_bfloat16(tokens: int) -> None:
    """9 MB, written past the caches, and 33, which is not: both of them twice, with the preactivation."""
    values, crow, col = random_weight(768, 32, (32, 32), torch.bfloat16, density=0.5)
    x = torch.randn(tokens, 32).bfloat16()
    arguments = crow, col, None, 768, 32, "relu"
    both = cpu.linear_with_preactivation(x, values, *arguments)
    want = reference.linear_with_preactivation(x.double(), values.double(), *arguments)
    for got, exact in zip(both, want, strict=True):
        assert_near(got, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_at_their_extremes(dtype: torch.dtype) -> None:
    """An identity weight: what comes out is the activation of the bias-free input, NaN and infinities included."""
    x = torch.cat(
        [torch.linspace(-12, 12, 1001), torch.tensor([0.0, -0.0, 1e4, -1e4, torch.nan, torch.inf, -torch.inf])]
    )
    x = x.to(dtype)[:, None].expand(-1, 8).contiguous()
    values, index = torch.eye(8).to(dtype)[None], torch.tensor([0, 1], dtype=torch.int32)
    for activation in ACTIVATIONS:
        y = cpu.linear(x[:-3], values, index, index[:1], None, None, 8, 8, activation)
        want = reference.activate(x[:-3].double(), activation)
        atol = 9e-5 if dtype == torch.bfloat16 and activation == "gelu" else 1.2e-6
        torch.testing.assert_close(y.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=atol)
        bias = x[-3:, 0]
        specials = torch.stack(
            [
                cpu.linear(x[:1] * 0, values, index, index[:1], each.expand(8).contiguous(), None, 8, 8, activation)[
                    0, 0
                ]
                for each in bias
            ]
        )
        assert torch.equal(specials.isnan(), torch.tensor([True, False, False])), activation
        assert specials[1] == torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("leading", "features"), [((1,), 1), ((3, 67), 150), ((0,), 20), ((32,), 64), ((100,), 7)])
def test_gradients_of_activation_and_bias(leading: tuple[int, ...], features: int, dtype: torch.dtype) -> None:
    z, grad = (3 * torch.randn(*leading, features)).to(dtype), torch.randn(*leading, features + 9).to(dtype)
    for strided in (grad[..., :features], grad.mT.contiguous().mT[..., :features]):
        for activation in ACTIVATIONS:
            dz, dbias = cpu.activation_gradient(strided, z, activation)
            want = _gradient(strided.double(), z.double(), activation)
            assert_near(dz, want)
            assert_near(dbias, want.reshape(-1, features).sum(0))


def test_a_large_gradient_of_an_activation() -> None:
    """9 MB of float32, written past the caches."""
    z, grad = 3 * torch.randn(3001, 768), torch.randn(3001, 768)
    dz, dbias = cpu.activation_gradient(grad, z, "gelu")
    want = _gradient(grad.double(), z.double(), "gelu")
    assert_near(dz, want)
    assert_near(dbias, want.sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slopes_at_their_extremes(dtype: torch.dtype) -> None:
    z = torch.cat([torch.linspace(-12, 12, 5001), torch.tensor([0.0, -0.0, 1e4, -1e4])]).to(dtype)[:, None]
    ends = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]], dtype=dtype)
    for activation in ACTIVATIONS:
        dz, _ = cpu.activation_gradient(torch.ones_like(z), z, activation)
        want = _gradient(torch.ones_like(z).double(), z.double(), activation)
        short = dtype == torch.bfloat16 and activation == "gelu"
        torch.testing.assert_close(dz.double(), want, rtol=torch.finfo(dtype).eps, atol=3e-4 if short else 3e-6)
        limits, total = cpu.activation_gradient(torch.ones_like(ends), ends, activation)
        low = 1.0 if activation == "none" else 0.0
        torch.testing.assert_close(
            limits[:2, 0].float(), torch.tensor([1.0, low]), rtol=0, atol=1e-5 if short else 3e-6
        )
        if activation not in ("none", "relu"):  # Whose slopes do not depend on the size of z.
            assert limits[2].isnan()
            assert total.isnan()
        dz, total = cpu.activation_gradient(ends[2:], z[:1], activation)
        assert dz.isnan()
        assert total.isnan()


def test_threads_that_share_the_block_rows_write_their_own() -> None:
    """So few tokens that parts of the rows are handed out, whose strips end before they are full."""
    values, crow, col = random_weight(592, 2048, (16, 16), torch.bfloat16)
    x, threads = torch.randn(16, 2048).bfloat16(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = cpu.linear(x, values, crow, col, None, None, 592, 2048, "none")
        torch.set_num_threads(2)
        for _ in range(200):
            assert torch.equal(cpu.linear(x, values, crow, col, None, None, 592, 2048, "none"), want)
    finally:
        torch.set_num_threads(threads)


def _gradient(grad: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    z = z.requires_grad_()
    return torch.autograd.grad(reference.activate(z, activation), z, grad)[0]


# (tokens, out, in, block): values laid out by strips or at once, by threads that share tokens or block rows; slabs.
SHARED = [
    (75, 1000, 48, (16, 16)),
    (75, 400, 200, (64, 32)),
    (40, 700, 80, (24, 40)),
    (90, 136, 8000, (8, 16)),
    (600, 160, 4500, (32, 16)),
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "out", "in_", "block"), SHARED)
def test_values_are_laid_out_for_any_number_of_threads(tokens, out, in_, block, dtype, packed) -> None:
    values, crow, col = random_weight(out, in_, block, dtype, packed=packed)
    x, residual = torch.randn(tokens, in_).to(dtype), torch.randn(tokens, out).to(dtype)
    want = reference.linear(x.double(), values.double(), crow, col, None, residual.double(), out, in_, "none")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_near(cpu.linear(x, values, crow, col, None, residual, out, in_, "none"), want)
    finally:
        torch.set_num_threads(threads)


def test_gradients_are_the_same_bits_every_time_and_on_any_number_of_threads() -> None:
    values, crow, col = random_weight(256, 192, (32, 32))
    grad, x = torch.randn(301, 256), torch.randn(301, 192)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(
            (
                cpu.grad_input(grad, values, crow, col, 256, 192),
                cpu.grad_values(grad, x, crow, col, 256, 192, 32, 32),
                *cpu.activation_gradient(grad, grad.flip(0), "gelu"),
            )
        )
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 31)},
            r"expected \[..., 32\] of torch.float32 on cpu, got \(2, 31\) of torch.float32 on cpu",
        ),
        ({"x": torch.zeros(2, 32).double()}, "got .* of torch.float64 on cpu"),
        ({"bias": torch.zeros(47)}, r"bias must be \[48\] of torch.float32 on cpu, got \(47,\) of torch.float32"),
        ({"bias": torch.zeros(48, device="meta")}, "on cpu, got .* on meta"),
        ({"x": torch.zeros(2, 32, device="meta")}, "on cpu, got .* on meta"),
        ({"col": torch.zeros(2, dtype=torch.int32, device="meta")}, "on cpu, got .* on meta"),
        ({"values": torch.zeros(2, 16, 16, device="meta")}, r"values must be \[nnz, bh, bw\] on cpu, got .* on meta"),
        ({"values": torch.zeros(2, 16)}, r"values must be \[nnz, bh, bw\] on cpu, got \(2, 16\)"),
        ({"residual": torch.zeros(2, 47)}, r"expected \[..., 48\] .* got \(2, 47\)"),
        ({"residual": torch.zeros(3, 48)}, r"residual must have the 2 tokens of x, got 3"),
        ({"crow": torch.tensor([0, 1, 1])}, "crow_indices must be 4 entries of int32 or int64 on cpu"),
        ({"crow": torch.tensor([0, 1, 1, 3])}, "crow_indices must rise from 0 to the 2 stored blocks"),
        ({"crow": torch.tensor([0, 2, 1, 2])}, "crow_indices must rise"),
        ({"col": torch.tensor([0.0, 1.0])}, "col_indices must be 2 entries of int32 or int64 on cpu"),
        ({"col": torch.tensor([0, 2])}, r"col_indices must be in \[0, 2\)"),
        ({"col": torch.tensor([-1, 1])}, r"col_indices must be in \[0, 2\)"),
        ({"crow": torch.tensor([0, 2, 2, 2]), "col": torch.tensor([1, 0])}, "col_indices must ascend"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 32),
        "values": torch.zeros(2, 16, 16),
        "crow": torch.tensor([0, 1, 1, 2]),
        "col": torch.tensor([0, 1]),
        "bias": None,
        "residual": None,
    } | change
    with pytest.raises(MatrixError, match=message):
        cpu.linear(*arguments.values(), 48, 32, "none")


def test_gradients_of_unequal_tokens_are_refused() -> None:
    _, crow, col = random_weight(48, 32, (16, 16))
    with pytest.raises(MatrixError, match="grad and x must have the same tokens, got 2 and 3"):
        cpu.grad_values(torch.zeros(2, 48), torch.zeros(3, 32), crow, col, 48, 32, 16, 16)
    with pytest.raises(MatrixError, match="grad and z must have the same tokens, got 2 and 3"):
        cpu.activation_gradient(torch.zeros(2, 48), torch.zeros(3, 48), "gelu")


def test_changed_indices_are_read_again() -> None:
    """In place, by ``.data``, and freed and made again at the same address."""
    values = torch.ones(1, 8, 8)
    crow, col, x = torch.tensor([0, 1]), torch.tensor([0]), torch.arange(16.0)[None]

    def first() -> float:
        return float(cpu.linear(x, values, crow, col, None, None, 8, 16, "none")[0, 0])

    assert first() == sum(range(8))
    col[0] = 1
    assert first() == sum(range(8, 16))
    for _ in range(20):
        col.data = torch.tensor([0])
        assert first() == sum(range(8))
        col.data = torch.tensor([1])
        assert first() == sum(range(8, 16))
    with torch.inference_mode():
        crow, col = torch.tensor([0, 1]), torch.tensor([0])
        assert first() == sum(range(8))
        col[0] = 1
        assert first() == sum(range(8, 16))
    crow, col = torch.tensor([0, 1]), torch.tensor([0])
    assert first() == sum(range(8))
    col[0] = 2
    with pytest.raises(MatrixError, match="in \\[0, 2\\)"):
        first()


def test_changed_values_are_read_again() -> None:
    values, crow, col = random_weight(32, 32, (16, 16), packed=False)
    x = torch.randn(4, 32)
    for layout in (values, feature_major(values)):
        before = cpu.linear(x, layout, crow, col, None, None, 32, 32, "none")
        layout.data.mul_(2)
        torch.testing.assert_close(cpu.linear(x, layout, crow, col, None, None, 32, 32, "none"), 2 * before)


def test_what_is_unsupported_says_why() -> None:
    assert cpu.unsupported(torch.float32, 16, 64) is None
    assert "multiples of 8, not 16 × 12" in cpu.unsupported(torch.float32, 16, 12)
    assert "not torch.float64" in cpu.unsupported(torch.float64, 16, 16)

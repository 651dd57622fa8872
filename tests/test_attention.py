"""Attention on the native core against torch's in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from native_cases import DTYPES, assert_near, isa, needs_core
from torch import Tensor

from superblock.errors import MatrixError
from superblock.ops import native
from superblock.ops.attention import attention

pytestmark = [needs_core, pytest.mark.usefixtures("nan_filled", isa.__name__)]

# (n, heads, queries, keys, features): whole tiles and not, one token, as many as a group and one more; several blocks
# of keys; enough heads that the next one's rows are fetched.
CASES = [
    (2, 3, 197, 197, 64),
    (1, 2, 5, 40, 32),
    (1, 1, 1, 1, 8),
    (2, 2, 33, 64, 24),
    (1, 5, 13, 50, 80),
    (0, 2, 3, 3, 8),
    (1, 1, 50, 600, 40),
    (1, 1, 7, 1100, 64),
    (4, 12, 65, 197, 64),
]


def heads_of(n: int, heads: int, tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    """As a projection leaves them: heads side by side within a token."""
    return torch.randn(n, tokens, heads, features).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_matches_float64(case: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    n, heads, queries, keys, features = case
    q, k, v = (heads_of(n, heads, tokens, features, dtype) for tokens in (queries, keys, keys))
    torch.set_num_threads(threads)
    got = torch.ops.superblock.attention(q, k, v)
    torch.set_num_threads(1)
    assert got.transpose(1, 2).is_contiguous()
    # Probabilities are rounded to the dtype between the two products, as torch's own kernels do.
    assert_near(got, F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", range(8, 129, 8))
def test_heads_that_are_slices_of_one_projection(features: int, dtype: torch.dtype) -> None:
    for tokens in (1, 7, 197):
        qkv = torch.randn(2, tokens, 3, 2, features).to(dtype)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        assert_near(attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1, 2.5])
def test_many_queries_of_short_and_of_long_vectors(factor: float, dtype: torch.dtype) -> None:
    """More queries than share their probabilities' memory; scores that need no maximum, and scores that do."""
    q, k = (factor * heads_of(1, 2, tokens, 72, dtype) for tokens in (300, 530))
    v = heads_of(1, 2, 530, 72, dtype)
    assert_near(attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    q, k, v = (heads_of(1, 2, 9, 16, dtype) * factor for factor in (100, 100, 1))
    assert_near(attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [1 / 16, -1 / 16])
def test_scores_that_rise_or_fall_over_the_keys(slope: float, dtype: torch.dtype) -> None:
    """What earlier blocks of keys gave vanishes beside a later one, or the later one beside them."""
    q, v = torch.ones(1, 2, 5, 16, dtype=dtype), heads_of(1, 2, 1100, 16, dtype)
    k = (torch.arange(1100)[:, None] * torch.full((16,), slope)).to(dtype).expand(1, 2, -1, -1)
    assert_near(attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_average_the_values(dtype: torch.dtype) -> None:
    q, k, v = (heads_of(1, 2, tokens, 24, dtype) for tokens in (33, 530, 530))
    got = attention(q, torch.zeros_like(k), v)
    assert_near(got, v.double().mean(2, keepdim=True).expand(-1, -1, 33, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinities_and_nans_are_those_of_softmax(bad: float, dtype: torch.dtype) -> None:
    """Keys of score -infinity count for nothing, wherever they lie; +infinity and NaN spoil the query, and only it."""
    for keys in (40, 1100):
        q, k, v = torch.ones(1, 1, 5, 16, dtype=dtype), *(heads_of(1, 1, keys, 16, dtype) for _ in range(2))
        for spoilt in (slice(0, 1), slice(keys - 1, keys), slice(0, keys - 3), slice(0, keys)):
            some = k.clone()
            some[:, :, spoilt, 3] = bad
            got = attention(q, some, v)
            want = (q.double() @ some.double().mT / 4).softmax(-1) @ v.double()
            assert torch.equal(got.isnan(), want.isnan())
            assert_near(got.nan_to_num(), want.nan_to_num())
    q[0, 0, 2, 3] = bad
    assert attention(q, k, v).isnan().all(-1).nonzero()[:, 2].tolist() == [2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    for n, heads, tokens in ((1, 1, 197), (3, 1, 100), (4, 12, 65)):
        q, k, v = (heads_of(n, heads, tokens, 64, dtype) for _ in range(3))
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attention(q, k, v))
        torch.set_num_threads(1)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_masks_dropout_and_gradients_go_to_torch() -> None:
    q, k, v = (heads_of(1, 2, 9, 16, torch.float32) for _ in range(3))
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    assert torch.equal(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))
    assert (attention(q, k, v, dropout=0.5) == 0).sum() >= 0
    q.requires_grad_()
    attention(q, k, v).sum().backward()
    assert q.grad is not None


def test_what_does_not_fit_is_refused() -> None:
    good = torch.zeros(1, 2, 3, 16)
    for bad in (
        torch.zeros(1, 2, 3, 12),
        torch.zeros(1, 3, 3, 16),
        torch.zeros(1, 2, 3, 16).double(),
        torch.zeros(2, 3, 16),
    ):
        with pytest.raises(
            MatrixError, match=r"attention takes \[n, heads, tokens, d\] of one dtype, d a multiple of 8"
        ):
            torch.ops.superblock.attention(good, bad, bad)


def test_without_the_core_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "gone")
    q, k, v = (heads_of(1, 2, 9, 16, torch.float32) for _ in range(3))
    got = attention(q, k, v)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v))
    assert got.transpose(1, 2).is_contiguous()


def test_it_compiles_whole() -> None:
    q, k, v = (heads_of(1, 2, 9, 16, torch.float32) for _ in range(3))
    torch.library.opcheck(torch.ops.superblock.attention, (q, k, v))

"""Attention on the native core against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_cases import DTYPES, assert_near, isa, needs_core
from torch import Tensor

from superblock.errors import MatrixError
from superblock.ops import native
from superblock.ops.attention import attention

pytestmark = [needs_core, pytest.mark.usefixtures("nan_filled", isa.__name__)]

# (n, heads, queries, keys, features): whole panels and not, one token, as many as a group and one more.
CASES = [
    (2, 3, 197, 197, 64),
    (1, 2, 5, 40, 32),
    (1, 1, 1, 1, 8),
    (2, 2, 33, 64, 24),
    (1, 5, 13, 50, 80),
    (0, 2, 3, 3, 8),
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


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (heads_of(1, 2, 9, 16, torch.float32) * factor for factor in (100, 100, 1))
    assert_near(attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


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

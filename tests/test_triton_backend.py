"""When the Triton kernels are used, and what is said when they cannot be."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from superblock import BSRMatrix, masks
from superblock.errors import BackendError
from superblock.ops import backends
from superblock.ops.triton.plans import Plan, plan_of


def eye() -> BSRMatrix:
    return BSRMatrix.from_dense(torch.eye(64), 16)


def plan_on(device: str) -> Plan:
    """A plan whose indices seem to lie on a device that need not be there."""
    matrix = eye()
    plan = plan_of(matrix.crow_indices, matrix.col_indices, matrix.nnz, *matrix.grid)
    return Plan(plan.indices, (SimpleNamespace(device=torch.device(device)),) * 2, 4, 4)  # type: ignore[arg-type]


def test_without_triton_a_product_on_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("superblock.ops.") and "triton" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "superblock.ops.cuda", raising=False)
    monkeypatch.delattr("superblock.ops.cuda", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    backends.select.cache_clear()
    with pytest.raises(BackendError, match="need Triton, which is missing: pip install triton"):
        backends.select("cuda", torch.float16, 64, 64)


def test_without_triton_torch_masks_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "find_spec", lambda _: None)
    masks._fused.cache_clear()
    assert masks._fused() is None
    masks._fused.cache_clear()


def test_the_backend_of_a_gpu_takes_what_its_kernels_take() -> None:
    pytest.importorskip("triton")
    assert backends.select("cuda", torch.bfloat16, 64, 32).__name__ == "superblock.ops.cuda"
    assert backends.select("cuda", torch.bfloat16, 8, 8).__name__ == "superblock.ops.reference"
    assert backends.select("cuda", torch.float64, 64, 64).__name__ == "superblock.ops.reference"


def test_a_capture_that_comes_too_early_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="captured the first product of a layer: run it once before capturing"):
        plan_on("cuda").walk(1, False)


def test_an_index_beyond_32_bits_is_refused() -> None:
    with pytest.raises(BackendError, match="an index of 2147483648 entries is more than the kernels' 32 bits count"):
        plan_on("cpu")._place(torch.empty(2**31, device="meta"))


def test_plans_are_made_once_and_again_when_the_indices_change() -> None:
    matrix = eye()
    index = matrix.crow_indices, matrix.col_indices
    first = plan_of(*index, matrix.nnz, *matrix.grid)
    assert plan_of(*index, matrix.nnz, *matrix.grid) is first
    assert first.walk(2, True) is first.walk(2, True)
    matrix.col_indices.copy_(matrix.col_indices.flip(0))
    assert plan_of(*index, matrix.nnz, *matrix.grid) is not first


def test_a_walk_lists_the_union_of_merged_rows_longest_panel_first() -> None:
    crow, cols = torch.tensor([0, 1, 3, 3, 6], dtype=torch.int32), torch.tensor([1, 0, 1, 0, 1, 2], dtype=torch.int32)
    plan = plan_of(crow, cols, 6, 4, 3)
    walk = plan.walk(2, False)
    assert walk.ids is not None
    assert walk.rows is not None
    assert walk.rows.tolist() == [[1, 3], [0, 2]]
    assert walk.starts.tolist() == [0, 3, 4]
    assert walk.cols.tolist() == [0, 1, 2, 1]
    assert walk.ids.tolist() == [[1, 3], [2, 4], [-1, 5], [0, -1]]
    assert walk.order.tolist() == [0, 1]
    transposed = plan.walk(1, True)
    assert transposed.ids is not None
    assert transposed.starts.tolist() == [0, 2, 5, 6]
    assert transposed.cols.tolist() == [1, 3, 0, 1, 3, 3]
    assert transposed.ids.flatten().tolist() == [1, 3, 0, 2, 4, 5]
    groups = plan.groups(2)
    assert groups.starts.tolist() == [0, 1, 3, 5, 6]
    assert groups.rows.tolist() == [0, 1, 3, 3]

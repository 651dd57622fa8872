"""The matrix format: conversions both ways, partial edge blocks, and every way it can be wrong."""

from __future__ import annotations

import pytest
import torch

from superblock import BSRMatrix
from superblock.errors import MatrixError

SHAPES = [(64, 64), (70, 50), (1, 1), (16, 100), (5, 3)]
BLOCKS = [16, 1, (8, 4), (32, 64)]


def blocky(shape: tuple[int, int], block: int | tuple[int, int], density: float = 0.4) -> torch.Tensor:
    """A dense matrix in which whole blocks are zero."""
    bh, bw = (block, block) if isinstance(block, int) else block
    living = torch.rand(-(-shape[0] // bh), -(-shape[1] // bw)) < density
    spread = living.repeat_interleave(bh, 0)[: shape[0]].repeat_interleave(bw, 1)[:, : shape[1]]
    return torch.randn(shape) * spread


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_dense_round_trip(shape: tuple[int, int], block: int | tuple[int, int]) -> None:
    dense = blocky(shape, block)
    matrix = BSRMatrix.from_dense(dense, block)
    assert torch.equal(matrix.to_dense(), dense)
    assert matrix.density == matrix.nnz / (matrix.grid[0] * matrix.grid[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_torch_round_trip_pads_to_whole_blocks(shape: tuple[int, int], block: int | tuple[int, int]) -> None:
    dense = blocky(shape, block)
    matrix = BSRMatrix.from_dense(dense, block)
    sparse = matrix.to_torch()
    assert torch.equal(sparse.to_dense()[: shape[0], : shape[1]], dense)
    assert torch.equal(BSRMatrix.from_torch(sparse, shape).to_dense(), dense)


def test_an_empty_matrix_and_empty_rows() -> None:
    matrix = BSRMatrix.from_dense(torch.zeros(32, 48), 16)
    assert (matrix.nnz, matrix.density) == (0, 0.0)
    assert torch.equal(matrix.to_dense(), torch.zeros(32, 48))
    dense = torch.zeros(48, 32)
    dense[20, 20] = 1
    assert BSRMatrix.from_dense(dense, 16).crow_indices.tolist() == [0, 0, 1, 1]


def test_gradients_reach_the_values() -> None:
    matrix = BSRMatrix.from_dense(blocky((70, 50), 16), 16)
    values = matrix.values.requires_grad_()
    matrix.to_dense().sum().backward()
    assert values.grad is not None
    assert float(values.grad.sum()) == 70 * 50 - float((BSRMatrix.to_dense(_ones(matrix)) == 0).sum())


def _ones(matrix: BSRMatrix) -> BSRMatrix:
    return BSRMatrix(
        matrix.crow_indices, matrix.col_indices, torch.ones_like(matrix.values, requires_grad=False), matrix.shape
    )


def test_moving_and_casting() -> None:
    matrix = BSRMatrix.from_dense(blocky((32, 32), 8), 8).to(torch.bfloat16)
    assert matrix.values.dtype == torch.bfloat16
    assert matrix.to("meta").values.device.type == "meta"
    assert matrix.nbytes == 4 * 5 + matrix.nnz * (4 + 64 * 2)


CROW, COL, VALUES = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1]), torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crow_indices": torch.tensor([0, 3])}, r"crow_indices must have 3 entries for shape \(8, 8\)"),
        ({"crow_indices": torch.tensor([1, 1, 3])}, "crow_indices must rise from 0 to the 3 stored blocks"),
        ({"crow_indices": torch.tensor([0, 4, 3])}, "crow_indices must rise from 0 to the 3 stored blocks"),
        ({"crow_indices": torch.tensor([0, 1, 2])}, "crow_indices must rise from 0 to the 3 stored blocks"),
        ({"crow_indices": CROW.float()}, "crow_indices must be int32 or int64, got torch.float32"),
        ({"crow_indices": CROW.int()}, "both index tensors must have one dtype, got torch.int32 and torch.int64"),
        ({"col_indices": torch.tensor([1, 0, 2])}, r"col_indices must be in \[0, 2\), got 0 to 2"),
        ({"col_indices": torch.tensor([-1, 0, 1])}, r"col_indices must be in \[0, 2\), got -1 to 1"),
        ({"col_indices": torch.tensor([1, 1, 0])}, "col_indices must ascend, without repeats, within each block row"),
        ({"col_indices": torch.tensor([1, 1, 1])}, "col_indices must ascend, without repeats, within each block row"),
        ({"col_indices": torch.tensor([1, 0])}, "col_indices must have 3 entries"),
        ({"values": torch.zeros(3, 16)}, r"values must be \[nnz, block height, block width\], got shape \(3, 16\)"),
        ({"values": VALUES.to("meta")}, "indices and values must be on one device, got cpu and meta"),
        ({"shape": (8, 0)}, "shape must be at least 1 × 1, got 8 × 0"),
        *(
            ({"shape": shape}, "shape must be two whole numbers, rows and columns, got")
            for shape in ((8, 8, 1), (8.9, 8), (8,), None, "88", 8)
        ),
        (
            {"values": VALUES.to_sparse()},
            "values must be a dense tensor of real numbers, got sparse_coo float32 on cpu",
        ),
        ({"values": VALUES.to(torch.complex64)}, "of real numbers, got strided complex64 on cpu"),
    ],
)
def test_tensors_that_do_not_form_a_matrix_are_refused(changes: dict[str, object], message: str) -> None:
    parts = {"crow_indices": CROW, "col_indices": COL, "values": VALUES, "shape": (8, 8), **changes}
    with pytest.raises(MatrixError, match=message):
        BSRMatrix(**parts)  # type: ignore[arg-type]


def test_conversions_refuse_what_they_cannot_read() -> None:
    with pytest.raises(MatrixError, match="expected a matrix and a block of at least 1 × 1"):
        BSRMatrix.from_dense(torch.zeros(3), 4)
    for block in (16.0, "16", "44", (4, 4, 4), (4, 4.0), 0, (4, 0), True, None):
        with pytest.raises(MatrixError, match=r"a block of at least 1 × 1, a whole number or two, got shape \(8, 8\)"):
            BSRMatrix.from_dense(torch.zeros(8, 8), block)  # type: ignore[arg-type]
    with pytest.raises(
        MatrixError, match="a block of 1000000 × 1000000 is far larger than the matrix of 8 × 8: take one"
    ):
        BSRMatrix.from_dense(torch.zeros(8, 8), 10**6)
    for matrix in (torch.zeros(8, 8, device="meta"), torch.zeros(8, 8).to_sparse(), torch.zeros(8, 8).cfloat()):
        with pytest.raises(MatrixError, match="expected a dense matrix of real numbers with values, got"):
            BSRMatrix.from_dense(matrix, 4)
    with pytest.raises(MatrixError, match=r"expected a 2-D tensor of layout torch.sparse_bsr, got 2-D torch.strided"):
        BSRMatrix.from_torch(torch.zeros(4, 4))

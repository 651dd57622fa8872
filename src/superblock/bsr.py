"""How the living blocks are stored: block sparse rows (BSR), with torch's own names and layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from superblock.errors import MatrixError
from superblock.whole import all_whole, whole

INDEX_DTYPES = (torch.int32, torch.int64)
LARGEST_PADDED_BLOCK = 1024  # Blocks are padded to their whole size, which no memory holds for any side.


@dataclass(frozen=True, eq=False)
class BSRMatrix:
    """A matrix of ``shape [M, N]`` of which only some ``bh × bw`` blocks are stored.

    Block row ``r`` holds ``values[crow_indices[r]:crow_indices[r + 1]]`` at the block columns in ``col_indices``,
    which ascend within a row. The shape need not divide by the block: edge blocks are stored whole, and what lies
    beyond the edge is zero.

    Args:
        crow_indices: ``[ceil(M / bh) + 1]``, int32 or int64.
        col_indices: ``[nnz]``, of the same dtype.
        values: ``[nnz, bh, bw]``.
        shape: ``(M, N)``.

    Raises:
        MatrixError: the tensors do not form such a matrix.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        shape = all_whole(self.shape, 2, least=0)
        if shape is None:
            raise MatrixError(f"shape must be two whole numbers, rows and columns, got {self.shape!r}")
        object.__setattr__(self, "shape", shape)
        if self.values.layout != torch.strided or self.values.is_complex():
            raise MatrixError(f"values must be a dense tensor of real numbers, got {_kind(self.values)}")
        check_layout(self.crow_indices, self.col_indices, self.values, self.shape)
        check_indices(self.crow_indices, self.col_indices, self.grid[1])

    @property
    def blocksize(self) -> tuple[int, int]:
        """``(bh, bw)``."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """How many block rows and block columns cover the shape."""
        return block_grid(self.shape, self.blocksize)

    @property
    def nnz(self) -> int:
        """The number of stored blocks, as torch counts them."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Stored blocks over all blocks."""
        return self.nnz / max(1, math.prod(self.grid))

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of both index tensors."""
        return sum(tensor.nbytes for tensor in (self.crow_indices, self.col_indices, self.values))

    @classmethod
    def from_dense(cls, dense: Tensor, blocksize: int | tuple[int, int]) -> BSRMatrix:
        """Store the blocks of ``dense [M, N]`` that hold a value other than zero."""
        block = all_whole((blocksize, blocksize) if whole(blocksize) else blocksize, 2)
        if dense.dim() != 2 or block is None:
            raise MatrixError(
                f"expected a matrix and a block of at least 1 × 1, a whole number or two, "
                f"got shape {tuple(dense.shape)} and block {blocksize!r}"
            )
        if dense.layout != torch.strided or dense.is_complex() or dense.is_meta:
            raise MatrixError(f"expected a dense matrix of real numbers with values, got {_kind(dense)}")
        bh, bw = block
        if any(side > max(own, LARGEST_PADDED_BLOCK) for side, own in zip(block, dense.shape, strict=True)):
            raise MatrixError(
                f"a block of {bh} × {bw} is far larger than the matrix of {dense.shape[0]} × {dense.shape[1]}: "
                f"take one of at most its sides, or {LARGEST_PADDED_BLOCK}"
            )
        rows, cols = block_grid((dense.shape[0], dense.shape[1]), (bh, bw))
        padded = torch.nn.functional.pad(dense.detach(), (0, cols * bw - dense.shape[1], 0, rows * bh - dense.shape[0]))
        blocks = padded.view(rows, bh, cols, bw).transpose(1, 2)
        living = (blocks != 0).flatten(2).any(2)
        crow = torch.zeros(rows + 1, dtype=torch.int32, device=dense.device)
        crow[1:] = living.sum(1).cumsum(0)
        return cls(crow, living.nonzero()[:, 1].int(), blocks[living].contiguous(), (dense.shape[0], dense.shape[1]))

    @classmethod
    def from_torch(cls, tensor: Tensor, shape: tuple[int, int] | None = None) -> BSRMatrix:
        """From a ``torch.sparse_bsr`` tensor; ``shape`` crops what :meth:`to_torch` had to pad."""
        if tensor.layout != torch.sparse_bsr or tensor.dim() != 2:
            raise MatrixError(f"expected a 2-D tensor of layout torch.sparse_bsr, got {tensor.dim()}-D {tensor.layout}")
        size = shape or (tensor.shape[0], tensor.shape[1])
        return cls(tensor.crow_indices(), tensor.col_indices(), tensor.values(), size)

    def to_torch(self) -> Tensor:
        """As a ``torch.sparse_bsr`` tensor, whose shape is rounded up to whole blocks."""
        (rows, cols), (bh, bw) = self.grid, self.blocksize
        return torch.sparse_bsr_tensor(
            self.crow_indices, self.col_indices, self.values, size=(rows * bh, cols * bw), check_invariants=False
        )

    def to_dense(self) -> Tensor:
        """As a dense ``[M, N]`` tensor, through which gradients reach ``values``."""
        return dense_of(self.values, self.crow_indices, self.col_indices, self.shape)

    def to(self, target: torch.device | torch.dtype | str) -> BSRMatrix:
        """Move to a device, or cast the values to a dtype."""
        values = self.values.to(target)
        return BSRMatrix(self.crow_indices.to(values.device), self.col_indices.to(values.device), values, self.shape)


def _kind(tensor: Tensor) -> str:
    layout = str(tensor.layout).removeprefix("torch.")
    return f"{layout} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def block_grid(shape: tuple[int, int], blocksize: tuple[int, int]) -> tuple[int, int]:
    """How many blocks cover each dimension."""
    return math.ceil(shape[0] / blocksize[0]), math.ceil(shape[1] / blocksize[1])


def row_indices(crow_indices: Tensor, nnz: int) -> Tensor:
    """The block row of every stored block, ``[nnz]`` int64, from the row starts."""
    counts = crow_indices.diff().long()
    rows = torch.arange(counts.numel(), device=crow_indices.device)
    return rows.repeat_interleave(counts, output_size=nnz)


def dense_of(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense ``[M, N]`` matrix of BSR tensors: differentiable in ``values``."""
    nnz, bh, bw = values.shape
    rows, cols = block_grid(shape, (bh, bw))
    blocks = values.new_zeros(rows, cols, bh, bw)
    blocks = blocks.index_put((row_indices(crow_indices, nnz), col_indices.long()), values)
    return blocks.transpose(1, 2).reshape(rows * bh, cols * bw)[: shape[0], : shape[1]]


def check_blocks(values: Tensor) -> None:
    """Raise :class:`MatrixError` unless values are those of blocks."""
    if values.dim() != 3 or min(values.shape[1:]) < 1:
        raise MatrixError(f"values must be [nnz, block height, block width], got shape {tuple(values.shape)}")


def check_layout(crow_indices: Tensor, col_indices: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
    """Raise :class:`MatrixError` unless ranks, sizes, dtypes and devices fit; reads no tensor's contents."""
    check_blocks(values)
    if min(shape) < 1:
        raise MatrixError(f"shape must be at least 1 × 1, got {shape[0]} × {shape[1]}")
    rows, _ = block_grid(shape, (values.shape[1], values.shape[2]))
    for name, index, length in (("crow_indices", crow_indices, rows + 1), ("col_indices", col_indices, len(values))):
        if index.dtype not in INDEX_DTYPES:
            raise MatrixError(f"{name} must be int32 or int64, got {index.dtype}")
        if index.shape != (length,):
            raise MatrixError(
                f"{name} must have {length} entries for shape {tuple(shape)} and values {tuple(values.shape)}, "
                f"got shape {tuple(index.shape)}"
            )
    if crow_indices.dtype != col_indices.dtype:
        raise MatrixError(f"both index tensors must have one dtype, got {crow_indices.dtype} and {col_indices.dtype}")
    devices = {str(tensor.device) for tensor in (crow_indices, col_indices, values)}
    if len(devices) > 1:
        raise MatrixError(f"indices and values must be on one device, got {' and '.join(sorted(devices))}")


def check_indices(crow_indices: Tensor, col_indices: Tensor, block_columns: int) -> None:
    """Raise :class:`MatrixError` unless the indices describe rows of ascending block columns in range."""
    if crow_indices.is_meta:
        return
    crow, col = crow_indices.detach().cpu().long(), col_indices.detach().cpu().long()
    nnz = col.numel()
    if crow[0] != 0 or crow[-1] != nnz or bool((crow.diff() < 0).any()):
        raise MatrixError(f"crow_indices must rise from 0 to the {nnz} stored blocks without falling")
    if nnz == 0:
        return
    if int(col.min()) < 0 or int(col.max()) >= block_columns:
        raise MatrixError(f"col_indices must be in [0, {block_columns}), got {int(col.min())} to {int(col.max())}")
    rows = row_indices(crow, nnz)
    if bool(((rows.diff() == 0) & (col.diff() <= 0)).any()):
        raise MatrixError("col_indices must ascend, without repeats, within each block row")

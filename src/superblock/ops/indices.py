"""What the native core needs of a matrix's index tensors: checked and derived once, never stale."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from superblock.bsr import check_indices, row_indices
from superblock.errors import MatrixError


@dataclass(frozen=True, eq=False)
class Indices:
    """Checked int32 indices of a matrix of ``block_columns`` block columns."""

    crow: Tensor
    cols: Tensor
    block_columns: int

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(crow, cols, ids)`` of the transposed matrix; entry ``i`` of it is block ``ids[i]`` of this one."""
        ids = torch.argsort(self.cols, stable=True)
        crow = torch.zeros(self.block_columns + 1, dtype=torch.int32)
        crow[1:] = torch.bincount(self.cols, minlength=self.block_columns).cumsum(0)
        rows = row_indices(self.crow, self.cols.numel())
        return crow, rows[ids].int(), ids.int()


_Key = tuple[int, int, int, int, int, int, int]
_cache: dict[tuple[int, int], tuple[_Key, weakref.ref[Tensor], weakref.ref[Tensor], Indices]] = {}


def indices_of(crow_indices: Tensor, col_indices: Tensor, nnz: int, block_rows: int, block_columns: int) -> Indices:
    """The indices behind a pair of tensors, checked again only when either changed.

    Raises:
        MatrixError: the tensors do not index ``nnz`` blocks of a ``block_rows × block_columns`` grid.
    """
    names = (id(crow_indices), id(col_indices))
    try:
        key = (
            crow_indices.data_ptr(),
            crow_indices._version,
            col_indices.data_ptr(),
            col_indices._version,
            nnz,
            block_rows,
            block_columns,
        )
    except RuntimeError:  # Inference tensors count no versions, so nothing tells whether they changed.
        return _derive(crow_indices, col_indices, nnz, block_rows, block_columns)
    found = _cache.get(names)
    if found is not None and found[0] == key and found[1]() is crow_indices and found[2]() is col_indices:
        return found[3]
    derived = _derive(crow_indices, col_indices, nnz, block_rows, block_columns)

    def forget(_: object) -> None:
        _cache.pop(names, None)

    _cache[names] = (key, weakref.ref(crow_indices, forget), weakref.ref(col_indices, forget), derived)
    return derived


def _derive(crow: Tensor, col: Tensor, nnz: int, block_rows: int, block_columns: int) -> Indices:
    for name, index, length in (("crow_indices", crow, block_rows + 1), ("col_indices", col, nnz)):
        if index.device.type != "cpu" or index.dtype not in (torch.int32, torch.int64) or index.shape != (length,):
            raise MatrixError(
                f"{name} must be {length} entries of int32 or int64 on cpu, "
                f"got {tuple(index.shape)} of {index.dtype} on {index.device}"
            )
    check_indices(crow, col, block_columns)
    # A view of the same memory, or a copy: either keeps what it points to alive, so that no new tensor can take the
    # address that the key remembers.
    return Indices(crow.detach().int().contiguous(), col.detach().int().contiguous(), block_columns)

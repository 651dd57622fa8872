"""What a backend needs of a matrix's index tensors: checked and derived once, never stale."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

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
    sources: tuple[Tensor, ...] = ()  # What they were made of, whose addresses no other tensor may take.
    _transposed: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, init=False)

    def transposed(self, turn: tuple[int, ...] = (0,)) -> tuple[Tensor, Tensor, Tensor]:
        """``(crow, cols, ids)`` of the transposed matrix; entry ``i`` of it is block ``ids[i]`` of this one.

        Of a kernel of several places, as :func:`superblock.ops.convolution.matrix_of` lays it out, it is that of the
        kernel whose channels are exchanged and whose place ``p`` goes to ``turn[p]``, or is left out if that is -1.
        """
        found = self._transposed.get(turn)
        if found is None:
            blocks, block_rows = self.block_columns // len(turn), self.crow.numel() - 1
            place = torch.tensor(turn)[self.cols.long().div(blocks, rounding_mode="floor")]
            ids = (place >= 0).nonzero()[:, 0]
            block, rows = self.cols[ids].long() % blocks, row_indices(self.crow, self.cols.numel())[ids]
            cols = place[ids] * block_rows + rows
            order = torch.argsort(block * (len(turn) * block_rows) + cols)
            crow = torch.zeros(blocks + 1, dtype=torch.int32)
            crow[1:] = torch.bincount(block, minlength=blocks).cumsum(0)
            # Not a second one that another thread made meanwhile: the core is given addresses of the one that is kept.
            found = self._transposed.setdefault(turn, (crow, cols[order].int(), ids[order].int()))
        return found


_Derived = TypeVar("_Derived")
_Key = tuple[int, int, int, int, int, int, int]
Memory = dict[tuple[int, int], tuple[_Key, weakref.ref[Tensor], weakref.ref[Tensor], _Derived]]
_memory: Memory[Indices] = {}


def indices_of(crow_indices: Tensor, col_indices: Tensor, nnz: int, block_rows: int, block_columns: int) -> Indices:
    """The indices behind a pair of tensors, checked again only when either changed.

    Raises:
        MatrixError: the tensors do not index ``nnz`` blocks of a ``block_rows × block_columns`` grid.
    """
    return remembered(_memory, _derive, crow_indices, col_indices, nnz, block_rows, block_columns)


def remembered(
    memory: Memory[_Derived],
    derive: Callable[[Tensor, Tensor, int, int, int], _Derived],
    crow_indices: Tensor,
    col_indices: Tensor,
    nnz: int,
    block_rows: int,
    block_columns: int,
) -> _Derived:
    """What ``derive`` makes of a pair of tensors and their sizes, made again only when either changed.

    ``memory`` keeps it for as long as both tensors live. What is derived must keep alive what the tensors point to,
    so that no new tensor can take an address that the memory knows.
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
        return derive(crow_indices, col_indices, nnz, block_rows, block_columns)
    found = memory.get(names)
    if found is not None and found[0] == key and found[1]() is crow_indices and found[2]() is col_indices:
        return found[3]
    derived = derive(crow_indices, col_indices, nnz, block_rows, block_columns)

    def forget(_: object) -> None:
        memory.pop(names, None)

    memory[names] = (key, weakref.ref(crow_indices, forget), weakref.ref(col_indices, forget), derived)
    return derived


def _derive(crow: Tensor, col: Tensor, nnz: int, block_rows: int, block_columns: int) -> Indices:
    for name, index, length in (("crow_indices", crow, block_rows + 1), ("col_indices", col, nnz)):
        if index.device.type != "cpu" or index.dtype not in (torch.int32, torch.int64) or index.shape != (length,):
            raise MatrixError(
                f"{name} must be {length} entries of int32 or int64 on cpu, "
                f"got {tuple(index.shape)} of {index.dtype} on {index.device}"
            )
    check_indices(crow, col, block_columns)
    crow, col = crow.detach(), col.detach()
    # Copies: what writes past the version counter (`.data`, `.numpy()`) must not change what has been checked.
    own_crow, own_col = (
        index.to(torch.int32, copy=True, memory_format=torch.contiguous_format) for index in (crow, col)
    )
    return Indices(own_crow, own_col, block_columns, (crow, col))

"""How the kernels go through a matrix: derived from its index tensors once, on the host, then kept on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from superblock.bsr import check_indices, row_indices
from superblock.errors import BackendError
from superblock.ops.indices import Indices, Memory, remembered
from superblock.ops.triton.pairing import panels_of


@dataclass(frozen=True, eq=False)
class Walk:
    """The block columns that each panel of merged rows visits.

    ``starts [panels + 1]``, ``cols [steps]``, ``ids [steps, merged]`` (-1 where a row has no block there; ``None``
    where step and block are one), ``rows [panels, merged]`` (``None`` where panel and row are one) and
    ``order [panels]``, longest first, so that a launch ends on short ones.
    """

    starts: Tensor
    cols: Tensor
    ids: Tensor | None
    rows: Tensor | None
    order: Tensor
    panels: int
    steps: int


@dataclass(frozen=True, eq=False)
class Groups:
    """Runs of at most ``size`` stored blocks of one block row: ``starts [groups + 1]``, ``rows [groups]``."""

    starts: Tensor
    rows: Tensor
    groups: int


@dataclass(eq=False)
class Plan:
    """What has been derived from one pair of index tensors, and the configurations chosen for them."""

    indices: Indices
    held: tuple[Tensor, Tensor]
    block_rows: int
    nnz: int
    choices: dict[Any, Any] = field(default_factory=dict)
    _walks: dict[tuple[int, bool], Walk] = field(default_factory=dict)
    _groups: dict[int, Groups] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.held[0].device

    @property
    def density(self) -> float:
        """Stored blocks over all blocks."""
        return self.nnz / max(1, self.block_rows * self.indices.block_columns)

    def walk(self, merged: int, transposed: bool) -> Walk:
        """The walk of the matrix, or of its transpose, ``merged`` rows a panel."""
        key = (merged, transposed)
        if key not in self._walks:
            self._walks[key] = self._derive_walk(merged, transposed)
        return self._walks[key]

    def groups(self, size: int) -> Groups:
        """The stored blocks in runs of ``size``."""
        if size not in self._groups:
            counts = -(-self.indices.crow.diff() // size)
            rows = torch.arange(counts.numel()).repeat_interleave(counts)
            within = torch.arange(rows.numel()) - (counts.cumsum(0) - counts)[rows]
            starts = torch.cat([self.indices.crow[rows] + within * size, self.indices.crow[-1:]])
            self._groups[size] = Groups(self._place(starts), self._place(rows), rows.numel())
        return self._groups[size]

    def _derive_walk(self, merged: int, transposed: bool) -> Walk:
        if transposed:
            crow, cols, ids = self.indices.transposed()
            columns = self.block_rows
        else:
            crow, cols, columns = self.indices.crow, self.indices.cols, self.indices.block_columns
            ids = torch.arange(self.nnz)
        starts, steps, panels, merged_rows = crow, cols.numel(), crow.numel() - 1, None
        if merged > 1:
            rows = row_indices(crow, steps)
            living = torch.zeros(panels, columns, dtype=torch.bool)
            living[rows, cols] = True
            merged_rows = panels_of(living, merged)
            panels = len(merged_rows)
            place = merged_rows.flatten().argsort()[rows]
            union, step = torch.unique(place // merged * columns + cols, return_inverse=True)
            table = torch.full((union.numel(), merged), -1, dtype=torch.int32)
            table[step, place % merged] = ids.int()
            cols, ids, steps = union % columns, table, union.numel()
            starts = torch.zeros(panels + 1, dtype=torch.int64)
            starts[1:] = torch.bincount(union // columns, minlength=panels).cumsum(0)
        order = starts.diff().argsort(descending=True, stable=True)
        one_to_one = merged == 1 and not transposed
        return Walk(
            self._place(starts),
            self._place(cols),
            None if one_to_one else self._place(ids),
            None if merged_rows is None else self._place(merged_rows),
            self._place(order),
            panels,
            steps,
        )

    def _place(self, index: Tensor) -> Tensor:
        if index.numel() >= 2**31:
            raise BackendError(f"an index of {index.numel()} entries is more than the kernels' 32 bits count")
        _refuse_capture(self.device)
        return index.to(torch.int32).contiguous().to(self.device)


@dataclass(frozen=True, eq=False)
class Operand:
    """A block-sparse weight as the product reads it: as it is for ``x Wᵀ``, ``transposed`` for ``dy W``."""

    values: Tensor
    plan: Plan
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def out_features(self) -> int:
        return self.shape[self.transposed]

    @property
    def in_features(self) -> int:
        return self.shape[not self.transposed]

    @property
    def block_out(self) -> int:
        return self.values.shape[1 + self.transposed]

    @property
    def block_in(self) -> int:
        return self.values.shape[2 - self.transposed]

    @property
    def block(self) -> tuple[int, int]:
        return self.block_out, self.block_in

    @property
    def strides(self) -> dict[str, int]:
        """The kernel's arguments that say where an entry of a block lies."""
        block, *inner = self.values.stride()
        return {
            "w_block_stride": block,
            "w_out_stride": inner[self.transposed],
            "w_in_stride": inner[not self.transposed],
        }

    def walk(self, merged: int) -> Walk:
        return self.plan.walk(merged, self.transposed)


_memory: Memory[Plan] = {}


def plan_of(crow_indices: Tensor, col_indices: Tensor, nnz: int, block_rows: int, block_columns: int) -> Plan:
    """The plan behind a pair of index tensors on any device: made at their first use, which reads them back."""
    return remembered(_memory, _derive, crow_indices, col_indices, nnz, block_rows, block_columns)


def _derive(crow: Tensor, col: Tensor, nnz: int, block_rows: int, block_columns: int) -> Plan:
    _refuse_capture(crow.device)
    held = crow.detach(), col.detach()
    crow, col = crow.cpu(), col.cpu()
    check_indices(crow, col, block_columns)
    return Plan(Indices(crow.int().contiguous(), col.int().contiguous(), block_columns), held, block_rows, nnz)


def _refuse_capture(device: torch.device) -> None:
    """Plans go between host and device, which a graph cannot hold."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError("a CUDA graph captured the first product of a layer: run it once before capturing")

"""Tensor descriptors: whole tiles of a matrix fetched by the copy engine, which also fills what lies past its edges."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNED = 16


def describe(x: Tensor, tile: tuple[int, int]) -> TensorDescriptor | None:
    """A descriptor of tiles of ``x [rows, columns]``, or ``None`` where its rows do not start at 16 bytes."""
    row = x.stride(0) * x.element_size()
    if x.numel() == 0 or row % ALIGNED or x.data_ptr() % ALIGNED:
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(tile))

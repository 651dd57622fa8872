"""Tensors as the arguments of the native core: checked, laid out, pointed to."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from superblock.errors import BackendError, MatrixError
from superblock.ops import native
from superblock.ops.indices import Indices, indices_of

Norm = tuple[Tensor | None, Tensor | None, float]  # Weight, bias and epsilon of a layer norm.
# Values, row and column indices, bias, and the features that go out and come in.
Weight = tuple[Tensor, Tensor, Tensor, Tensor | None, int, int]


def weight_of(values: Tensor, indices: Indices, out_features: int, in_features: int) -> ctypes.Structure:
    """The weight, over blocks that lie one after another."""
    _, height, width = values.shape
    return native.Weight(
        values.data_ptr(), indices.crow.data_ptr(), indices.cols.data_ptr(), None,
        out_features, in_features, height, width, values.stride(1), values.stride(2), height * width,
    )  # fmt: skip


def indices_for(values: Tensor, crow: Tensor, col: Tensor, out_features: int, in_features: int) -> Indices:
    """The checked indices of a weight of these values."""
    nnz, height, width = values.shape
    return indices_of(crow, col, nnz, math.ceil(out_features / height), math.ceil(in_features / width))


def dense_blocks(values: Tensor) -> Tensor:
    """Blocks one after another, each dense in either order."""
    values = values.resolve_neg()
    _, height, width = values.shape
    if values.stride() in ((height * width, 1, height), (height * width, width, 1)):
        return values
    return values.contiguous()


def check_data(*tensors: Tensor | None) -> None:
    """Raise :class:`MatrixError` unless all elements lie in memory: a storage may have been freed."""
    for tensor in tensors:
        if tensor is not None and not tensor.data_ptr() and tensor.numel():
            raise MatrixError(
                f"expected tensors with data, got {tuple(tensor.shape)} whose storage is empty: fill it first"
            )


def rows_of(x: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """``[tokens, features]`` with a dense last dimension; a view wherever one exists."""
    if x.shape[-1] != features or x.dtype != dtype or not x.is_cpu:
        raise MatrixError(
            f"expected [..., {features}] of {dtype} on cpu, got {tuple(x.shape)} of {x.dtype} on {x.device}"
        )
    check_data(x)
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), features)
    return rows if rows.stride(1) == 1 or features == 1 else rows.contiguous()


def residual_rows(residual: Tensor, tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    """:func:`rows_of` a residual, of which there must be as many as the result has."""
    rows = rows_of(residual, features, dtype)
    if len(rows) != tokens:
        raise MatrixError(f"residual must have the {tokens} tokens of x, got {len(rows)}")
    return rows


def norm_of(norm: Norm, features: int, dtype: torch.dtype) -> ctypes.Structure:
    """A layer norm's parameters; ``alive`` keeps what it points to."""
    weight, bias, epsilon = norm
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.shape != (features,) or tensor.dtype != dtype or not tensor.is_cpu):
            raise MatrixError(
                f"the norm's {name} must be [{features}] of {dtype} on cpu, "
                f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
    check_data(weight, bias)
    dense = [None if tensor is None else tensor.resolve_neg().contiguous() for tensor in (weight, bias)]
    made = native.Norm(*(0 if tensor is None else tensor.data_ptr() for tensor in dense), epsilon, True)
    made.alive = dense
    return made


class UnsupportedError(BackendError):
    """What the core leaves to the steps that it would stand for."""


def check(status: int) -> None:
    """Raise :class:`BackendError` unless the core succeeded."""
    if status == native.UNSUPPORTED:
        raise UnsupportedError("the native CPU core leaves this to its steps")
    if status:
        raise BackendError("the native CPU core ran out of memory for its packed activations")

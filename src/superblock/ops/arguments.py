"""Tensors as the arguments of the native core: checked, laid out, pointed to."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from superblock.errors import BackendError, MatrixError
from superblock.ops import native
from superblock.ops.indices import Indices, indices_of


def product_of(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> ctypes.Structure:
    """A product that lacks only ``x`` and ``y``. Its ``alive`` keeps what it points to."""
    if values.dim() != 3 or values.device.type != "cpu":
        raise MatrixError(f"values must be [nnz, bh, bw] on cpu, got {tuple(values.shape)} on {values.device}")
    values = dense_blocks(values)
    indices = indices_for(values, crow_indices, col_indices, out_features, in_features)
    product = native.Product()
    product.weight = weight_of(values, indices, out_features, in_features)
    product.dtype = native.DTYPES[values.dtype]
    product.activation, product.threads = native.ACTIVATIONS[activation], torch.get_num_threads()
    if bias is not None:
        if bias.shape != (out_features,) or bias.dtype != values.dtype or bias.device.type != "cpu":
            raise MatrixError(
                f"bias must be [{out_features}] of {values.dtype} on cpu, "
                f"got {tuple(bias.shape)} of {bias.dtype} on {bias.device}"
            )
        bias = bias.contiguous()
        product.bias = bias.data_ptr()
    if residual is not None:
        residual = rows_of(residual, out_features, values.dtype)
        product.residual, product.residual_stride = residual.data_ptr(), residual.stride(0)
    product.alive = values, indices, bias, residual
    return product


def weight_of(values: Tensor, indices: Indices, out_features: int, in_features: int) -> ctypes.Structure:
    """The weight, over blocks that lie one after another."""
    _, height, width = values.shape
    return native.Weight(
        values.data_ptr(), indices.crow.data_ptr(), indices.cols.data_ptr(), None,
        out_features, in_features, height, width, values.stride(1), values.stride(2), height * width,
    )  # fmt: skip


def transposed_weight(values: Tensor, indices: Indices, out_features: int, in_features: int) -> ctypes.Structure:
    """The transposed weight, over the same values."""
    _, height, width = values.shape
    crow, cols, ids = indices.transposed
    return native.Weight(
        values.data_ptr(), crow.data_ptr(), cols.data_ptr(), ids.data_ptr(),
        in_features, out_features, width, height, values.stride(2), values.stride(1), height * width,
    )  # fmt: skip


def indices_for(values: Tensor, crow: Tensor, col: Tensor, out_features: int, in_features: int) -> Indices:
    """The checked indices of a weight of these values."""
    nnz, height, width = values.shape
    return indices_of(crow, col, nnz, math.ceil(out_features / height), math.ceil(in_features / width))


def dense_blocks(values: Tensor) -> Tensor:
    """Blocks one after another, each dense in either order."""
    _, height, width = values.shape
    if values.stride() in ((height * width, 1, height), (height * width, width, 1)):
        return values
    return values.contiguous()


def rows_of(x: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """``[tokens, features]`` with a dense last dimension; a view wherever one exists."""
    if x.shape[-1] != features or x.dtype != dtype or x.device.type != "cpu":
        raise MatrixError(
            f"expected [..., {features}] of {dtype} on cpu, got {tuple(x.shape)} of {x.dtype} on {x.device}"
        )
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), features)
    return rows if rows.stride(1) == 1 or features == 1 else rows.contiguous()


def check_residual(product: ctypes.Structure, tokens: int) -> None:
    """Raise :class:`MatrixError` unless a residual has as many rows as the result."""
    residual = product.alive[-1]
    if residual is not None and len(residual) != tokens:
        raise MatrixError(f"residual must have the {tokens} tokens of x, got {len(residual)}")


def check(status: int) -> None:
    """Raise :class:`BackendError` unless the core succeeded."""
    if status:
        raise BackendError("the native CPU core ran out of memory for its packed activations")

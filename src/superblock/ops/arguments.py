"""Tensors as the arguments of the native core: checked, laid out, pointed to."""

from __future__ import annotations

import ctypes
import math
import weakref

import torch
from torch import Tensor

from superblock.errors import BackendError, MatrixError
from superblock.ops import native
from superblock.ops.indices import Indices, indices_of

_Key = tuple[object, ...]
# By id of the values: what was true of a weight's tensors, the tensors, and the product they made.
_templates: dict[int, tuple[_Key, tuple[weakref.ref[Tensor], ...], ctypes.Structure, Indices]] = {}


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
    """A product that lacks only ``x`` and ``y``. Its ``alive`` keeps what it points to.

    What a weight's own tensors say of it is kept for as long as they live and checked again when any of them changed.
    """
    tensors: tuple[Tensor, ...] = (values, crow_indices, col_indices)
    if bias is not None:
        tensors += (bias,)
    key = _key(tensors, out_features, in_features, activation)
    found = _templates.get(id(values))
    if found is not None and found[0] == key and all(map(_is_of, found[1], tensors)):
        product, indices = native.Product.from_buffer_copy(found[2]), found[3]
    else:
        kept, indices, bias, product = _build(
            values, crow_indices, col_indices, bias, out_features, in_features, activation
        )
        if key is not None and kept is values and (bias is None or bias is tensors[3]):
            _remember(key, tensors, product, indices)
        values = kept
    product.threads = torch.get_num_threads()
    if residual is not None:
        residual = rows_of(residual, out_features, values.dtype)
        product.residual, product.residual_stride = residual.data_ptr(), residual.stride(0)
    product.alive = values, indices, bias, residual
    return product


def _is_of(reference: weakref.ref[Tensor], tensor: Tensor) -> bool:
    return reference() is tensor


def _key(tensors: tuple[Tensor, ...], out_features: int, in_features: int, activation: str) -> _Key | None:
    """What a product holds of its tensors; values and bias are read in place, so that their versions do not matter."""
    values, crow, col = tensors[:3]
    try:
        return (
            values.data_ptr(), values.shape, values.stride(), values.dtype,
            crow.data_ptr(), crow._version, col.data_ptr(), col._version,
            *((tensors[3].data_ptr(), tensors[3].shape, tensors[3].dtype, tensors[3].stride()) if tensors[3:] else ()),
            out_features, in_features, activation,
        )  # fmt: skip
    except RuntimeError:  # Inference tensors count no versions, meta tensors have no data: checked every time.
        return None


def _remember(key: _Key, tensors: tuple[Tensor, ...], product: ctypes.Structure, indices: Indices) -> None:
    name = id(tensors[0])

    def forget(_: object) -> None:
        _templates.pop(name, None)

    references = tuple(weakref.ref(tensor, forget) for tensor in tensors)
    _templates[name] = key, references, native.Product.from_buffer_copy(product), indices


def _build(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> tuple[Tensor, Indices, Tensor | None, ctypes.Structure]:
    if values.dim() != 3 or not values.is_cpu:
        raise MatrixError(f"values must be [nnz, bh, bw] on cpu, got {tuple(values.shape)} on {values.device}")
    values = dense_blocks(values)
    indices = indices_for(values, crow_indices, col_indices, out_features, in_features)
    product = native.Product()
    product.weight = weight_of(values, indices, out_features, in_features)
    product.dtype, product.activation = native.DTYPES[values.dtype], native.ACTIVATIONS[activation]
    if bias is not None:
        if bias.shape != (out_features,) or bias.dtype != values.dtype or not bias.is_cpu:
            raise MatrixError(
                f"bias must be [{out_features}] of {values.dtype} on cpu, "
                f"got {tuple(bias.shape)} of {bias.dtype} on {bias.device}"
            )
        bias = bias.contiguous()
        product.bias = bias.data_ptr()
    return values, indices, bias, product


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
    if x.shape[-1] != features or x.dtype != dtype or not x.is_cpu:
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

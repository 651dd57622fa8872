"""The CPU backend: the products of :mod:`superblock.ops.reference`, multiplied by the native core.

Weights whose blocks are stored feature-major (``values.stride() == (bh·bw, 1, bh)``, see :func:`pack`) are multiplied
where they lie. Any other layout is turned a panel at a time while it is multiplied; nothing is kept.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from superblock.errors import BackendError, MatrixError
from superblock.ops import native
from superblock.ops.indices import Indices, indices_of

MULTIPLE = 8


def unsupported(dtype: torch.dtype, block_height: int, block_width: int) -> str | None:
    """Why a case goes to the reference: said by ``superblock info``."""
    if dtype not in native.DTYPES:
        return f"the native core multiplies float32, bfloat16 and float16, not {dtype}"
    if block_height % MULTIPLE or block_width % MULTIPLE or not block_height or not block_width:
        return f"the native core takes block sides that are multiples of {MULTIPLE}, not {block_height} × {block_width}"
    return native.missing()


def pack(values: Tensor) -> Tensor:
    """The same values with the memory layout that the forward product reads fastest: equal, indexed alike."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> Tensor:
    """``y = act(x Wᵀ + b) + residual``."""
    return _linear(x, values, crow_indices, col_indices, bias, residual, out_features, in_features, activation, False)[
        0
    ]


def linear_with_preactivation(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``(act(z), z)`` with ``z = x Wᵀ + b``, in one pass."""
    y, z = _linear(x, values, crow_indices, col_indices, bias, None, out_features, in_features, activation, True)
    assert z is not None
    return y, z


def grad_input(
    grad: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, out_features: int, in_features: int
) -> Tensor:
    """``dx = dy W``: the forward product through the transposed index, over the same values."""
    values = _dense_blocks(values)
    indices = _indices(values, crow_indices, col_indices, out_features, in_features)
    crow, cols, ids = indices.transposed
    product = native.Product()
    _fill(product, native.DTYPES[values.dtype], "none")
    nnz, height, width = values.shape
    product.weight = native.Weight(
        values.data_ptr(), crow.data_ptr(), cols.data_ptr(), ids.data_ptr(),
        in_features, out_features, width, height, values.stride(2), values.stride(1), height * width,
    )  # fmt: skip
    return _run(product, grad, out_features, in_features)[0]


def grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    block_height: int,
    block_width: int,
) -> Tensor:
    """``dW = dyᵀ x`` at the stored blocks."""
    values = grad.new_empty(col_indices.shape[0], block_height, block_width)
    indices = _indices(values, crow_indices, col_indices, out_features, in_features)
    grad, x = _rows(grad, out_features), _rows(x, in_features)
    if grad.shape[0] != x.shape[0] or grad.dtype != x.dtype:
        raise MatrixError(
            f"grad and x must have the same tokens and dtype, got {tuple(grad.shape)} of {grad.dtype} and "
            f"{tuple(x.shape)} of {x.dtype}"
        )
    sampled = native.Sampled(
        _weight(values, indices, out_features, in_features), grad.data_ptr(), x.data_ptr(),
        x.shape[0], grad.stride(0), x.stride(0), native.DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    _check(native.library().sb_run_sampled(ctypes.byref(sampled)))
    return values


def _linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    values = _dense_blocks(values)
    indices = _indices(values, crow_indices, col_indices, out_features, in_features)
    product = native.Product()
    _fill(product, native.DTYPES[values.dtype], activation)
    product.weight = _weight(values, indices, out_features, in_features)
    if bias is not None:
        bias = _vector(bias, values.dtype, out_features)
        product.bias = bias.data_ptr()
    if residual is not None:
        residual = _rows(residual, out_features)
        product.residual, product.residual_stride = residual.data_ptr(), residual.stride(0)
    return _run(product, x, in_features, out_features, keep)


def _fill(product: ctypes.Structure, dtype: int, activation: str) -> None:
    product.dtype, product.activation, product.threads = dtype, native.ACTIVATIONS[activation], torch.get_num_threads()


def _run(
    product: ctypes.Structure, x: Tensor, in_features: int, out_features: int, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    rows = _rows(x, in_features)
    y = x.new_empty(*x.shape[:-1], out_features)
    z = torch.empty_like(y) if keep else None
    product.x, product.x_stride, product.tokens = rows.data_ptr(), rows.stride(0), rows.shape[0]
    product.y, product.y_stride = y.data_ptr(), out_features
    if z is not None:
        product.preactivation = z.data_ptr()
    _check(native.library().sb_run_product(ctypes.byref(product)))
    return y, z


def _weight(values: Tensor, indices: Indices, out_features: int, in_features: int) -> ctypes.Structure:
    _, height, width = values.shape
    return native.Weight(
        values.data_ptr(), indices.crow.data_ptr(), indices.cols.data_ptr(), None,
        out_features, in_features, height, width, values.stride(1), values.stride(2), height * width,
    )  # fmt: skip


def _indices(values: Tensor, crow: Tensor, col: Tensor, out_features: int, in_features: int) -> Indices:
    nnz, height, width = values.shape
    return indices_of(crow, col, nnz, math.ceil(out_features / height), math.ceil(in_features / width))


def _dense_blocks(values: Tensor) -> Tensor:
    """Blocks one after another, each dense in either order."""
    _, height, width = values.shape
    if values.stride() in ((height * width, 1, height), (height * width, width, 1)):
        return values
    return values.contiguous()


def _rows(x: Tensor, features: int) -> Tensor:
    """``[tokens, features]`` with a dense last dimension; a view wherever one exists."""
    rows = x if x.dim() == 2 else x.reshape(-1, features) if x.numel() else x.new_empty(0, features)
    return rows if rows.stride(1) == 1 or features == 1 else rows.contiguous()


def _vector(bias: Tensor, dtype: torch.dtype, features: int) -> Tensor:
    if bias.shape != (features,) or bias.dtype != dtype:
        raise MatrixError(f"bias must be [{features}] of {dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    return bias.contiguous()


def _check(status: int) -> None:
    if status:
        raise BackendError("the native CPU core ran out of memory for its packed activations")

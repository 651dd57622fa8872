"""Gradients as the native core takes them: structures, and the tensors that running them fills."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, get_num_threads

from superblock.errors import MatrixError
from superblock.ops import native
from superblock.ops.arguments import Weight, check_data, indices_for, rows_of, weight_of
from superblock.ops.prepared import prepare, product_of


def of_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, sizes: tuple[int, int, int, int], activation: str
) -> tuple[ctypes.Structure, Tensor]:
    """``dW = dyᵀ act(x)`` at the stored blocks, feature-major; sizes are ``out, in, bh, bw``."""
    out_features, in_features, block_height, block_width = sizes
    values = grad.new_empty(col.numel(), block_width, block_height).transpose(1, 2)
    indices = indices_for(values, crow, col, out_features, in_features)
    grad, x = rows_of(grad, out_features, grad.dtype), rows_of(x, in_features, grad.dtype)
    if len(grad) != len(x):
        raise MatrixError(f"grad and x must have the same tokens, got {len(grad)} and {len(x)}")
    sampled = native.Sampled(
        weight_of(values, indices, out_features, in_features), native.Window(), grad.data_ptr(), x.data_ptr(),
        len(x), grad.stride(0), x.stride(0), native.DTYPES[x.dtype], native.ACTIVATIONS[activation], get_num_threads(),
    )  # fmt: skip
    sampled.alive = grad, x, indices
    return sampled, values


def of_activation(grad: Tensor, z: Tensor, activation: str) -> tuple[ctypes.Structure, Tensor, Tensor]:
    """``dz = dy · act'(z)`` and ``db``, its sum over the tokens."""
    check_data(z)
    features = z.shape[-1]
    grads, rows = rows_of(grad, features, z.dtype), z.contiguous().view(-1, features)
    if len(grads) != len(rows):
        raise MatrixError(f"grad and z must have the same tokens, got {len(grads)} and {len(rows)}")
    dz, dbias = torch.empty_like(rows), z.new_empty(features)
    gradient = native.Gradient(
        grads.data_ptr(), rows.data_ptr(), dz.data_ptr(), dbias.data_ptr(), len(rows), features, grads.stride(0),
        native.DTYPES[z.dtype], native.ACTIVATIONS[activation], get_num_threads(),
    )  # fmt: skip
    gradient.alive = grads, rows
    return gradient, dz.view(z.shape), dbias


def of_bias(grad: Tensor) -> tuple[ctypes.Structure, Tensor]:
    """``db``, the sum of ``dy`` over the tokens."""
    features = grad.shape[-1]
    rows = rows_of(grad, features, grad.dtype)
    dbias = grad.new_empty(features)
    gradient = native.Gradient(
        rows.data_ptr(), 0, 0, dbias.data_ptr(), len(rows), features, rows.stride(0),
        native.DTYPES[grad.dtype], native.ACTIVATIONS["none"], get_num_threads(),
    )  # fmt: skip
    gradient.alive = rows
    return gradient, dbias


def of_feed_forward(
    grad: Tensor, z: Tensor, first: Weight, activation: str, second: Weight
) -> tuple[ctypes.Structure, Tensor, Tensor, Tensor]:
    """``dx = dz W₁``, ``dz = dy W₂ · act'(z)`` and ``db₁``, the sum of ``dz``."""
    dtype = first[0].dtype
    rows, preactivations = rows_of(grad, second[4], dtype), rows_of(z, first[4], dtype).contiguous()
    inner = product_of(prepare(*second[:3], None, second[4:], "none").transposed, len(rows))
    dz, dbias = z.new_empty(z.shape), z.new_empty(first[4])
    inner.activation = native.ACTIVATIONS[activation]
    inner.preactivation, inner.y_stride = dz.data_ptr(), first[4]
    inner.x, inner.x_stride = rows.data_ptr(), rows.stride(0)
    outer = product_of(prepare(*first[:3], None, first[4:], "none").transposed, len(rows))
    dx = grad.new_empty(*grad.shape[:-1], first[5])
    outer.y, outer.y_stride = dx.data_ptr(), first[5]
    whole = native.FeedForward(inner, outer, preactivations.data_ptr(), dbias.data_ptr())
    whole.alive = rows, preactivations, inner.alive, outer.alive
    return whole, dx, dz, dbias

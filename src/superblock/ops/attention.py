"""Scaled dot-product attention: the native core's in inference on the CPU, torch's own everywhere else."""

from __future__ import annotations

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from superblock.errors import MatrixError
from superblock.ops import library, native
from superblock.ops.arguments import check, check_data

MULTIPLE = 8

library._lib.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """``softmax(q kᵀ / √d + mask) v``: ``[n, heads, l, d]``, ``[n, heads, s, d]`` twice → ``[n, heads, l, d]``."""
    if mask is None and not dropout and not library.graded(q, k, v) and _supported(q, k, v):
        out: Tensor = torch.ops.superblock.attention(q, k, v)
        return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def check_heads(num_heads: int, features: int) -> None:
    """Raise :class:`MatrixError` unless so many features are those of so many heads."""
    if num_heads < 1 or features < 1 or features % num_heads:
        raise MatrixError(
            f"num_heads must be at least 1 and divide the {features} features of all heads, got {num_heads}"
        )


def _supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype in native.DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] % MULTIPLE == 0 < q.shape[-1]
        and q.shape[-1] == k.shape[-1] == v.shape[-1]
        and k.shape[-2] > 0
    )


def _compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dim() != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or not _supported(q, k, v):
        shapes = ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (q, k, v))
        raise MatrixError(
            f"attention takes [n, heads, tokens, d] of one dtype, d a multiple of {MULTIPLE}, got {shapes}"
        )
    check_data(q, k, v)
    if native.missing() is not None:  # Asked here, not above: a graph must not look at files while it is traced.
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().transpose(1, 2)
    batch, heads, queries, features = q.shape
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    y = q.new_empty(batch, queries, heads, features).transpose(1, 2)
    arguments = native.Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), batch, heads, queries, k.shape[2], features,
        *(stride for tensor in (q, k, v, y) for stride in tensor.stride()[:3]),
        1 / math.sqrt(features), native.DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    check(native.library().sb_run_attention(ctypes.byref(arguments)))
    return y


def _fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, queries, features = q.shape
    return q.new_empty(batch, queries, heads, features).transpose(1, 2)


library.implement("attention", _compute, _fake)

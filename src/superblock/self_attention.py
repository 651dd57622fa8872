"""Attention blocks whose two projections and what lies between them run as one in inference on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import superblock.ops.self_attention  # noqa: F401  Registers the op.
from superblock.fuse import fusible, watched
from superblock.nn import BSRLinear
from superblock.normalized import norm_of


def attend_as_one(
    in_proj: object, out_proj: object, num_heads: int, norm: nn.Module | None, x: Tensor
) -> Tensor | None:
    """``x + out_proj(attention(in_proj(norm(x))))``, ``x [n, l, e]``, or ``None`` where the parts must be called.

    That is one pass over ``x`` in inference on the CPU, where nobody watches and nothing needs a gradient.
    """
    if type(in_proj) is not BSRLinear or type(out_proj) is not BSRLinear or x.dim() != 3:
        return None
    inner, hidden = out_proj.in_features, out_proj.out_features
    fits = in_proj.out_features == 3 * inner and in_proj.in_features == hidden == x.shape[-1] and inner % num_heads == 0
    plain = in_proj.activation == out_proj.activation == "none" and not watched(in_proj, out_proj)
    inside = None if norm is None else norm_of(norm, x, in_proj)
    if not fits or not plain or (norm is not None and inside is None):
        return None
    if not fusible(x, in_proj.values, in_proj.bias, out_proj.values, out_proj.bias):
        return None
    y: Tensor = torch.ops.superblock.self_attention(
        x,
        *(inside or (None, None, None)),
        in_proj.values,
        in_proj.crow_indices,
        in_proj.col_indices,
        in_proj.bias,
        out_proj.values,
        out_proj.crow_indices,
        out_proj.col_indices,
        out_proj.bias,
        num_heads,
        inner,
    )
    return y

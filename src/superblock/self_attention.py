"""Attention blocks whose two projections and what lies between them run as one in inference on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import superblock.ops.self_attention  # noqa: F401  Registers the op.
from superblock.fuse import fusible, watched
from superblock.nn import BSRLinear
from superblock.normalized import norm_of
from superblock.ops import direct


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
    if not fits or not plain:
        return None
    inside = None if norm is None else norm_of(norm, x, in_proj)
    into, out = in_proj.tensors, out_proj.tensors
    if (norm is not None and inside is None) or not fusible(x, into[0], into[3], out[0], out[3]):
        return None
    whole = direct.self_attention(x, inside, (*into, 3 * inner, hidden), (*out, hidden, inner), num_heads)
    if whole is None:
        norms = inside or (None, None, None)
        whole = torch.ops.superblock.self_attention(x, *norms, *into, *out, num_heads, inner)
    return whole

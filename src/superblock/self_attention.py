"""Attention blocks whose two projections and what lies between them run as one in inference on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import superblock.ops.self_attention  # noqa: F401  Registers the op.
from superblock.fuse import fusible, watched
from superblock.nn import BSRLinear
from superblock.normalized import norm_of
from superblock.ops import cpu, direct
from superblock.ops.arguments import Norm, Weight
from superblock.ops.attention import check_heads
from superblock.ops.prepared import Chain


def attend_as_one(
    in_proj: object, out_proj: object, num_heads: int, norm: nn.Module | None, x: Tensor
) -> Tensor | None:
    """``x + out_proj(attention(in_proj(norm(x))))``, ``x [n, l, e]``, or ``None`` where the parts must be called.

    That is one pass over ``x`` in inference on the CPU, where nobody watches and nothing needs a gradient.
    """
    planned = _plan(in_proj, out_proj, num_heads, norm, x)
    if planned is None:
        return None
    inside, into, out = planned
    whole = direct.self_attention(x, inside, into, out, num_heads)
    if whole is None:
        norms = inside or (None, None, None)
        whole = torch.ops.superblock.self_attention(x, *norms, *into[:4], *out[:4], num_heads, out[5])
    return whole


def chain_of_attention(
    in_proj: object, out_proj: object, num_heads: int, norm: nn.Module | None, x: Tensor
) -> tuple[Chain, object] | None:
    """The same, prepared for tokens like ``x`` in plain inference, and the tensors that it reads; or ``None``."""
    planned = _plan(in_proj, out_proj, num_heads, norm, x)
    if planned is None:
        return None
    inside, into, out = planned
    chain = cpu.self_attention_chain(into, out, inside, num_heads)
    return None if chain is None else (chain, planned)


def _plan(
    in_proj: object, out_proj: object, num_heads: int, norm: nn.Module | None, x: Tensor
) -> tuple[Norm | None, Weight, Weight] | None:
    """The norm and both weights of an attention that runs as one on ``x``, or ``None``."""
    if type(in_proj) is not BSRLinear or type(out_proj) is not BSRLinear or x.dim() != 3:
        return None
    inner, hidden = out_proj.in_features, out_proj.out_features
    check_heads(num_heads, inner)
    fits = in_proj.out_features == 3 * inner and in_proj.in_features == hidden == x.shape[-1]
    plain = in_proj.activation == out_proj.activation == "none" and not watched(in_proj, out_proj)
    if not fits or not plain:
        return None
    inside = None if norm is None else norm_of(norm, x, in_proj)
    into, out = in_proj.tensors, out_proj.tensors
    if (norm is not None and inside is None) or not fusible(x, into[0], into[3], out[0], out[3]):
        return None
    return inside, (*into, 3 * inner, hidden), (*out, hidden, inner)

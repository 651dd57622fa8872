"""Products of the native core, checked once and remembered for as long as nothing that was checked changes."""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from superblock.errors import BackendError, MatrixError
from superblock.ops import native
from superblock.ops.arguments import Norm, dense_blocks, indices_for, norm_of, weight_of
from superblock.ops.indices import Indices


@dataclass(frozen=True, eq=False)
class Prepared:
    """A product that lacks only its rows: one structure for all calls, from any thread."""

    product: ctypes.Structure
    run: Callable[[bytes], int]  # With the rows that `native.pack_rows` makes.
    dtype: torch.dtype
    out_features: int
    in_features: int
    indices: Indices
    copies: tuple[Tensor, ...] = ()  # What the product points to that is not a tensor of the caller.
    made: dict[str, Any] = field(default_factory=dict, init=False)  # What it is a part of, the last of every kind.

    @cached_property
    def transposed(self) -> Prepared:
        """The product with the transposed weight, over the same values, without bias and activation."""
        product = native.Product(dtype=self.product.dtype)
        product.weight = self.transposed_weight()
        return replace(
            self,
            product=product,
            run=_runner(product),
            out_features=self.in_features,
            in_features=self.out_features,
        )

    def transposed_weight(self, channels: int | None = None, turn: tuple[int, ...] = (0,)) -> ctypes.Structure:
        """The transposed weight, or a kernel of so many channels turned as :meth:`Indices.transposed` does."""
        weight, addresses = self.product.weight, [index.data_ptr() for index in self.indices.transposed(turn)]
        length = weight.out_features
        if len(turn) > 1:  # Whole blocks at every place.
            length = (max(turn) + 1) * math.ceil(length / weight.block_out) * weight.block_out
        return native.Weight(
            weight.values, *addresses, channels or weight.in_features, length,
            weight.block_in, weight.block_out, weight.in_stride, weight.out_stride, weight.block_stride,
        )  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """A product that may normalize its rows, and one that may follow it, that lack only those rows."""

    run: Callable[[bytes], int]
    address: int  # Of the structure that it runs, which lives as long as this does.
    dtype: torch.dtype
    out_features: int  # Of the last.
    in_features: int  # Of the first.
    made_of: tuple[object, ...]  # The second, the norm and the heads: what was true when the structure was filled in.


# By id of the values, for as long as they live, and by what a training step multiplies with and without: what was true
# of the tensors, both indices, and what was prepared.
_Name = tuple[int, str, bool]
_memory: dict[_Name, tuple[tuple[object, ...], Tensor, Tensor, Prepared, weakref.ref[Tensor]]] = {}


def prepare(
    values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, shape: tuple[int, int], activation: str
) -> Prepared:
    """``act(x Wᵀ + b)`` for any ``x``: checked again when anything changed that a product holds of its tensors.

    Values and bias are read in place, so that only the indices' versions matter.

    Raises:
        MatrixError: shapes, dtypes or devices do not fit.
        BackendError: the native core does not take such a weight.
    """
    try:
        state = (
            values.data_ptr(), values.shape, values.stride(), values.dtype, values.is_neg(),
            crow.data_ptr(), crow._version, col.data_ptr(), col._version, shape,
            None if bias is None else (bias.data_ptr(), bias.shape, bias.is_contiguous(), bias.is_neg(), bias.dtype),
        )  # fmt: skip
    except RuntimeError:  # Inference tensors count no versions, meta tensors have no data: checked every time.
        return _build(values, crow, col, bias, shape, activation)
    name = id(values), activation, bias is None
    found = _memory.get(name)
    if found is not None and found[0] == state and found[1] is crow and found[2] is col:
        return found[3]
    prepared = _build(values, crow, col, bias, shape, activation)
    if not prepared.copies:
        if isinstance(values, Parameter) and os.getpid() == native.PROCESS:  # Kept, and shared with no parent.
            native.library().sb_move_to_huge_pages(values.data_ptr(), values.nbytes)
        _memory[name] = state, crow, col, prepared, weakref.ref(values, lambda _: _memory.pop(name, None))
    return prepared


def _build(
    values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, shape: tuple[int, int], activation: str
) -> Prepared:
    if values.dim() != 3 or not values.is_cpu:
        raise MatrixError(f"values must be [nnz, bh, bw] on cpu, got {tuple(values.shape)} on {values.device}")
    for tensor in (values, bias):
        if tensor is not None and tensor.is_cpu and tensor.numel() and not tensor.data_ptr():  # It only wraps others.
            raise BackendError(f"the native core reads tensors with data of their own, not a {type(tensor).__name__}")
    reason = native.unsupported(values.dtype, *values.shape[1:])
    if reason is not None:
        raise BackendError(reason)
    blocks = dense_blocks(values)
    indices = indices_for(blocks, crow, col, *shape)
    product = native.Product(dtype=native.DTYPES[values.dtype], activation=native.ACTIVATIONS[activation])
    product.weight = weight_of(blocks, indices, *shape)
    copies: tuple[Tensor, ...] = () if blocks is values else (blocks,)
    if bias is not None:
        if bias.shape != shape[:1] or bias.dtype != values.dtype or not bias.is_cpu:
            raise MatrixError(
                f"bias must be [{shape[0]}] of {values.dtype} on cpu, "
                f"got {tuple(bias.shape)} of {bias.dtype} on {bias.device}"
            )
        dense = bias.resolve_neg().contiguous()
        copies += () if dense is bias else (dense,)
        product.bias = dense.data_ptr()
    return Prepared(product, _runner(product), values.dtype, *shape, indices, copies)


def _runner(product: ctypes.Structure) -> Callable[[bytes], int]:
    return partial(native.library().sb_run_rows, ctypes.byref(product))


def chain(first: Prepared, second: Prepared | None, norm: Norm | None, heads: int = 0) -> Chain:
    """A normalized product, a feed-forward or, of so many heads, self-attention: made again when anything changed.

    Raises:
        MatrixError: the weights are of two dtypes, or the norm's parameters do not fit.
    """
    if second is not None and first.dtype != second.dtype:
        raise MatrixError(f"both weights must be of one dtype, got {first.dtype} and {second.dtype}")
    made_of = second, None if norm is None else (_state_of(norm[0]), _state_of(norm[1]), norm[2]), heads
    kind = "normalized" if second is None else "self_attention" if heads else "feed_forward"
    found: Chain | None = first.made.get(kind)
    if found is not None and found.made_of == made_of:
        return found
    inner = native.Product.from_buffer_copy(first.product)
    copies: tuple[Tensor, ...] = ()
    if norm is not None:
        inner.norm = norms = norm_of(norm, first.in_features, first.dtype)
        copies = tuple(kept for kept, given in zip(norms.alive, norm[:2], strict=True) if kept is not given)
    core, last = native.library(), first if second is None else second
    if second is None:
        whole, function = inner, core.sb_run_rows
    elif heads:
        features = second.in_features // heads
        whole = native.SelfAttention(inner, second.product, 0, heads, features, features**-0.5)
        function = core.sb_run_self_attention_rows
    else:
        whole, function = native.FeedForward(inner, second.product), core.sb_run_feed_forward_rows
    whole.alive = copies, first.copies, first.indices  # And the second, which the chain keeps.
    run, address = partial(function, ctypes.byref(whole)), ctypes.addressof(whole)
    made = Chain(run, address, first.dtype, last.out_features, first.in_features, made_of)
    if not copies and not last.copies:
        first.made[kind] = made
    return made


def _state_of(tensor: Tensor | None) -> tuple[object, ...] | None:
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.is_contiguous(), tensor.is_neg(), tensor.is_cpu


def product_of(prepared: Prepared, tokens: int) -> ctypes.Structure:
    """A product of so many tokens for the caller to complete. Its ``alive`` keeps what it points to."""
    product = native.Product.from_buffer_copy(prepared.product)
    product.tokens, product.threads = tokens, torch.get_num_threads()
    product.alive = prepared
    return product

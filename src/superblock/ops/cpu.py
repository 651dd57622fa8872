"""The CPU backend: the products of :mod:`superblock.ops.reference`, multiplied by the native core.

Weights laid out by :func:`superblock.ops.layout.feature_major` are multiplied where they lie; those of any other layout
are turned once a call. No copy of them is kept, so none can be stale.
"""

from __future__ import annotations

import math
from ctypes import byref, c_void_p

from torch import Tensor, get_num_threads

from superblock.errors import MatrixError
from superblock.ops import cpu_gradients, native
from superblock.ops.arguments import Norm, UnsupportedError, Weight, check, check_data, residual_rows, rows_of
from superblock.ops.cpu_conv2d import conv2d as conv2d
from superblock.ops.cpu_conv2d_gradients import conv2d_grad_input as conv2d_grad_input
from superblock.ops.cpu_conv2d_gradients import conv2d_grad_values as conv2d_grad_values
from superblock.ops.native import pack_rows
from superblock.ops.native import unsupported as unsupported
from superblock.ops.prepared import Chain, Prepared, chain, prepare


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
    prepared = prepare(values, crow_indices, col_indices, bias, (out_features, in_features), activation)
    return multiply(x, prepared, residual)


def multiply(
    x: Tensor,
    prepared: Prepared | Chain,
    residual: Tensor | None = None,
    preactivation: Tensor | None = None,
    sequences: int = 0,
) -> Tensor:
    """What was prepared, of the rows of ``x``; its preactivations too, where there is a dense tensor for them."""
    *leading, features = x.shape
    if features == prepared.in_features and x.dtype == prepared.dtype and x.is_contiguous() and x.is_cpu:
        rows, stride = x, features
    else:
        rows = rows_of(x, prepared.in_features, prepared.dtype)
        stride = rows.stride(0)
    tokens, added, added_stride = math.prod(leading), 0, prepared.out_features
    y = x.new_empty(*leading, added_stride)  # Sizes in a tuple take torch 0.4 µs longer.
    if residual is not None:
        if residual.shape != y.shape or residual.dtype != y.dtype or not (residual.is_contiguous() and residual.is_cpu):
            residual = residual_rows(residual, tokens, prepared.out_features, prepared.dtype)
            added_stride = residual.stride(0)
        added = residual.data_ptr()
    address = rows.data_ptr()
    if not address or (residual is not None and not added):  # There are no tokens, or they were freed.
        check_data(rows, residual)
    z = 0 if preactivation is None else preactivation.data_ptr()
    status = prepared.run(
        pack_rows(address, added, y.data_ptr(), z, tokens, stride, added_stride, get_num_threads(), sequences)
    )
    if status:
        check(status)
    return y


def linear_normalized(
    x: Tensor,
    norm: Norm,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    in_features: int,
    activation: str,
) -> Tensor:
    """``y = act(norm(x) Wᵀ + b) + residual``: tokens are normalized while they are packed."""
    prepared = prepare(values, crow_indices, col_indices, bias, (out_features, in_features), activation)
    return multiply(x, chain(prepared, None, norm), residual)


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
    prepared = prepare(values, crow_indices, col_indices, bias, (out_features, in_features), activation)
    z = x.new_empty(*x.shape[:-1], out_features)
    return multiply(x, prepared, preactivation=z), z


def grad_input(
    grad: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, out_features: int, in_features: int
) -> Tensor:
    """``dx = dy W``: the forward product through the transposed index, over the same values."""
    prepared = prepare(values, crow_indices, col_indices, None, (out_features, in_features), "none")
    return multiply(grad, prepared.transposed)


def grad_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    in_features: int,
    block_height: int,
    block_width: int,
    activation: str = "none",
) -> Tensor:
    """``dW = dyᵀ act(x)`` at the stored blocks, feature-major."""
    sizes = (out_features, in_features, block_height, block_width)
    sampled, values = cpu_gradients.of_values(grad, x, crow_indices, col_indices, sizes, activation)
    check(native.library().sb_run_sampled(byref(sampled)))
    return values


def activation_gradient(grad: Tensor, z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``dz = dy · act'(z)`` and ``db``, its sum over the tokens, in one pass."""
    gradient, dz, dbias = cpu_gradients.of_activation(grad, z, activation)
    check(native.library().sb_run_activation_gradient(byref(gradient)))
    return dz, dbias


def bias_gradient(grad: Tensor) -> Tensor:
    """``db``, the sum of ``dy`` over the tokens."""
    gradient, dbias = cpu_gradients.of_bias(grad)
    check(native.library().sb_run_activation_gradient(byref(gradient)))
    return dbias


# Below this many tokens a thread, sharing out block rows beats sharing out tokens: two products, hidden in memory.
FUSED_TOKENS = 24


def feed_forward(
    x: Tensor,
    first: Weight,
    activation: str,
    second: Weight,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """``y = act(norm(x) W₁ᵀ + b₁) W₂ᵀ + b₂ + residual``: a tile's hidden activations stay in the cache."""
    if not splits(x):
        return multiply(x, feed_forward_chain(first, activation, second, norm), residual)
    _check_chain(first, second)
    into, out = prepare(*first[:4], first[4:], activation), prepare(*second[:4], second[4:], "none")
    hidden = multiply(x, into if norm is None else chain(into, None, norm))
    return multiply(hidden, out, residual)


def feed_forward_chain(first: Weight, activation: str, second: Weight, norm: Norm | None) -> Chain:
    """:func:`feed_forward`, of tokens that are not too few, prepared for any rows and residual."""
    _check_chain(first, second)
    return chain(prepare(*first[:4], first[4:], activation), prepare(*second[:4], second[4:], "none"), norm)


def feed_forward_with_preactivation(
    x: Tensor, first: Weight, activation: str, second: Weight, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`feed_forward` and ``z = x W₁ᵀ + b₁``, which is all of the hidden size that passes through memory.

    Features of ``z`` that no block of ``W₂`` reads are any finite numbers: their gradients are zero.
    """
    _check_chain(first, second)
    into, out = prepare(*first[:4], first[4:], activation), prepare(*second[:4], second[4:], "none")
    z = x.new_empty(*x.shape[:-1], first[4])
    if splits(x):
        return multiply(multiply(x, into, preactivation=z), out, residual), z
    return multiply(x, chain(into, out, None), residual, z), z


def feed_forward_gradient(
    grad: Tensor, z: Tensor, first: Weight, activation: str, second: Weight
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx = dz W₁``, ``dz = dy W₂ · act'(z)`` and ``db₁``, the sum of ``dz``, of :func:`feed_forward`.

    ``dy W₂`` never passes through memory. The result is the same on any number of threads.
    """
    _check_chain(first, second)
    if z.shape != (*grad.shape[:-1], first[4]):
        raise MatrixError(f"z must be {(*grad.shape[:-1], first[4])}, got {tuple(z.shape)}")
    if splits(grad):
        dz, dbias = activation_gradient(grad_input(grad, *second[:3], *second[4:]), z, activation)
        return grad_input(dz, *first[:3], *first[4:]), dz, dbias
    whole, dx, dz, dbias = cpu_gradients.of_feed_forward(grad, z, first, activation, second)
    check(native.library().sb_run_feed_forward(byref(whole)))
    return dx, dz, dbias


def feed_forward_gradients(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    first: Weight,
    activation: str,
    second: Weight,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``dx`` and ``db₁`` of :func:`feed_forward_gradient`, and what is needed of ``dvalues₁``, ``dvalues₂``, ``db₂``.

    All in one call, of tokens that are not too few.
    """
    back, dx, dz, dbias1 = cpu_gradients.of_feed_forward(grad, z, first, activation, second)
    need_values1, need_values2, need_bias2 = needs
    of_first = of_second = of_bias = dvalues1 = dvalues2 = dbias2 = None
    if need_values1:
        values, crow, col, _, *sizes = first
        of_first, dvalues1 = cpu_gradients.of_values(dz, x, crow, col, (*sizes, *values.shape[1:]), "none")
    if need_values2:
        values, crow, col, _, *sizes = second
        of_second, dvalues2 = cpu_gradients.of_values(grad, z, crow, col, (*sizes, *values.shape[1:]), activation)
    if need_bias2:
        of_bias, dbias2 = cpu_gradients.of_bias(grad)
    check(native.library().sb_run_feed_forward_gradients(back, of_first, of_second, of_bias))
    return dx, dbias1, dvalues1, dvalues2, dbias2


def _check_chain(first: Weight, second: Weight) -> None:
    """The second weight must take what the first gives."""
    hidden, second_in = first[4], second[5]
    if hidden != second_in or first[0].dtype != second[0].dtype:
        raise MatrixError(
            f"the second weight must take the first's {hidden} outputs in {first[0].dtype}, "
            f"got {second_in} in {second[0].dtype}"
        )


def splits(x: Tensor) -> bool:
    """Whether the two products of a feed-forward take less time than both as one."""
    return math.prod(x.shape[:-1]) < FUSED_TOKENS * get_num_threads()


def self_attention(x: Tensor, norm: Norm | None, first: Weight, second: Weight, num_heads: int) -> Tensor | None:
    """``y = x + attention(norm(x) W₁ᵀ + b₁) W₂ᵀ + b₂`` of ``x [n, l, e]``, a sequence or a head at a time.

    ``None`` where that would take longer than the three steps: of long sequences, or too few heads for the threads; and
    where heads and blocks do not cover each other.
    """
    whole = self_attention_chain(first, second, norm, num_heads)
    if whole is None or not x.numel():
        return None
    try:
        return multiply(x, whole, x, sequences=x.shape[0])
    except UnsupportedError:
        return None


def self_attention_chain(first: Weight, second: Weight, norm: Norm | None, num_heads: int) -> Chain | None:
    """:func:`self_attention` prepared for any rows, or ``None`` where the features of a head are no multiple of 8."""
    if second[5] // num_heads % native.MULTIPLE:
        return None
    into, out = prepare(*first[:4], first[4:], "none"), prepare(*second[:4], second[4:], "none")
    return chain(into, out, norm, num_heads)


def encoder(x: Tensor, blocks: list[tuple[Chain, Chain]]) -> Tensor | None:
    """``z = y + feed_forward(y)``, ``y = x + self_attention(x)``, then the next block of ``z``: all in one call.

    ``x [n, l, e]`` is not empty, and every chain takes and gives ``e`` features. ``None`` as in :func:`self_attention`.
    """
    rows = rows_of(x, blocks[0][0].in_features, blocks[0][0].dtype)
    y, between = rows.new_empty(x.shape), rows.new_empty(rows.shape)
    addresses = [chain.address for block in blocks for chain in block]
    status = native.library().sb_run_encoder_rows(
        (c_void_p * len(addresses))(*addresses), len(blocks), between.data_ptr(),
        pack_rows(rows.data_ptr(), 0, y.data_ptr(), 0, len(rows), rows.stride(0), 0, get_num_threads(), x.shape[0]),
    )  # fmt: skip
    try:
        check(status)
    except UnsupportedError:
        return None
    return y

"""Layers whose weight is stored as BSR: they hold tensors and call one op."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import superblock.ops.normalized  # noqa: F401  Registers the op.
from superblock.bsr import BSRMatrix, dense_of
from superblock.errors import MatrixError, ModelError
from superblock.ops.arguments import Norm as Norm
from superblock.ops.attention import attention, check_heads
from superblock.ops.conv2d import bsr_conv2d
from superblock.ops.convolution import dense_kernel, pair_of
from superblock.ops.cpu_conv2d import Turns
from superblock.ops.layout import feature_major
from superblock.ops.library import ACTIVATIONS, product
from superblock.weight_read import WeightRead


class BSRWeight(nn.Module):
    """The tensors of a block-sparse weight and its bias: the state shared by every BSR layer.

    ``values [nnz, bh, bw]`` and ``bias [out]`` are parameters, ``crow_indices`` and ``col_indices`` buffers.
    """

    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None

    def __init__(self, weight: BSRMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        trainable = weight.values.is_floating_point()
        values = feature_major(weight.values.detach()) if weight.values.device.type == "cpu" else weight.values.detach()
        self.values = nn.Parameter(values, requires_grad=trainable)
        self.register_buffer("crow_indices", _counted(weight.crow_indices))
        self.register_buffer("col_indices", _counted(weight.col_indices))
        own_bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", own_bias)

    @property
    def matrix(self) -> BSRMatrix:
        """The weight as a :class:`BSRMatrix` over the layer's own tensors."""
        return BSRMatrix(self.crow_indices, self.col_indices, self.values, (self.out_features, self.in_features))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``values``, ``crow_indices``, ``col_indices`` and ``bias``."""
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        try:  # Past nn.Module.__getattr__, which takes 0.4 µs for each.
            return parameters["values"], buffers["crow_indices"], buffers["col_indices"], parameters["bias"]
        except KeyError:  # Parametrized, or replaced by plain tensors.
            return self.values, self.crow_indices, self.col_indices, self.bias

    @property
    def weight(self) -> Any:
        """Read by parents that pass a layer's weight to ``F.linear`` themselves, or ask for its device or shape."""
        return WeightRead(self)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return self.out_features, self.in_features

    def dense(self, values: Tensor | None = None) -> Tensor:
        """The weight as a dense tensor; of other ``values`` at its places, if given."""
        values = self.values if values is None else values
        return dense_of(values, self.crow_indices, self.col_indices, (self.out_features, self.in_features))

    def project(
        self, x: Tensor, activation: str = "none", residual: Tensor | None = None, norm: Norm | None = None
    ) -> Tensor:
        """``act(norm(x) Wᵀ + b) + residual``; with a norm, without gradients and on the CPU alone."""
        shape = (self.out_features, self.in_features)
        if norm is None:
            return product(x, *self.tensors, shape, activation, residual)
        y: Tensor = torch.ops.superblock.bsr_linear_normalized(x, *norm, *self.tensors, residual, *shape, activation)
        return y

    def extra_repr(self) -> str:
        bh, bw = self.values.shape[1:]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize=({bh}, {bw}), nnz={self.values.shape[0]}"
        )


def _counted(index: Tensor) -> Tensor:
    """The index as a tensor that counts its changes, also where a layer is built in inference mode.

    One that does not would be checked again at every call, which takes longer than a small product.
    """
    with torch.inference_mode(False):
        return index.clone() if index.is_inference() else index


class BSRLinear(BSRWeight):
    """A linear layer over a block-sparse weight: ``y = act(x Wᵀ + b)``, ``x [..., in]`` → ``[..., out]``.

    ``activation`` is ``none`` until :func:`superblock.fuse.fuse_activations` moves one in.
    """

    activation = "none"

    def forward(self, x: Tensor) -> Tensor:
        values, crow, col, bias = self.tensors  # Unpacked again by a star it would take longer.
        return product(x, values, crow, col, bias, (self.out_features, self.in_features), self.activation)

    def extra_repr(self) -> str:
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return super().extra_repr() + fused


class BSRConv2d(BSRWeight):
    """A convolution over a block-sparse kernel: ``y = act(conv(x, W) + b + residual)``.

    ``x [n, in, h, w]`` → ``[n, out, h', w']``. Pixels lie one after another in the result (``torch.channels_last``);
    an ``x`` in that memory format is read where it lies.

    Args:
        weight: the kernel as the matrix that :func:`superblock.ops.convolution.matrix_of` makes of it.
        stride, dilation: one number for height and width, or one for each.
        padding: likewise, on both sides, or ``(left, right, top, bottom)``.
        kernel_shape: ``(out, in / groups, kernel height, kernel width)``; by default a 1×1 kernel.
    """

    activation = "none"

    def __init__(
        self,
        weight: BSRMatrix,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "zeros",
        kernel_shape: tuple[int, ...] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(weight, bias)
        self.stride = pair_of("stride", stride)
        self.padding = padding if _has_four_sides(padding) else pair_of("padding", padding)
        self.padding_mode = padding_mode
        self.kernel_shape = kernel_shape or (*weight.shape, 1, 1)
        self.dilation = pair_of("dilation", dilation)
        self.groups = groups

    @property
    def in_channels(self) -> int:
        """As ``nn.Conv2d`` has it, for parents that ask."""
        return self.kernel_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Likewise."""
        return self.kernel_shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Likewise."""
        return self.kernel_shape[2:]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(out, in / groups, kernel height, kernel width)``."""
        return self.kernel_shape

    def dense(self, values: Tensor | None = None) -> Tensor:
        """The kernel as a dense tensor; of other ``values`` at its places, if given."""
        values = self.values if values is None else values
        return dense_kernel(values, self.crow_indices, self.col_indices, self.kernel_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.activation)

    def convolve(self, x: Tensor, activation: str, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x, W) + b + residual)``."""
        images = x if x.dim() == 4 else x.unsqueeze(0)
        padding = self.padding
        if len(padding) == 4 or (any(padding) and self.padding_mode != "zeros"):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            sides = padding if len(padding) == 4 else (padding[1], padding[1], padding[0], padding[0])
            images, padding = F.pad(images, sides, mode=mode), (0, 0)
        y = bsr_conv2d(
            images,
            *self.tensors,
            residual,
            self.kernel_shape,
            self.stride,
            (padding[0], padding[1]),
            self.dilation,
            self.groups,
            activation,
        )
        return y if x.dim() == 4 else y.squeeze(0)

    def is_one_product(self, activation: str) -> bool:
        """Whether :meth:`convolve` is, so that it can be deferred."""
        zeros = self.padding_mode == "zeros" or not any(self.padding)
        return self.groups == 1 and len(self.padding) == 2 and zeros and activation in ACTIVATIONS

    def defer(self, x: Tensor, activation: str, residual: Tensor | None, turns: Turns) -> Tensor:
        """:meth:`convolve` in its turn, where that is one product; ``x [n, in, h, w]``."""
        geometry = self.kernel_shape, self.stride, (self.padding[0], self.padding[1]), self.dilation, 1
        return turns.add(x, self.tensors, residual, geometry, activation)

    def extra_repr(self) -> str:
        _, channels, *kernel = self.kernel_shape
        bh, bw = self.values.shape[1:]
        shown = {
            "kernel_size": tuple(kernel),
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": self.bias is not None,
            "blocksize": (bh, bw),
            "nnz": self.values.shape[0],
            **({} if self.activation == "none" else {"activation": self.activation}),
        }
        told = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{channels * self.groups}, {self.out_features}, {told}"


def _has_four_sides(padding: int | tuple[int, ...]) -> TypeGuard[tuple[int, ...]]:
    return isinstance(padding, tuple | list) and len(padding) == 4


class FoldedBatchNorm(nn.Identity):
    """Stands where a batch norm was that has moved ``into`` the layer of that name beside it."""

    def __init__(self, into: str) -> None:
        super().__init__()
        self.into = into


class BSRMultiheadAttention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` over block-sparse projections and ``scaled_dot_product_attention``.

    Takes and returns what the original does: ``query [n, l, e]`` (``[l, n, e]`` unless ``batch_first``, ``[l, e]``
    without a batch) → ``(output, attention weights or None)``. Either projection may also be a dense ``nn.Linear``.
    A ``residual`` of the query's shape is added to the output; a ``norm`` is taken of what comes in.
    """

    # nn.TransformerEncoderLayer reads this: False keeps it from its fused kernel, which takes dense weights only.
    _qkv_same_embed_dim = False

    def __init__(
        self, in_proj: nn.Module, out_proj: nn.Module, num_heads: int, dropout: float = 0.0, batch_first: bool = False
    ) -> None:
        super().__init__()
        check_heads(num_heads, out_proj.in_features)  # type: ignore[arg-type]
        self.in_proj = in_proj
        self.out_proj = out_proj
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first

    @property
    def in_proj_weight(self) -> Any:
        """Read by ``nn.TransformerEncoder``, which leaves nested tensors alone where it is no plain tensor."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Read by ``nn.TransformerEncoderLayer``."""
        return self.in_proj.get_parameter("bias") if self.in_proj.bias is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ModelError("is_causal only says what attn_mask holds, and there is none: pass attn_mask too")
        q, k, v = (self._batch_first(part, batched) for part in self._project(query, key, value, norm))
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[1], batched)
        dropout = self.dropout if self.training else 0.0
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = None
        if need_weights:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            heads = F.dropout(weights, dropout) @ v
        else:
            heads = attention(q, k, v, mask, dropout)
        out = self._project_out(heads.transpose(1, 2).flatten(2), residual, batched)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """As the original: what does not fit together is refused, not broadcast."""
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            dimensions = f"{query.dim()}, {key.dim()} and {value.dim()}"
            raise MatrixError(f"query, key and value must have 3 dimensions, or 2 without a batch, got {dimensions}")
        batch = slice(0, query.dim() - 2) if self.batch_first else slice(1, query.dim() - 1)
        if key.shape[:-1] != value.shape[:-1] or key.shape[batch] != query.shape[batch]:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
            raise MatrixError(f"key and value must have the batch of query, and as many tokens each, got {shapes}")

    def _project(self, query: Tensor, key: Tensor, value: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all that is projected from the same tensor."""

        def project(x: Tensor) -> tuple[Tensor, ...]:
            if norm is None:
                parts: tuple[Tensor, ...] = self.in_proj(x).chunk(3, -1)
                return parts
            assert isinstance(self.in_proj, BSRLinear)  # By whoever passes a norm.
            return self.in_proj.project(x, norm=norm).chunk(3, -1)

        q = project(query)
        k = q if key is query else project(key)
        v = k if value is key else q if value is query else project(value)
        return q[0], k[1], v[2]

    def _project_out(self, heads: Tensor, residual: Tensor | None, batched: bool) -> Tensor:
        if residual is None:
            out: Tensor = self.out_proj(heads)
            return out
        residual = self._batch_first(residual, batched)
        if isinstance(self.out_proj, BSRLinear):
            return self.out_proj.project(heads, "none", residual)
        return residual + self.out_proj(heads)

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, keys: int, batched: bool
    ) -> Tensor | None:
        """Both masks as one additive ``[n or 1, heads or 1, l, s]``, or ``None``; ``q [n, l, e]``."""
        batch, queries, _ = q.shape
        dtype, masks = q.dtype, []
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, dtype, (queries, keys), (batch * self.num_heads, queries, keys))
            masks.append(attn_mask.unflatten(0, (batch, self.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        if padding is not None:
            _check_mask("key_padding_mask", padding, dtype, (batch, keys) if batched else (keys,))
            masks.append((padding if batched else padding.unsqueeze(0))[:, None, None, :])
        additive = [
            torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
            if mask.dtype == torch.bool
            else mask.to(dtype)
            for mask in masks
        ]
        return sum(additive[1:], additive[0]) if additive else None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}"


def _check_mask(name: str, mask: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
    if mask.dtype not in (torch.bool, torch.float32, dtype):  # float32 also under autocast.
        raise MatrixError(f"{name} must be of torch.bool or, to be added, of {dtype}, got {mask.dtype}")
    if mask.shape not in shapes:
        raise MatrixError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")

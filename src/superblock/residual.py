"""Residual blocks whose additions, and the activations after those, run in the product before them."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superblock.feed_forward import chain_of_feed_forward, feed_forward, is_pair, normalized, passes
from superblock.fuse import activation_name, comes_from, watched
from superblock.nn import BSRConv2d, BSRLinear, BSRMultiheadAttention, FoldedBatchNorm
from superblock.normalized import norm_of
from superblock.ops.attention import attention
from superblock.ops.direct import infers_unseen
from superblock.ops.prepared import Chain
from superblock.scaled import add_scaled, scale_of
from superblock.self_attention import attend_as_one, chain_of_attention

_RESNETS = ("torchvision.models.resnet", "timm.models.resnet")
Halves = tuple[Chain, Chain, object]  # The last one is the tensors that both read.
_IDENTITIES = ("drop_block", "aa")  # Of timm's blocks, before the last convolution; a hook may listen to them.


def fuse_residuals(model: nn.Module) -> None:
    """Let the residual blocks that are known add in their products' epilogues, in place.

    Known are ``BasicBlock`` and ``Bottleneck`` of torchvision's and timm's ResNets, torchvision's ``EncoderBlock``,
    timm's ``Block`` and ``nn.TransformerEncoderLayer``. Modules, names and state stay as they are; only the block's
    class changes. What a hook watches is called as ever.
    """
    for module in model.modules():
        if any(comes_from(module, library, "BasicBlock", "Bottleneck") for library in _RESNETS):
            if _is_plain(module) and any(isinstance(part, BSRConv2d) for part in module.children()):
                module.__class__ = ResidualConvolutions
        elif comes_from(module, "torchvision.models.vision_transformer", "EncoderBlock"):
            module.__class__ = ResidualEncoderBlock
        elif comes_from(module, "timm.models.vision_transformer", "Block") and comes_from(
            module.get_submodule("attn"), "timm.", "Attention"
        ):
            module.__class__ = ResidualBlock
        elif type(module) is nn.TransformerEncoderLayer:
            module.__class__ = ResidualEncoderLayer


class ResidualConvolutions(nn.Module):
    """``act(convolutions(x) + shortcut(x))``: torchvision's and timm's ``BasicBlock`` and ``Bottleneck``."""

    def forward(self, x: Tensor) -> Tensor:
        parts: dict[str, Any] = self._modules
        shortcut = parts.get("downsample")
        residual = x if shortcut is None else shortcut(x)
        *stages, last = self._numbers()
        for stage in stages:
            x = self._stage(stage, x)
        for name in _IDENTITIES:
            x = parts[name](x) if name in parts else x
        return self._stage(last, x, residual)

    def convolutions(self) -> tuple[list[tuple[BSRConv2d, str]], BSRConv2d | None] | None:
        """All that there is now, each with its activation, and the shortcut's; ``None`` where there is more."""
        parts: dict[str, Any] = self._modules
        stages = [stage for number in self._numbers() if (stage := self._fused(number)) is not None]
        shortcut = parts.get("downsample")
        conv = None if shortcut is None else _only_convolution(shortcut)
        whole = len(stages) == len(self._numbers()) and (shortcut is None or conv is not None)
        idle = all(passes(parts[name]) for name in _IDENTITIES if name in parts)
        every = stages if conv is None else [*stages, (conv, conv.activation)]
        plain = whole and idle and all(each.is_one_product(activation) for each, activation in every)
        return (stages, conv) if plain else None

    def _numbers(self) -> tuple[str, ...]:
        return ("1", "2", "3") if "conv3" in self._modules else ("1", "2")

    def _stage(self, number: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fused = self._fused(number)
        if fused is not None:
            conv, name = fused
            return conv.convolve(x, name, residual)
        parts: dict[str, Any] = self._modules
        y = parts["bn" + number](parts["conv" + number](x))
        activated: Tensor = self._activation(number)(y if residual is None else y + residual)
        return activated

    def _fused(self, number: str) -> tuple[BSRConv2d, str] | None:
        """A convolution that normalizes and, by this name, activates, seen by nobody."""
        parts: dict[str, Any] = self._modules
        conv, name = parts["conv" + number], activation_name(self._activation(number))
        return (conv, name) if name and _normalizes(conv, parts["bn" + number]) else None

    def _activation(self, number: str) -> Any:
        parts: dict[str, Any] = self._modules
        return parts["relu"] if "relu" in parts else parts["act" + number]


def _only_convolution(shortcut: nn.Module) -> BSRConv2d | None:
    """That of a shortcut that convolves and normalizes, seen by nobody."""
    if type(shortcut) is not nn.Sequential or len(shortcut) != 2 or watched(shortcut):
        return None
    conv, norm = shortcut
    return conv if _normalizes(conv, norm) else None


def _normalizes(conv: nn.Module, norm: nn.Module) -> TypeGuard[BSRConv2d]:
    """Whether a convolution has taken in the batch norm after it, seen by nobody."""
    return type(conv) is BSRConv2d and type(norm) is FoldedBatchNorm and not watched(conv, norm)


class ResidualEncoderBlock(nn.Module):
    """torchvision's ``EncoderBlock``."""

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        parts: dict[str, Any] = self._modules  # Past nn.Module.__getattr__, which takes 0.4 µs for each.
        attention, dropout, norm = parts["self_attention"], parts["dropout"], parts["ln_1"]
        whole = not self.training and passes(dropout)
        if whole and _adds(attention):
            x = _attend(attention, norm, input)
        elif whole and _is_plain_torch(attention) and _infers(input):
            x = _attend_densely(attention, norm(input), input)
        else:
            y = norm(input)
            x = dropout(attention(y, y, y, need_weights=False)[0]) + input
        return normalized(parts["mlp"], parts["ln_2"], x, x)

    def chains(self, x: Tensor) -> Halves | None:
        """Both halves prepared for tokens like ``x`` in plain inference, or ``None`` where the block must be called."""
        parts: dict[str, Any] = self._modules
        attn = parts["self_attention"]
        if self.training or not passes(parts["dropout"]) or not _adds(attn) or not attn.batch_first:
            return None
        return _halves(attn, ("in_proj", "out_proj"), parts["ln_1"], parts["mlp"], parts["ln_2"], x)


class ResidualBlock(nn.Module):
    """timm's ``Block``."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        parts: dict[str, Any] = self._modules
        attention, scale, drop = parts["attn"], parts["ls1"], parts["drop_path1"]
        plain = attn_mask is None and not is_causal and not self.training and _is_plain_attention(attention)
        gamma = scale_of(scale) if passes(drop) else None
        if plain and passes(scale, drop):
            x = _timm_attention(attention, parts["norm1"], x)
        elif plain and gamma is not None:
            x = add_scaled(x, _timm_attention_alone(attention, parts["norm1"], x), gamma)
        else:
            masks = {"attn_mask": attn_mask, "is_causal": is_causal or None}  # Older timms take fewer.
            options = {name: mask for name, mask in masks.items() if mask is not None}
            x = x + drop(scale(attention(parts["norm1"](x), **options)))
        mlp, norm, scale, drop = parts["mlp"], parts["norm2"], parts["ls2"], parts["drop_path2"]
        if passes(scale, drop):
            return normalized(mlp, norm, x, x)
        gamma = scale_of(scale) if passes(drop) else None
        if gamma is not None:
            return add_scaled(x, normalized(mlp, norm, x), gamma)
        z: Tensor = x + drop(scale(mlp(norm(x))))
        return z

    def chains(self, x: Tensor) -> Halves | None:
        """As of :class:`ResidualEncoderBlock`."""
        parts: dict[str, Any] = self._modules
        attn, idle = parts["attn"], (parts["ls1"], parts["drop_path1"], parts["ls2"], parts["drop_path2"])
        if self.training or not passes(*idle) or not _is_plain_attention(attn):
            return None
        return _halves(attn, ("qkv", "proj"), parts["norm1"], parts["mlp"], parts["norm2"], x)


class ResidualEncoderLayer(nn.TransformerEncoderLayer):
    """torch's own ``TransformerEncoderLayer``."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if self.training or not passes(self.dropout1) or not _adds(self.self_attn):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
        attention: BSRMultiheadAttention = self.self_attn  # type: ignore[assignment]
        if self.norm_first:
            return self._add_feed_forward(_attend(attention, self.norm1, src, **masks), self.norm2)
        x = self.norm1(_attend(attention, None, src, **masks))
        y: Tensor = self.norm2(self._add_feed_forward(x, None))
        return y

    def _add_feed_forward(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """``feed_forward(norm(x)) + x``."""
        if self._runs_as_one() and passes(self.dropout2):
            return feed_forward(x, self.linear1, self.linear2, x, norm)  # type: ignore[arg-type]
        return x + self._ff_block(x if norm is None else norm(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        """torch's own, of one pass where nothing drops out between the layers: in training too."""
        if self._runs_as_one():
            return self.dropout2(feed_forward(x, self.linear1, self.linear2))  # type: ignore[arg-type]
        return super()._ff_block(x)

    def _runs_as_one(self) -> bool:
        return passes(self.activation, self.dropout) and is_pair(self.linear1, self.linear2)


def _attend(attention: BSRMultiheadAttention, norm: nn.Module | None, x: Tensor, **masks: Tensor | None) -> Tensor:
    """``attention(norm(x)) + x``."""
    if attention.batch_first and all(mask is None for mask in masks.values()):
        parts = attention._modules
        whole = attend_as_one(parts["in_proj"], parts["out_proj"], attention.num_heads, norm, x)
        if whole is not None:
            return whole
    inside = None if norm is None else norm_of(norm, x, attention.in_proj)
    y = x if norm is None or inside is not None else norm(x)
    added: Tensor = attention(y, y, y, need_weights=False, residual=x, norm=inside, **masks)[0]
    return added


def _attend_densely(attn: nn.MultiheadAttention, x: Tensor, residual: Tensor) -> Tensor:
    """``attn(x) + residual``, around this library's attention: the dense out-projection adds to the residual."""
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    heads = attention(*(part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in qkv))
    out, heads = attn.out_proj, heads.transpose(1, 2).flatten(2)
    if out.bias is None or heads.dtype != residual.dtype or not infers_unseen(x):
        return F.linear(heads, out.weight, out.bias) + residual
    added = (residual + out.bias).flatten(0, 1)
    return added.addmm_(heads.flatten(0, 1), out.weight.t()).view_as(residual)


def _infers(x: Tensor) -> bool:
    """Whether this is plain inference on the CPU."""
    return x.is_cpu and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _is_plain_torch(attn: nn.Module) -> bool:
    """Whether this is torch's own attention with nothing unusual, seen by nobody."""
    return (
        type(attn) is nn.MultiheadAttention
        and not attn.training
        and attn.batch_first
        and attn._qkv_same_embed_dim
        and attn.bias_k is None
        and not attn.add_zero_attn
        and not watched(attn, attn.out_proj)
    )


def _halves(
    attn: nn.Module, projections: tuple[str, str], norm: nn.Module, mlp: nn.Module, mlp_norm: nn.Module, x: Tensor
) -> Halves | None:
    """The attention between these projections, and the feed-forward after it."""
    into, out = (attn._modules[name] for name in projections)
    first = chain_of_attention(into, out, attn.num_heads, norm, x)  # type: ignore[arg-type]
    second = None if first is None else chain_of_feed_forward(mlp, mlp_norm, x)
    return None if first is None or second is None else (first[0], second[0], (first[1], second[1]))


def _adds(module: object) -> bool:
    """Whether an attention can add in its out-projection's epilogue, seen by nobody."""
    if type(module) is not BSRMultiheadAttention:
        return False
    projection, drops = module.out_proj, module.training and module.dropout > 0
    return type(projection) is BSRLinear and not drops and not watched(module, projection)


def _is_plain_attention(attn: nn.Module) -> bool:
    """Whether a timm ``Attention`` is qkv, ``softmax(q kᵀ / √d) v`` and an out-projection, seen by nobody."""
    parts: dict[str, Any] = attn._modules
    projection, gate, norm = parts["proj"], parts.get("gate"), parts.get("norm")  # Not every timm has these two.
    idle = (parts["q_norm"], parts["k_norm"], parts["attn_drop"], parts["proj_drop"])
    plain = type(projection) is BSRLinear and gate is None and not watched(attn, projection)
    return plain and passes(*idle) and (norm is None or passes(norm))


def _timm_attention(attn: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``attn(norm(x)) + x``."""
    parts = attn._modules
    whole = attend_as_one(parts["qkv"], parts["proj"], attn.num_heads, norm, x)  # type: ignore[arg-type]
    return whole if whole is not None else _timm_attention_alone(attn, norm, x, x)


def _timm_attention_alone(attn: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``attn(norm(x)) + residual``."""
    inside = norm_of(norm, x, attn.qkv)
    qkv = attn.qkv(norm(x)) if inside is None else attn.qkv.project(x, norm=inside)  # type: ignore[operator,union-attr]
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    heads = attention(q, k, v).transpose(1, 2).flatten(2)
    projection = attn.proj
    assert isinstance(projection, BSRLinear)  # By `_is_plain_attention`.
    return projection.project(heads, projection.activation, residual)


def _is_plain(block: nn.Module) -> bool:
    """Whether a ResNet block does nothing between its convolutions but normalize and activate."""
    between = all(isinstance(getattr(block, name, nn.Identity()), nn.Identity) for name in _IDENTITIES)
    return between and getattr(block, "se", None) is None and getattr(block, "drop_path", None) is None

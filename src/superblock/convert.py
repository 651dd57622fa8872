"""Swaps the folded layers of a model for their BSR forms, in place."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from superblock.batch_norm import fold_batch_norms
from superblock.bsr import BSRMatrix
from superblock.errors import ConfigError, ModelError
from superblock.feed_forward import fuse_feed_forward
from superblock.fuse import fuse_activations
from superblock.nn import BSRConv2d, BSRLinear, BSRMultiheadAttention, BSRWeight
from superblock.ops import cpu
from superblock.ops.convolution import matrix_of
from superblock.report import LayerReport, Report
from superblock.residual import fuse_residuals
from superblock.scaled import fuse_scaled
from superblock.sequences import fuse_sequences
from superblock.surgery import Fold, folds, folds_of, masked_weights
from superblock.whole import whole

Layer = TypeVar("Layer", bound=BSRWeight)
ATTENTION_PARTS = {"in_proj_weight": "in_proj", "out_proj.weight": "out_proj"}


def to_bsr(model: nn.Module, blocksize: int | None = None) -> Report:
    """Swap every folded layer for its BSR form, in place.

    Linear layers become :class:`BSRLinear`, convolutions :class:`BSRConv2d`, ``nn.MultiheadAttention``
    :class:`BSRMultiheadAttention`. What has no BSR form keeps its folded dense weight, and the report says why: so do
    convolutions over several positions on a GPU. Linear layers that share a weight share its values; any other tie to a
    layer that is swapped comes apart, with a note. Batch norms in eval mode move into the convolution before them for
    good, activations and residual additions into the product before them, and convolutions pass images on in
    ``torch.channels_last``. Hooks move to the new layers.

    Args:
        model: a model after :func:`sparsify_weights`.
        blocksize: the side of a square block; by default each layer's tile. Block and tile must divide one another.

    Returns:
        A line for every folded weight: its blocks, and a note where it stayed dense.

    Raises:
        ModelError: nothing is folded, or masks are still to be folded.
        ConfigError: a block that does not fit the tiles.
    """
    if any(True for _ in masked_weights(model)):
        raise ModelError("the masks are not folded yet: call sparsify_weights before to_bsr")
    found = list(folds(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no folded weights: call apply_supermask and sparsify_weights first"
        )
    for layer, _, name, fold in found:
        check_block(blocksize, fold.target.tile_size, f"{layer}.{name}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    swaps: dict[int, nn.Module] = {}
    shared: dict[int, BSRLinear] = {}
    taken: set[int] = set()
    converted = []
    for layer, module in model.named_modules():
        owned = {} if id(module) in taken else _owned_folds(module)
        if not owned:
            continue
        taken.update(id(part) for part in module.modules())
        block = blocksize or next(iter(owned.values()))[1].target.tile_size
        reason = _no_bsr_form(module, block) if layer else "it is the model itself: wrap it in a module"
        if reason is None:
            for name, (weight, _) in owned.items():
                if weight.is_meta:
                    raise ModelError(f"{layer}.{name} is on the meta device, without values: load weights first")
            swaps[id(module)] = _with_hooks(_bsr_form(module, owned, blocksize, shared).train(module.training), module)
        for name, (weight, fold) in owned.items():
            form = swaps.get(id(module))
            converted.append(_Converted(f"{layer}.{name}", weight, fold, form, _held(form, name), reason))
    _replace(model, swaps)
    converted = _told_apart(model, converted)
    parameters += sum(each.weight.numel() for each in converted if each.untied_from)
    notes = fold_batch_norms(model)
    fuse(model)
    return Report(tuple(_line(each, notes.get(id(each.form), "")) for each in converted), parameters)


@dataclass(frozen=True)
class _Converted:
    """A folded weight: the layer that took its place, what of that holds it, or why there is none."""

    name: str
    weight: Tensor
    fold: Fold
    form: nn.Module | None
    held: BSRWeight | None
    reason: str | None
    untied_from: str = ""


def _held(form: nn.Module | None, name: str) -> BSRWeight | None:
    held = form.get_submodule(ATTENTION_PARTS[name]) if isinstance(form, BSRMultiheadAttention) else form
    assert held is None or isinstance(held, BSRWeight)  # By `_bsr_form`.
    return held


def _told_apart(model: nn.Module, converted: list[_Converted]) -> list[_Converted]:
    """A weight that several layers share once, and each that no longer is shared with the name of what shared it."""
    dense = {id(parameter): name for name, parameter in model.named_parameters()}
    first: dict[int, str] = {}
    seen: set[int] = set()
    apart = []
    for each in converted:
        tensor = each.weight if each.held is None else each.held.values
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        before = first.setdefault(id(each.weight), each.name)
        other = dense.get(id(each.weight), "" if before is each.name else before)
        apart.append(each if each.held is None else replace(each, untied_from=other))
    return apart


def fuse(model: nn.Module) -> None:
    """Move what follows a block-sparse product into it, and keep images in channels-last order, in place."""
    fuse_activations(model)
    fuse_feed_forward(model)
    fuse_residuals(model)
    fuse_scaled(model)
    fuse_sequences(model)
    if any(isinstance(module, BSRConv2d) for module in model.modules()):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # Torch's convolutions answer in the memory format of their weight.
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def check_block(blocksize: int | None, tile_size: int, name: str = "") -> None:
    """Raise :class:`ConfigError` unless block and tile divide one another."""
    if blocksize is None:
        return
    block = whole(blocksize)
    if block is None or block < 1:
        raise ConfigError(f"block size must be a whole number of at least 1, got {blocksize!r}")
    if blocksize % tile_size and tile_size % blocksize:
        where = f" of {name}" if name else ""
        raise ConfigError(f"block {blocksize} and tile {tile_size}{where} must divide one another: take equal ones")


def _owned_folds(module: nn.Module) -> dict[str, tuple[Tensor, Fold]]:
    """The folded weights that this module's BSR form takes over; an attention takes over its out-projection's."""
    owned = folds_of(module)
    if isinstance(module, nn.MultiheadAttention):
        owned |= {f"out_proj.{name}": fold for name, fold in folds_of(module.out_proj).items()}
    return {name: (_get(module, name), fold) for name, fold in owned.items()}


def _no_bsr_form(module: nn.Module, block: int) -> str | None:
    """Why a folded layer keeps its dense weight, or ``None``."""
    kind = type(module)
    if "forward" in vars(module):
        return "its forward has been replaced"
    if isinstance(module, nn.MultiheadAttention):
        if kind.forward is not nn.MultiheadAttention.forward:
            return f"{kind.__name__} has a forward of its own"
        if module.in_proj_weight is None:
            return "its query, key and value projections are of different widths"
        if module.bias_k is not None or module.add_zero_attn:
            return "it appends to keys and values (add_bias_kv, add_zero_attn)"
        return None
    if isinstance(module, nn.Linear):
        return None if kind.forward is nn.Linear.forward else f"{kind.__name__} has a forward of its own"
    if isinstance(module, nn.Conv2d):
        if kind.forward is not nn.Conv2d.forward:
            return f"{kind.__name__} has a forward of its own"
        return _no_convolution(module, block) if math.prod(module.kernel_size) * module.groups > 1 else None
    return f"no BSR form of {kind.__name__}"


def _no_convolution(module: nn.Conv2d, block: int) -> str | None:
    """Why a convolution over several positions, or in groups, keeps its dense weight, or ``None``."""
    device, out, kernel = module.weight.device, module.out_channels, module.kernel_size
    if device.type != "cpu":
        return f"no kernel for {'grouped' if math.prod(kernel) == 1 else 'k×k'} convolutions on {device.type}"
    if (reason := cpu.unsupported(module.weight.dtype, block, block)) is not None:
        return reason
    if module.groups > 1 and out // module.groups % block:
        return f"the {out // module.groups} outputs of a group do not divide into blocks of {block}"
    living = matrix_of(module.weight, block).nnz
    if living * block * block >= module.weight.numel():
        return f"its {living} living blocks of {block} × {block} would hold more than the dense weight"
    return None


def padding_of(module: nn.Conv2d) -> tuple[int, ...]:
    """On both sides of height and width, or ``(left, right, top, bottom)`` where they differ."""
    if not isinstance(module.padding, str):
        return module.padding
    left, right, top, bottom = module._reversed_padding_repeated_twice
    return (top, left) if (left, top) == (right, bottom) else (left, right, top, bottom)


def _bsr_form(
    module: nn.Module, owned: dict[str, tuple[Tensor, Fold]], blocksize: int | None, shared: dict[int, BSRLinear]
) -> nn.Module:
    """The module's BSR form; ``shared`` holds the linear layers made so far, by the id of their dense weight."""

    def block(name: str) -> int:
        return blocksize or owned[name][1].target.tile_size

    def linear(name: str, bias: Tensor | None) -> BSRLinear:
        weight = owned[name][0]
        twin = shared.get(id(weight))
        if twin is None:
            layer = BSRLinear(BSRMatrix.from_dense(weight, block(name)), bias)
            shared[id(weight)] = layer
            return _like(layer, weight, bias)
        layer = _like(BSRLinear(twin.matrix, bias), weight, bias)
        share(layer, twin)
        return layer

    if isinstance(module, nn.MultiheadAttention):
        parts: dict[str, nn.Module] = {}
        for name, bias in (("in_proj_weight", module.in_proj_bias), ("out_proj.weight", module.out_proj.bias)):
            weight = _get(module, name)
            sparse = name in owned
            parts[ATTENTION_PARTS[name]] = linear(name, bias) if sparse else dense_linear(weight, bias)
        return BSRMultiheadAttention(
            parts["in_proj"], parts["out_proj"], module.num_heads, module.dropout, module.batch_first
        )
    if isinstance(module, nn.Conv2d):
        conv = BSRConv2d(
            matrix_of(module.weight, block("weight")),
            module.bias,
            module.stride,  # type: ignore[arg-type]
            padding_of(module),
            module.padding_mode,
            tuple(module.weight.shape),
            module.dilation,  # type: ignore[arg-type]
            module.groups,
        )
        return _like(conv, module.weight, module.bias)
    assert isinstance(module, nn.Linear)  # By `_no_bsr_form`.
    return linear("weight", module.bias)


def share(layer: BSRWeight, other: BSRWeight) -> None:
    """Let ``layer`` hold the values and indices that ``other`` holds, not its own."""
    layer.values, layer.crow_indices, layer.col_indices = other.values, other.crow_indices, other.col_indices


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer over the given tensors, without allocating others."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def _like(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """``layer`` with its values as trainable as the dense weight was, and with the bias itself: it may be tied."""
    layer.values.requires_grad_(weight.requires_grad)
    if isinstance(bias, nn.Parameter):
        layer.bias = bias
    return layer


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def _with_hooks(form: nn.Module, module: nn.Module) -> nn.Module:
    """``form`` with the hooks of the module whose place it takes, which their handles still remove."""
    for name in _HOOKS:
        setattr(form, name, getattr(module, name))
    return form


def _line(each: _Converted, note: str) -> LayerReport:
    weight, fold, layer = each.weight, each.fold, each.held
    kind = "linear" if weight.dim() == 2 else "conv1x1" if weight.shape[2:].numel() == 1 else "conv"
    name = each.name.removesuffix(".weight")
    common = {"name": name, "kind": kind, "shape": tuple(weight.shape), "target": fold.target.sparsity}
    if layer is None:
        return LayerReport(
            **common,  # type: ignore[arg-type]
            tile=fold.tile,
            grid=fold.grid,
            sparsity=fold.sparsity,
            zeros=fold.zeros,
            parameters=weight.numel(),
            note=f"stays dense: {each.reason}",
        )
    matrix = layer.matrix
    untied = f"no longer tied to {each.untied_from}" if each.untied_from else ""
    return LayerReport(
        **common,  # type: ignore[arg-type]
        tile=matrix.blocksize,
        grid=matrix.grid,
        sparsity=1 - matrix.density,
        zeros=weight.numel() - stored_weights(layer),
        parameters=weight.numel(),
        note="; ".join(filter(None, (untied, note))),
    )


def stored_weights(layer: BSRWeight) -> int:
    """How many of the weight's entries its blocks hold, what lies beyond its edges aside."""
    return int(layer.dense(torch.ones_like(layer.values, dtype=torch.float32)).sum(dtype=torch.float64))


def _get(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner) if owner else module, name)


def _replace(model: nn.Module, swaps: dict[int, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in swaps:
                parent._modules[name] = swaps[id(child)]

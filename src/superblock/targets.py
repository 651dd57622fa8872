"""Which weights of a model a configuration means: a walk that reads structure before names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from superblock.config import SupermaskConfig
from superblock.errors import ConfigError, ModelError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class WeightSite:
    """A weight that could be masked: where it is, and what kind of layer reads it."""

    layer: str
    module: nn.Module
    parameter: str
    kind: str

    @property
    def name(self) -> str:
        """The layer's name, and the parameter's where a layer has several: ``attn.in_proj_weight``."""
        return self.layer if self.parameter == "weight" else f"{self.layer}.{self.parameter}".lstrip(".")

    @property
    def weight(self) -> torch.Tensor:
        """The tensor as the module reads it."""
        weight: torch.Tensor = getattr(self.module, self.parameter)
        return weight


def weight_sites(model: nn.Module) -> list[WeightSite]:
    """Every weight of a linear layer, an attention projection or a convolution, in registration order."""
    return [
        WeightSite(name, module, parameter, kind)
        for name, module in model.named_modules()
        for parameter, kind in _weights_of(module)
    ]


def select(model: nn.Module, config: SupermaskConfig) -> list[WeightSite]:
    """The weights that ``config`` means, in registration order.

    Raises:
        ModelError: nothing matches; lists what there was to match.
        ConfigError: a pattern that matches no layer, or no transformer block to skip.
    """
    sites = weight_sites(model)
    for pattern in (*config.include, *config.exclude):
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ConfigError(f"pattern {pattern!r} matches no layer; {_listing(sites)}")
    chosen = [site for site in sites if config.target(site.kind) is not None]
    if config.scope == "mlp":
        feed_forward = set(feed_forward_layers(model))
        chosen = [site for site in chosen if site.layer in feed_forward]
    if config.skip_first_transformer:
        block = first_transformer_block(model)
        if block is None:
            raise ConfigError(f"{type(model).__name__} has no transformer block to skip: drop skip_first_transformer")
        chosen = [site for site in chosen if not _inside(site.layer, block)]
    if config.skip_last_layer:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        chosen = [site for site in chosen if site.layer not in linear[-1:]]
    if config.include:
        chosen = [site for site in chosen if any(fnmatchcase(site.name, pattern) for pattern in config.include)]
    chosen = [site for site in chosen if not any(fnmatchcase(site.name, pattern) for pattern in config.exclude)]
    if not chosen:
        raise ModelError(f"nothing to mask in {type(model).__name__}; {_listing(sites)}")
    return chosen


def feed_forward_layers(model: nn.Module) -> list[str]:
    """The layers of a model's feed-forward parts: those of transformer blocks outside attention,
    and linear layers (or 1×1 convolutions) side by side of which the last undoes the first's change of width."""
    attention = _outermost_attention(model)
    blocks = {_parent(name) for name in attention}
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS))
        and any(_inside(name, block) for block in blocks if block)
        and not any(_inside(name, inner) for inner in attention)
        and not _spatial(module)
    ]
    for name, module in model.named_modules():
        if not _is_attention(name, module) or any(_inside(inner, name) and inner != name for inner in attention):
            layers += _expand_contract(name, module)
    return layers


def first_transformer_block(model: nn.Module) -> str | None:
    """The name of the first module that holds an attention layer beside other layers."""
    blocks = [_parent(name) for name in _outermost_attention(model)]
    return next((block for block in blocks if block), None)


def _weights_of(module: nn.Module) -> Iterator[tuple[str, str]]:
    if isinstance(module, nn.MultiheadAttention):
        yield from ((name, "linear") for name in ATTENTION_WEIGHTS if getattr(module, name, None) is not None)
    elif isinstance(module, nn.Linear):
        yield "weight", "linear"
    elif isinstance(module, CONVOLUTIONS):
        yield "weight", "conv" if _spatial(module) else "conv1x1"


def _spatial(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and any(side > 1 for side in module.kernel_size)


def _is_attention(name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.Dropout, nn.LayerNorm, nn.Identity, nn.ModuleList)):
        return False
    own = name.rpartition(".")[2].lower()
    kind = type(module).__name__.lower()
    return "attention" in kind or own in ("attn", "attention", "self_attn", "self_attention")


def _outermost_attention(model: nn.Module) -> list[str]:
    found: list[str] = []
    for name, module in model.named_modules():
        if name and _is_attention(name, module) and not any(_inside(name, outer) for outer in found):
            found.append(name)
    return found


def _expand_contract(name: str, module: nn.Module) -> list[str]:
    children = dict(module.named_children())
    layers: dict[str, nn.Module]
    layers = {child: layer for child, layer in children.items() if isinstance(layer, nn.Linear)}
    if not layers and not any(_spatial(layer) for layer in children.values()):
        layers = {child: layer for child, layer in children.items() if isinstance(layer, CONVOLUTIONS)}
    if len(layers) < 2:
        return []
    first, *_, last = (_widths(layer) for layer in layers.values())
    gated = (first[1], first[1] // 2)  # A gated unit halves the hidden width.
    if first[0] != last[1] or last[0] not in gated:
        return []
    return [f"{name}.{child}".lstrip(".") for child in layers]


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or a convolution."""
    weight = layer.get_parameter("weight")
    return weight.shape[1], weight.shape[0]


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _listing(sites: list[WeightSite], limit: int = 12) -> str:
    if not sites:
        return "it has no linear layer and no convolution"
    names = [f"{site.name} ({site.kind})" for site in sites[:limit]]
    more = f" and {len(sites) - limit} more" if len(sites) > limit else ""
    return f"there were: {', '.join(names)}{more}"

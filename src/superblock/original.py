"""Checkpoints of the original SuperBlock (2024): recognised by their keys, translated into ours.

A masked layer there holds ``weight``, ``scores`` (one entry for a tile, every dimension of the weight cut by the
tile's side), ``shift`` and ``scale``, and computes with ``(weight · scale + shift) ⊙ mask``. Here scale and shift are
folded into the weight, and :mod:`superblock.rules` makes the same mask of the scores.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from superblock.agreement import KINDS, check_agreement
from superblock.checkpoint import load_matching
from superblock.config import SupermaskConfig, TileSparsity
from superblock.errors import CheckpointError, ConfigError
from superblock.surgery import apply_supermask
from superblock.targets import WeightSite, weight_sites

# Attentions that hand the weights of these children to a function and never call the children, so that the masking
# layers which the original put there had no effect: torch's own, and torchvision's Swin.
READ_DIRECTLY = {"MultiheadAttention": ("out_proj",), "ShiftedWindowAttention": ("qkv", "proj")}

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Translation:
    """An original checkpoint in our terms.

    ``config`` masks exactly the layers that the checkpoint does, by the original's rule; ``model`` and ``model_ema``
    are states of the model so masked (of its ``AveragedModel``); ``notices`` say what was left out.
    """

    config: SupermaskConfig
    model: dict[str, Tensor]
    model_ema: dict[str, Tensor] | None
    notices: tuple[str, ...]


def load_original(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    config: SupermaskConfig | None = None,
    *,
    ema: bool = False,
    source: str = "the checkpoint",
) -> Translation:
    """Load an original checkpoint into a dense model, in place: its masks are put on, its weights filled in.

    Args:
        model: dense, of the checkpoint's architecture; a single ``nn.Linear`` or ``nn.Conv2d`` is a model too.
        checkpoint: what the original's trainer saved, or just its ``model`` state.
        config: sparsity and tile of each kind of layer, needed where the checkpoint holds no training arguments;
            must agree with it otherwise.
        ema: load the averaged weights instead.
        source: the checkpoint's name for messages.

    Raises:
        CheckpointError: of another model, or without the averaged weights asked for.
        ConfigError: the sparsity is not known, or ``config`` contradicts the checkpoint.
    """
    translation = translate(model, checkpoint, config, source)
    state = translation.model
    if ema:
        if translation.model_ema is None:
            raise CheckpointError(f"{source} holds no averaged weights (model_ema): load it without --model-ema")
        state = {
            key.removeprefix("module."): value for key, value in translation.model_ema.items() if key != "n_averaged"
        }
    if translation.config.active:
        apply_supermask(model, translation.config)
    load_matching(model, state, source)
    return translation


def load_layer(layer: nn.Module, state: State, sparsity: float, tile_size: int | None = None) -> nn.Module:
    """Fill a dense ``nn.Linear`` or ``nn.Conv2d`` from the state of one original masked layer, and mask it.

    Args:
        layer: dense, with the layer's shape, stride, padding and groups; changed in place.
        state: ``weight``, ``scores``, ``shift``, ``scale`` and perhaps ``bias``.
        sparsity: what the layer was trained with; lowered, as the original does, where it would kill every tile.
        tile_size: the tile's side, where the shape of the scores leaves a choice.

    Returns:
        ``layer``.
    """
    arguments = {f"sparsity_{kind}": sparsity for kind in KINDS}
    tiles = {f"sp_{kind}_tile_size": tile_size for kind in KINDS}
    load_original(layer, {"model": state, "args": {**arguments, **tiles}})
    return layer


def is_original(state: Mapping[str, Any]) -> bool:
    """Whether a model's state has the original's masked layers: ``scores``, ``shift`` and ``scale`` beside a weight."""
    return bool(scored_layers(state))


def scored_layers(state: Mapping[str, Any]) -> list[str]:
    """The prefixes (``"encoder.mlp.0."``) of the layers that hold original scores."""
    prefixes = [key.removesuffix("scores") for key in state if key == "scores" or key.endswith(".scores")]
    return [prefix for prefix in prefixes if all(f"{prefix}{name}" in state for name in ("weight", "shift", "scale"))]


def translate(
    model: nn.Module, checkpoint: Mapping[str, Any], config: SupermaskConfig | None, source: str
) -> Translation:
    """An original checkpoint in our terms; ``model`` is the dense model it belongs to and stays as it is."""
    state: State = checkpoint["model"] if isinstance(checkpoint.get("model"), Mapping) else checkpoint
    averaged: State | None = checkpoint.get("model_ema")
    sites = {_prefix(site.layer): site for site in weight_sites(model) if site.parameter == "weight"}
    never_applied = {
        f"{_prefix(name)}{child}."
        for name, module in model.named_modules()
        for base in type(module).__mro__
        for child in READ_DIRECTLY.get(base.__name__, ())
    }
    scored = scored_layers(state)
    masked = {prefix: sites[prefix] for prefix in scored if prefix in sites and prefix not in never_applied}
    ignored = [prefix for prefix in scored if prefix in never_applied]
    notices: tuple[str, ...] = ()
    if ignored:
        notices = (
            f"{len(ignored)} attention projections carry scores that the original never applied "
            f"({ignored[0]}scores, …): they stay dense",
        )
    flags = config or SupermaskConfig()
    stored = _config(masked, state, training_arguments(checkpoint), flags, source)
    if stored.active:
        check_agreement(model, flags, stored, source)
    return Translation(
        stored,
        _translate_state(state, masked, ignored),
        None if averaged is None else _translate_average(averaged, masked, ignored),
        notices,
    )


def _translate_state(state: State, masked: Iterable[str], ignored: Iterable[str]) -> dict[str, Tensor]:
    """``state`` under our keys, with shift and scale folded into the weights of the masked layers."""
    translated = dict(state)
    for prefix in (*masked, *ignored):
        scores, shift, scale = (translated.pop(f"{prefix}{name}") for name in ("scores", "shift", "scale"))
        if prefix in masked:
            weight = translated.pop(f"{prefix}weight")
            translated[f"{prefix}parametrizations.weight.original"] = (weight * scale + shift).to(weight.dtype)
            translated[f"{prefix}parametrizations.weight.0.scores"] = scores
    return translated


def _translate_average(averaged: State, masked: Iterable[str], ignored: Iterable[str]) -> dict[str, Tensor]:
    plain = {key.removeprefix("module."): value for key, value in averaged.items()}
    count = plain.pop("n_averaged", None)
    translated = {f"module.{key}": value for key, value in _translate_state(plain, masked, ignored).items()}
    return translated if count is None else {"n_averaged": count, **translated}


def _config(
    masked: Mapping[str, WeightSite], state: State, arguments: Mapping[str, Any], flags: SupermaskConfig, source: str
) -> SupermaskConfig:
    """The configuration that masks what the checkpoint masks: from its arguments, else from the flags."""
    targets: dict[str, Any] = {}
    for kind, noun in KINDS.items():
        shapes = [
            (tuple(state[f"{prefix}weight"].shape), tuple(state[f"{prefix}scores"].shape))
            for prefix, site in masked.items()
            if site.kind == kind
        ]
        if not shapes:
            continue
        asked = flags.target(kind)
        sparsity = arguments.get(f"sparsity_{kind}")
        if sparsity is None and asked:
            sparsity = asked.sparsity
        if sparsity is None:
            raise ConfigError(
                f"{source} masks {noun} but does not say how sparse they are: give --sparsity-{kind} "
                f"and --sp-{kind}-tile-size as in training"
            )
        known = arguments.get(f"sp_{kind}_tile_size") or (asked.tile_size if asked else None)
        # The original took a sparsity of 1 for all but one tile, as it takes all that is just below.
        targets[kind] = TileSparsity(min(float(sparsity), math.nextafter(1, 0)), _tile_size(noun, shapes, known))
    if not targets:
        return SupermaskConfig()
    names = tuple(glob.escape(site.name) for site in masked.values())
    return SupermaskConfig(**targets, include=names, rule="original")


def _tile_size(noun: str, shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], known: int | None) -> int:
    """The tile's side that explains the scores' shapes: the known one, else the only one or the only power of two."""
    largest = max(max(weight) for weight, _ in shapes)
    fitting = [
        tile
        for tile in range(1, largest + 1)
        if all(tuple(math.ceil(side / tile) for side in weight) == grid for weight, grid in shapes)
    ]
    if known is not None and min(known, largest) in fitting:
        return known
    powers = [tile for tile in fitting if tile & (tile - 1) == 0] or fitting
    if known is None and len(powers) == 1:
        return powers[0]
    grids = ", ".join(f"{weight} has {grid}" for weight, grid in shapes[:2])
    expected = f"one of {', '.join(map(str, fitting[:8]))}" if fitting else "none does"
    got = "it is not known" if known is None else f"got {known}"
    raise ConfigError(f"the tile size of the {noun} must explain their scores ({grids}): expected {expected}, {got}")


def training_arguments(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the original's trainer, where the checkpoint holds them."""
    arguments = checkpoint.get("args")
    return arguments if isinstance(arguments, Mapping) else vars(arguments) if arguments is not None else {}


def _prefix(layer: str) -> str:
    return f"{layer}." if layer else ""

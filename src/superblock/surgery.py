"""Walks a model and changes it in place: put masks on, fold them in, list them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from superblock.config import SupermaskConfig, TileSparsity
from superblock.errors import ModelError
from superblock.masks import Supermask, Tile, threshold, tile_sizes
from superblock.report import LayerReport, Report
from superblock.rules import make_mask
from superblock.targets import WeightSite, select, weight_sites

_FOLDED = "_superblock_folded"


@dataclass(frozen=True)
class Fold:
    """What is left of a mask after folding: enough to choose a block and to report."""

    target: TileSparsity
    tile: Tile
    grid: Tile
    sparsity: float
    zeros: int


def apply_supermask(model: nn.Module, config: SupermaskConfig) -> Report:
    """Give every weight that ``config`` means a :class:`Supermask`, in place.

    A weight shared by several layers gets one mask for all of them. Training mode, dtype, device and
    ``requires_grad`` stay as they are; the scores are new parameters named ``*.parametrizations.<weight>.0.scores``.

    Args:
        model: any module.
        config: which weights, how sparse, in which tiles.

    Returns:
        What was masked, with targets and real sparsities.

    Raises:
        ModelError: nothing matches, or the model is masked, folded or converted already.
    """
    if any(True for _ in masked_weights(model)) or any(True for _ in folds(model)):
        raise ModelError(f"{type(model).__name__} has Supermasks or folded weights already: start from a dense model")
    for site in select(model, config):
        if _mask_at(site) is None:  # A weight shared with an earlier layer has its mask already.
            target = config.target(site.kind)
            assert target is not None  # By `select`.
            attach(model, site, make_mask(_initialized(site), target, config.rule))
    return supermask_report(model)


def attach(model: nn.Module, site: WeightSite, mask: Supermask) -> None:
    """Register ``mask`` on a weight, and on every other place of the model that shares the tensor.

    Raises:
        ModelError: the weight is no parameter, as under the old ``torch.nn.utils.weight_norm``.
    """
    weight = site.weight
    mask.train(site.module.training)
    sharing = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter is weight
    ]
    if parametrize.is_parametrized(site.module, site.parameter):
        sharing = [(site.module, site.parameter)]
    if not sharing:
        raise ModelError(f"{site.name} is computed by a hook, not a parameter: use torch.nn.utils.parametrizations")
    for module, name in sharing:
        training = module.training
        parametrize.register_parametrization(module, name, mask)
        module.train(training)


def sparsify_weights(model: nn.Module) -> Report:
    """Fold every mask into its weight for good, in place: ``w ← w ⊙ mask``; the scores go.

    Copies of the model (``copy.deepcopy``, an EMA) keep their masks.

    Raises:
        ModelError: the model has no masks.
    """
    found = list(masked_weights(model))
    if not found:
        raise ModelError(f"{type(model).__name__} has no masks to fold: call apply_supermask first")
    report = supermask_report(model)
    for _, module, name, mask in found:
        fold = _fold_of(mask)
        _unshare_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        module.__dict__.setdefault(_FOLDED, {})[name] = fold
    return report


def mark_folded(sites: Sequence[WeightSite], config: SupermaskConfig) -> None:
    """Record of weights, folded before they were saved, what their zero tiles tell of the masks they had.

    Args:
        sites: what ``config`` masked.
        config: how it was masked.
    """
    for site in sites:
        target = config.target(site.kind)
        assert target is not None  # By `select`.
        mask = make_mask(site.weight, target, config.rule)
        mask.live = max(1, int(mask.scores.count_nonzero()))  # Initial scores are zero where a tile is.
        site.module.__dict__.setdefault(_FOLDED, {})[site.parameter] = _fold_of(mask)


def masked_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Supermask]]:
    """Every masked weight: the layer's name, the layer, the weight's name in it, its mask."""
    for layer, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                for step in chain:
                    if isinstance(step, Supermask):
                        yield layer, module, name, step


def mask_input(module: nn.Module, name: str, mask: Supermask) -> Tensor:
    """The weight that ``mask`` is given: the layer's parameter, or what parametrizations before the mask make of it."""
    chain: Any = module.get_submodule(f"parametrizations.{name}")
    names = ["original"] if chain.is_tensor else [f"original{at}" for at in range(chain.ntensors)]
    weights = [getattr(chain, each) for each in names]
    for step in chain:
        if step is mask:
            break
        weights = [step(*weights)]
    return weights[0]


def folds(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Fold]]:
    """Every folded weight: the layer's name, the layer, the weight's name in it, what was folded."""
    for layer, module in model.named_modules():
        for name, fold in folds_of(module).items():
            yield layer, module, name, fold


def folds_of(module: nn.Module) -> dict[str, Fold]:
    """The folded weights of one layer, by the weight's name in it."""
    return dict(module.__dict__.get(_FOLDED, {}))


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scores of all masks, each once: an optimizer group of their own."""
    return list({id(mask.scores): mask.scores for *_, mask in masked_weights(model)}.values())


def supermask_report(model: nn.Module) -> Report:
    """The report of a masked or folded model as it stands; a weight shared by layers counts once."""
    seen: set[int] = set()
    layers = []
    for site in weight_sites(model):
        mask = _mask_at(site)
        fold = folds_of(site.module).get(site.parameter) if mask is None else _fold_of(mask)
        shared = id(site.weight if mask is None else mask)
        if fold is None or shared in seen:
            continue
        seen.add(shared)
        layers.append(
            LayerReport(
                name=site.name,
                kind=site.kind,
                shape=tuple(site.weight.shape),
                tile=fold.tile,
                grid=fold.grid,
                target=fold.target.sparsity,
                sparsity=fold.sparsity,
                zeros=fold.zeros,
                parameters=site.weight.numel(),
                note=_note(fold),
            )
        )
    scores = {id(parameter) for parameter in score_parameters(model)}
    total = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in scores)
    return Report(tuple(layers), total)


def _initialized(site: WeightSite) -> Tensor:
    if is_lazy(site.weight):
        raise ModelError(f"{site.name} has no shape yet: run one batch through the model before masking it")
    if site.weight.is_meta:
        raise ModelError(f"{site.name} is on the meta device, without values: load weights before masking them")
    return site.weight


def _mask_at(site: WeightSite) -> Supermask | None:
    if not parametrize.is_parametrized(site.module, site.parameter):
        return None
    steps = site.module.get_submodule(f"parametrizations.{site.parameter}").children()
    return next((step for step in steps if isinstance(step, Supermask)), None)


def _fold_of(mask: Supermask) -> Fold:
    dead = ~threshold(mask.scores, mask.live, mask.keep_ties).cpu()
    zeros = int((dead * tile_sizes(mask.shape, mask.tile)).sum())
    return Fold(mask.target, mask.tile, mask.grid, int(dead.sum()) / dead.numel(), zeros)


def _note(fold: Fold) -> str:
    tiles = math.prod(fold.grid)
    if round(fold.target.sparsity * tiles) >= tiles:
        live = tiles - round(fold.sparsity * tiles)
        return f"too small for its target: {live} of {tiles} tile{'s' * (tiles > 1)} must live"
    if fold.sparsity == 0 and fold.target.sparsity > 0:
        return f"too small for its target: all {tiles} tile{'s' * (tiles > 1)} live"
    return ""


def _unshare_class(module: nn.Module) -> None:
    """Give ``module`` a class of its own: ``deepcopy`` shares the class that ``parametrize`` made for the original,
    and removing a parametrization deletes the weight's property from that class."""
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))

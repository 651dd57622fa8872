"""What is sparse in a model as it stands, whatever its form: a report, and the mask of every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from superblock.bsr import row_indices
from superblock.convert import stored_weights
from superblock.masks import tile_sums
from superblock.nn import BSRConv2d, BSRWeight
from superblock.report import LayerReport, Report
from superblock.surgery import folds, masked_weights, supermask_report


@dataclass(frozen=True)
class LayerMask:
    """The mask of one weight: ``mask [rows, columns]`` bool, and the ``scores`` of its tiles where there are any.

    The columns of a convolution run over inputs and kernel positions.
    """

    name: str
    mask: Tensor
    scores: Tensor | None = None


def model_report(model: nn.Module) -> Report:
    """Every masked, folded or block-sparse weight of a model, and the totals."""
    report = supermask_report(model)
    layers = _block_sparse(model)
    unstored = sum(math.prod(module.weight_shape) - module.values.numel() for module in layers.values())
    return Report((*report.layers, *(_converted(*each) for each in layers.items())), report.parameters + unstored)


def layer_masks(model: nn.Module) -> list[LayerMask]:
    """The masks of all weights that have one, in the model's order."""
    found: dict[int, LayerMask] = {}
    for layer, _, name, mask in masked_weights(model):
        found.setdefault(id(mask), LayerMask(_name(layer, name), _flat(mask.mask()), _flat(mask.scores)))
    for layer, module, name, fold in folds(model):
        mask_of_zeros = _living_tiles(module.get_parameter(name), fold.tile, fold.grid)
        found.setdefault(id(module.get_parameter(name)), LayerMask(_name(layer, name), _flat(mask_of_zeros)))
    for layer, module in _block_sparse(model).items():
        matrix = module.matrix
        grid = torch.zeros(matrix.grid, dtype=torch.bool)
        rows = row_indices(matrix.crow_indices, matrix.nnz).cpu()
        grid[rows, matrix.col_indices.long().cpu()] = True
        found[id(module)] = LayerMask(layer, grid)
    return list(found.values())


def _block_sparse(model: nn.Module) -> dict[str, BSRWeight]:
    """The block-sparse layers by name; of those that share their values the first."""
    seen: dict[int, tuple[str, BSRWeight]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BSRWeight):
            seen.setdefault(id(module.values), (name, module))
    return dict(seen.values())


def _converted(name: str, module: BSRWeight) -> LayerReport:
    matrix = module.matrix
    parameters = math.prod(module.weight_shape)
    positions = math.prod(module.weight_shape[2:])
    return LayerReport(
        name=name,
        kind="linear" if not isinstance(module, BSRConv2d) else "conv1x1" if positions == 1 else "conv",
        shape=module.weight_shape,
        tile=matrix.blocksize,
        grid=matrix.grid,
        target=None,
        sparsity=1 - matrix.density,
        zeros=parameters - stored_weights(module),
        parameters=parameters,
    )


def _living_tiles(weight: Tensor, tile: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    return tile_sums(weight.detach().ne(0).float(), tile).view(grid) > 0


def _flat(grid: Tensor) -> Tensor:
    return grid.detach().flatten(1).cpu() if grid.dim() > 2 else grid.detach().cpu()


def _name(layer: str, parameter: str) -> str:
    return layer if parameter == "weight" else f"{layer}.{parameter}".lstrip(".")

"""Folds batch norms into the convolutions before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superblock.bsr import row_indices
from superblock.fuse import count_uses, steps, watched
from superblock.nn import BSRConv2d, FoldedBatchNorm

_TRAINS = "its batch norm stays a layer, for it is in training mode: call eval() before to_bsr"


def fold_batch_norms(model: nn.Module) -> dict[int, str]:
    """Fold every batch norm in eval mode into the convolution before it, for good, in place.

    ``γ (W x + b - μ) / √(σ² + ε) + β`` is one product with scaled rows. A batch norm in training mode normalizes by its
    batch, so it stays. A model without a :class:`BSRConv2d` stays as it is.

    Returns:
        Why a batch norm stays, by the id of the convolution before it.
    """
    if not any(isinstance(module, BSRConv2d) for module in model.modules()):
        return {}
    uses = count_uses(model)
    notes = {}
    for module in list(model.modules()):
        for first, second in steps(module):
            layer, norm = getattr(module, first), getattr(module, second)
            if type(layer) not in (BSRConv2d, nn.Conv2d) or type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
                continue
            if norm.training:
                notes[id(layer)] = _TRAINS
            elif norm.running_mean is not None and uses[id(layer)] == uses[id(norm)] == 1 and not watched(layer, norm):
                _fold(layer, norm)
                setattr(module, second, FoldedBatchNorm(first).train(layer.training))
    return notes


@torch.no_grad()
def _fold(layer: BSRConv2d | nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None  # By the caller.
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    name = "values" if isinstance(layer, BSRConv2d) else "weight"
    weight = layer.get_parameter(name)
    factor = _by_block(scale, layer) if isinstance(layer, BSRConv2d) else scale[:, None, None, None]
    for kept, tensor in ((name, weight.double() * factor), ("bias", bias)):
        setattr(layer, kept, nn.Parameter(tensor.to(weight.dtype), requires_grad=weight.requires_grad))


def _by_block(scale: Tensor, layer: BSRConv2d) -> Tensor:
    """The factor of every row of every stored block, ``[nnz, bh, 1]``."""
    nnz, height, _ = layer.values.shape
    rows = len(layer.crow_indices) - 1
    padded = F.pad(scale, (0, rows * height - len(scale))).view(rows, height, 1)
    return padded[row_indices(layer.crow_indices, nnz)]

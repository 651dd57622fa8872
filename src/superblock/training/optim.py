"""Parameters in groups by what decays them, and the optimizer over these groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from superblock.surgery import score_parameters
from superblock.training.config import OptimizerConfig

NORMALIZATIONS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)
SCORE_LR = 0.1  # Scores begin near 1 whatever the weights are, so it needs no tuning along with theirs.
# By torchvision's names, then timm's.
EMBEDDINGS = frozenset({"class_token", "pos_embedding", "relative_position_bias_table", "cls_token", "pos_embed"})


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over :func:`parameter_groups`."""
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.name == "rmsprop":
        # The epsilon and smoothing with which MobileNet and EfficientNet were trained.
        return torch.optim.RMSprop(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, eps=0.0316, alpha=0.9
        )
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay, ordinary weights first, then those of biases, embeddings and
    normalizations that have a decay of their own, the scores last with their learning rate and no decay."""
    scores = score_parameters(model)
    decays = {
        "weight": config.weight_decay,
        "bias": config.bias_weight_decay,
        "embedding": config.transformer_embedding_decay,
        "normalization": config.norm_weight_decay,
    }
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in decays}
    seen = {id(parameter) for parameter in scores}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                kind = _kind(module, name)
                groups[kind if decays[kind] is not None else _fallback(module, decays)].append(parameter)
    result: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decays[kind]} for kind, parameters in groups.items() if parameters
    ]
    trained = [parameter for parameter in scores if parameter.requires_grad]
    if trained:
        result.append(
            {"params": trained, "weight_decay": 0.0, "lr": SCORE_LR if config.score_lr is None else config.score_lr}
        )
    return result


def _kind(module: nn.Module, name: str) -> str:
    if name in ("bias", "in_proj_bias"):
        return "bias"
    if name in EMBEDDINGS:
        return "embedding"
    return "normalization" if isinstance(module, NORMALIZATIONS) else "weight"


def _fallback(module: nn.Module, decays: dict[str, float | None]) -> str:
    """The group of a bias or embedding without a decay of its own: its layer's."""
    normalization = isinstance(module, NORMALIZATIONS) and decays["normalization"] is not None
    return "normalization" if normalization else "weight"

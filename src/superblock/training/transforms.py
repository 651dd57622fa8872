"""From an image to what a model takes: torchvision's reference preprocessing, with its v2 transforms."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2

from superblock.training.config import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def train_transform(config: DataConfig, size: int) -> Any:
    """Random crop and flip, the augmentation that ``config`` names, normalization, random erasing."""
    steps = [
        v2.RandomResizedCrop(size, interpolation=interpolation(config), antialias=True),
        v2.RandomHorizontalFlip(),
        *auto_augment(config),
        *_to_normalized(),
        *random_erase(config),
    ]
    return v2.Compose(steps)


def eval_transform(config: DataConfig, resize: int, crop: int) -> Any:
    """The centre of the image, normalized."""
    steps = [
        v2.Resize(resize, interpolation=interpolation(config), antialias=True),
        v2.CenterCrop(crop),
        *_to_normalized(),
    ]
    return v2.Compose(steps)


def auto_augment(config: DataConfig) -> list[Any]:
    """The augmentation policy that ``config`` names, for images of 8-bit values; none or one."""
    mode = interpolation(config)
    policy = config.auto_augment
    if policy is None:
        return []
    if policy == "ra":
        return [v2.RandAugment(magnitude=config.ra_magnitude, interpolation=mode)]
    if policy == "ta_wide":
        return [v2.TrivialAugmentWide(interpolation=mode)]
    if policy == "augmix":
        return [v2.AugMix(severity=config.augmix_severity, interpolation=mode)]
    return [v2.AutoAugment(v2.AutoAugmentPolicy(policy), interpolation=mode)]


def random_erase(config: DataConfig) -> list[Any]:
    """Erasing of a random rectangle of a normalized image; none or one."""
    return [v2.RandomErasing(config.random_erase)] if config.random_erase > 0 else []


def mixing(config: DataConfig, classes: int) -> Any | None:
    """MixUp or CutMix of a batch, one of them at random where both are asked for."""
    choices: list[Any] = []
    if config.mixup_alpha > 0:
        choices.append(v2.MixUp(alpha=config.mixup_alpha, num_classes=classes))
    if config.cutmix_alpha > 0:
        choices.append(v2.CutMix(alpha=config.cutmix_alpha, num_classes=classes))
    return v2.RandomChoice(choices) if choices else None


def interpolation(config: DataConfig) -> Any:
    """torchvision's name of an interpolation."""
    return InterpolationMode(config.interpolation)


def _to_normalized() -> list[Any]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        v2.ToPureTensor(),
    ]

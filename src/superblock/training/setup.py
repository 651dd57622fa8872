"""From a configuration and perhaps a file to a model and its data: what training and evaluation begin with."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from superblock import models
from superblock.errors import ConfigError, DataError
from superblock.threads import use_threads
from superblock.training.config import DataConfig, Interpolation, RunConfig
from superblock.training.data import Data, load_data
from superblock.training.randomness import seed_all
from superblock.weights import WeightsFile

DEFAULT_MODEL = "vit_b_16"
USUAL_SIZE = 224


@dataclass(frozen=True)
class Prepared:
    """A dense model on the CPU, built for the data, and the name it was built by."""

    model: nn.Module
    name: str
    data: Data
    classes: int


def set_up_torch(config: RunConfig) -> None:
    """Threads and determinism."""
    use_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif config.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True


def prepare(config: RunConfig, file: WeightsFile | None, *, training: bool) -> Prepared:
    """Build the model that ``config`` or ``file`` names, for the data that ``config`` names.

    Raises:
        ConfigError: an unknown model, or one that cannot take the images.
        DataError: no data, or with another number of classes than the file's model.
    """
    said = file.said if file is not None else {}
    name = config.model or said.get("architecture") or DEFAULT_MODEL
    cut = config.data if training else _as_the_weights_want(config.data, name, config.weights)
    data = load_data(cut, name, training=training, seed=config.seed, image_size=said.get("image_size"))
    classes = data.classes
    held = file.num_classes if file is not None else None
    if file is not None and held is not None and held != classes:
        if config.data.dataset != "fake":
            raise DataError(
                f"{file.source} tells {held} classes apart, the data set {config.data.dataset} has {classes}: "
                "take the data that the checkpoint was trained on"
            )
        classes = held
    if config.weights is not None and config.weights_path is not None:
        raise ConfigError("--weights and --weights-path exclude each other: give one of them")
    seed_all(config.seed)
    weights = config.weights if file is None else None
    model = models.build(name, num_classes=classes, weights=weights, image_size=data.image_size)
    if data.image_size != USUAL_SIZE:
        models.check_image_size(model, name, data.image_size)
    return Prepared(model, name, data, classes)


def _as_the_weights_want(data: DataConfig, name: str, weights: str | None) -> DataConfig:
    """Images cut as pretrained weights were evaluated, unless sizes are given."""
    wanted = None if weights is None else models.preprocessing(name, weights)
    if wanted is None or data.val_resize_size is not None or data.val_crop_size is not None:
        return data
    return replace(
        data, val_resize_size=wanted[0], val_crop_size=wanted[1], interpolation=cast(Interpolation, wanted[2])
    )

"""The model that a command's arguments and its file of weights mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from superblock.errors import ConfigError
from superblock.weights import WeightsFile

USUAL_SIZE = 224


@dataclass(frozen=True)
class Built:
    """A dense model on the CPU, and what it takes to build it again."""

    model: nn.Module
    architecture: str
    num_classes: int | None
    image_size: int


def build_model(
    architecture: str | None,
    file: WeightsFile | None = None,
    *,
    weights: str | None = None,
    image_size: int | None = None,
    default: str | None = None,
) -> Built:
    """Build the named model, or the one that the file says it is of, with as many classes as the file has.

    Args:
        architecture: what the user asked for.
        file: the weights that the model will take.
        weights: pretrained weights by name instead.
        image_size: the side of an image, where the user said it.
        default: the architecture where neither says one.

    Raises:
        ConfigError: no architecture is known, or both kinds of weights are asked for.
    """
    from superblock import models

    if file is not None and weights is not None:
        raise ConfigError("--weights and --weights-path exclude each other: give one of them")
    said = file.said if file is not None else {}
    name = architecture or said.get("architecture") or default
    if name is None:
        raise ConfigError(f"{file.source if file else 'the file'} does not name its architecture: give --model")
    classes = file.num_classes if file is not None else None
    size = image_size or said.get("image_size") or models.native_size(name)
    model = models.build(name, num_classes=classes, weights=weights, image_size=size)
    return Built(model, name, classes, size or _own_size(model))


def _own_size(model: nn.Module) -> int:
    """The side of the images that a model was built for, as torchvision's ViTs and timm's models say."""
    own = getattr(model, "image_size", None)
    if isinstance(own, int):
        return own
    described = getattr(model, "pretrained_cfg", None) or {}
    return int(described.get("input_size", (3, USUAL_SIZE, USUAL_SIZE))[-1])

"""Small images in memory: resized once, augmented and normalized a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from superblock.training.config import DataConfig
from superblock.training.randomness import derive, seeded
from superblock.training.small import SmallData, SmallImages
from superblock.training.transforms import auto_augment, interpolation, random_erase

Batch = tuple[Tensor, Tensor]


class MemoryImages(Dataset[Batch]):
    """A split for evaluation; a batch of indices gives ``images [b, 3, size, size]`` float and ``labels [b]``."""

    def __init__(self, data: SmallData, split: SmallImages, config: DataConfig, size: int) -> None:
        images = split.images
        if images.shape[-1] != size:
            images = tv.resize(images, [size, size], interpolation=interpolation(config), antialias=True)
        self.images, self.labels, self.size = images, split.labels, size
        self.data = data

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(indices)
        return self.normalized(self.images[chosen]), self.labels[chosen]

    def normalized(self, images: Tensor) -> Tensor:
        """Floats of mean 0 and standard deviation 1, in three equal channels."""
        scaled = (images.float() / 255 - self.data.mean) / self.data.std
        return scaled.expand(-1, 3, -1, -1).contiguous()


class AugmentedMemoryImages(MemoryImages):
    """A split for training: items are ``(index, position)`` of :class:`TrainSampler`.

    An image is mirrored half of the time where its kind allows, then augmented as ``config`` says. What is drawn
    follows from seed, epoch and position alone.
    """

    def __init__(self, data: SmallData, split: SmallImages, config: DataConfig, size: int, seed: int) -> None:
        super().__init__(data, split, config, size)
        self.each, self.erase = auto_augment(config), random_erase(config)
        self.seed = seed
        self.positions = len(self) * (config.ra_reps if config.ra_sampler else 1)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw at once which images of the epoch are mirrored."""
        self.epoch = epoch
        generator = torch.Generator().manual_seed(derive(self.seed, epoch))
        self.mirrored = torch.rand(self.positions, generator=generator) < (0.5 if self.data.flip else 0.0)

    def __getitems__(self, items: Sequence[Any]) -> Batch:
        indices, positions = torch.tensor(items).unbind(1)
        turn = positions % self.positions  # The last round may be filled up beyond the end.
        images = self.images[indices]
        images = torch.where(self.mirrored[turn, None, None, None], images.flip(-1), images)
        if self.each:
            images = torch.stack(
                [self._one(image, int(place), self.each) for image, place in zip(images, positions, strict=True)]
            )
        normal = self.normalized(images)
        if self.erase:
            normal = torch.stack(
                [self._one(image, int(place), self.erase) for image, place in zip(normal, positions, strict=True)]
            )
        return normal, self.labels[indices]

    def _one(self, image: Tensor, position: int, steps: list[Any]) -> Tensor:
        with seeded(self.seed, self.epoch, position):
            for step in steps:
                image = step(image)
        return image

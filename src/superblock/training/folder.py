"""Images in one folder a class, as ImageNet and most other data sets come."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, find_classes, make_dataset

from superblock.errors import CheckpointError, DataError
from superblock.files import read_checkpoint, write_checkpoint
from superblock.training.randomness import seeded


class FolderImages(Dataset[tuple[Tensor, int]]):
    """The images below ``folder``, whose sub-folders name the classes.

    Args:
        folder: for example ``imagenet/train``.
        transform: from a PIL image to a tensor.
        cache: keep the list of files, which takes minutes to make over a network, for the next time.

    Raises:
        DataError: the folder is missing, or has no classes or images.
    """

    def __init__(self, folder: Path, transform: Any, cache: bool = False) -> None:
        if not folder.is_dir():
            raise DataError(f"no folder {folder}: --data-path must hold train/ and val/, each with a folder a class")
        try:
            self.classes, numbers = find_classes(str(folder))
            listing = _list_cached if cache else _list
            self.samples = listing(folder, self.classes, numbers)
        except FileNotFoundError as error:
            raise DataError(
                f"no images in {folder}: expected a folder a class, each with images ({', '.join(IMG_EXTENSIONS)})"
            ) from error
        self.folder, self.transform = folder, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            image = default_loader(path)
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path} is not a readable image: remove or replace it") from error
        return self.transform(image), label


class SeededImages(Dataset[tuple[Tensor, int]]):
    """Any data set for training: items are ``(index, position)`` of :class:`TrainSampler`, and what the transforms
    draw follows from seed, epoch and position alone."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed, self.epoch = images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Other draws for every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, position = item
        with seeded(self.seed, self.epoch, position):
            return self.images[index]


def _list(folder: Path, classes: list[str], numbers: dict[str, int]) -> list[tuple[str, int]]:
    return make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS)


def _list_cached(folder: Path, classes: list[str], numbers: dict[str, int]) -> list[tuple[str, int]]:
    """As :func:`_list`, from the last time unless a class folder has changed since."""
    state = [str(folder.resolve()), [(name, (folder / name).stat().st_mtime_ns) for name in classes]]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:20]
    path = Path(torch.hub.get_dir()) / "superblock" / f"{key}.pt"
    if path.is_file():
        try:
            return [(str(folder / name), label) for name, label in read_checkpoint(path)["samples"]]
        except CheckpointError:
            path.unlink(missing_ok=True)
    samples = _list(folder, classes, numbers)
    relative = [(str(Path(name).relative_to(folder)), label) for name, label in samples]
    write_checkpoint(path, {"samples": relative})
    return samples

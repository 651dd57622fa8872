"""The images of a run: data sets by name, and loaders that give them to the processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, default_collate
from torchvision.datasets import FakeData

from superblock.errors import ConfigError, DataError
from superblock.models import native_size, takes_image_size
from superblock.training.config import DataConfig
from superblock.training.distributed import World
from superblock.training.folder import FolderImages, SeededImages
from superblock.training.memory import AugmentedMemoryImages, MemoryImages
from superblock.training.randomness import derive
from superblock.training.samplers import EvalSampler, TrainSampler
from superblock.training.small import SmallData, SmallImages, load_small
from superblock.training.transforms import eval_transform, mixing, train_transform

FAKE_TRAIN, FAKE_VAL = 256, 64
FAKE_CLASSES = 1000  # ImageNet's, so that its models fit.
DEFAULT_FOLDER = "data"
PHOTOGRAPH = 224
SMALLEST_PHOTOGRAPH = 32  # What models made for photographs can take at the least.


@dataclass(frozen=True)
class Data:
    """Data sets for training (``None`` where only evaluation was asked for) and evaluation.

    ``image_size`` is the side of the images that the model is built for.
    """

    train: Any | None
    val: Any
    classes: int
    image_size: int


def load_data(
    config: DataConfig, model: str, *, training: bool = True, seed: int = 0, image_size: int | None = None
) -> Data:
    """Read or open the data set that ``config`` names.

    Args:
        config: which data, and how it is cut and augmented.
        model: the name of the model, which may be made for one size of image.
        training: whether the training split is needed.
        seed: of the augmentation.
        image_size: the side for which the model is known to be built, where ``config`` gives none.

    Raises:
        DataError: files are missing, empty or damaged.
        ConfigError: sizes that the model cannot take.
    """
    config = _with_size(config, image_size)
    if config.dataset in ("digits", "fashion-mnist"):
        return _load_small(config, model, training, seed)
    usual = native_size(model) or PHOTOGRAPH
    train_size, val_size = config.train_crop_size or usual, config.val_crop_size or usual
    _check_sizes(model, train_size, val_size, training)
    resize = config.val_resize_size or (max(256, val_size) if config.val_crop_size else usual * 8 // 7)
    transforms = train_transform(config, train_size), eval_transform(config, resize, val_size)
    if config.dataset == "fake":
        train, val = (
            _fake(count, transform) for count, transform in zip((FAKE_TRAIN, FAKE_VAL), transforms, strict=True)
        )
        everything = {"train": _fake(FAKE_TRAIN, transforms[1]), "val": val}
        classes = FAKE_CLASSES
    else:
        root = Path(config.path or DEFAULT_FOLDER)
        opened = {
            name: FolderImages(root / name, transforms[1], config.cache)
            for name in ("train", "val")
            if training or config.split in (name, "all")
        }
        _check_classes(opened)
        everything, classes = dict(opened), len(next(iter(opened.values())).classes)
        train = FolderImages(root / "train", transforms[0], config.cache) if training else None
    chosen = list(everything.values()) if config.split == "all" else [everything[config.split]]
    return Data(
        SeededImages(train, seed) if training else None,
        chosen[0] if len(chosen) == 1 else ConcatDataset(chosen),
        classes,
        train_size if training else val_size,
    )


def train_loader(data: Data, config: DataConfig, world: World, seed: int) -> DataLoader[Any]:
    """Batches for training; :func:`begin_epoch` comes before each pass."""
    if data.train is None:
        raise DataError("the training split was not loaded")
    sampler = TrainSampler(len(data.train), config, seed, world.rank, world.size)
    return _loader(data.train, config, world, sampler, mixing(config, data.classes))


def eval_loader(data: Data, config: DataConfig, world: World) -> DataLoader[Any]:
    """Batches for evaluation, each image once over all processes."""
    return _loader(data.val, config, world, EvalSampler(len(data.val), world.rank, world.size), None)


def begin_epoch(loader: DataLoader[Any], epoch: int, seed: int, world: World) -> None:
    """Give the epoch its order, its augmentation and its workers' seeds."""
    sampler: Any = loader.sampler
    dataset: Any = loader.dataset
    sampler.set_epoch(epoch)
    dataset.set_epoch(epoch)
    assert loader.generator is not None  # By `_loader`.
    loader.generator.manual_seed(derive(seed, epoch, world.rank))


def batches(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches on ``device``; an error made for users in a worker stays one line."""
    try:
        for images, targets in loader:
            yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    except DataError as error:
        last = str(error).strip().rpartition("\n")[2]
        raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from None


class _Collate:
    """Samples to a batch, mixed where asked for; a data set in memory gives whole batches already."""

    def __init__(self, whole: bool, mix: Any | None) -> None:
        self.whole, self.mix = whole, mix

    def __call__(self, samples: Any) -> tuple[Tensor, Tensor]:
        images, labels = samples if self.whole else default_collate(samples)
        return self.mix(images, labels) if self.mix is not None else (images, labels)


def _loader(dataset: Any, config: DataConfig, world: World, sampler: Any, mix: Any | None) -> DataLoader[Any]:
    whole = hasattr(dataset, "__getitems__")
    workers = config.workers
    if workers is None:
        workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=sampler,
        num_workers=0 if whole else workers,  # What is in memory takes less time than handing it over.
        collate_fn=_Collate(whole, mix),
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),
    )


def _load_small(config: DataConfig, model: str, training: bool, seed: int) -> Data:
    small = load_small(config.dataset, config.path)
    native = native_size(model) or max(SMALLEST_PHOTOGRAPH, small.train.images.shape[-1])
    train_size = config.train_crop_size or config.val_crop_size or native
    val_size = config.val_crop_size or train_size
    _check_sizes(model, train_size, val_size, training)
    split = {"train": small.train, "val": small.val, "all": _joined(small)}[config.split]
    return Data(
        AugmentedMemoryImages(small, small.train, config, train_size, seed) if training else None,
        MemoryImages(small, split, config, val_size),
        small.classes,
        train_size if training else val_size,
    )


def _joined(small: SmallData) -> SmallImages:
    return SmallImages(
        torch.cat([small.train.images, small.val.images]), torch.cat([small.train.labels, small.val.labels])
    )


def _fake(count: int, transform: Any) -> Any:
    return FakeData(count, (3, 256, 256), FAKE_CLASSES, transform, random_offset=0 if count == FAKE_TRAIN else count)


def _with_size(config: DataConfig, image_size: int | None) -> DataConfig:
    if image_size is None:
        return config
    return replace(
        config,
        train_crop_size=config.train_crop_size or image_size,
        val_crop_size=config.val_crop_size or image_size,
    )


def _check_sizes(model: str, train_size: int, val_size: int, training: bool) -> None:
    if training and train_size != val_size and takes_image_size(model):
        raise ConfigError(
            f"{model} is built for one size of image: set --train-crop-size ({train_size}) and "
            f"--val-crop-size ({val_size}) to the same"
        )


def _check_classes(opened: dict[str, FolderImages]) -> None:
    if len(opened) == 2 and opened["train"].classes != opened["val"].classes:
        train, val = (opened[name] for name in ("train", "val"))
        raise DataError(
            f"{train.folder} has {len(train.classes)} classes, {val.folder} {len(val.classes)}, "
            "and they must be the same"
        )

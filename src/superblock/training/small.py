"""The small data sets: handwritten digits (in scikit-learn) and Fashion-MNIST (as Debian installs it)."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from superblock.errors import DataError

FASHION_PATH = "/usr/share/datasets/fashion-mnist"
DIGITS_TRAIN = 1440  # Of 1,797: divisible by most batch sizes and numbers of processes.


@dataclass(frozen=True)
class SmallImages:
    """A split of a data set, whole in memory: ``images [n, 1, side, side]`` uint8 and ``labels [n]``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class SmallData:
    """A small data set: its splits, and what its training augmentation and normalization take.

    ``flip`` says whether an image may be mirrored.
    """

    train: SmallImages
    val: SmallImages
    classes: int
    mean: float
    std: float
    flip: bool


def load_small(name: str, path: str | None) -> SmallData:
    """``digits`` or ``fashion-mnist``; the latter from the IDX files in the folder ``path``.

    Raises:
        DataError: a file is missing or damaged.
    """
    return _digits() if name == "digits" else _fashion(Path(path or FASHION_PATH))


def _digits() -> SmallData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target.astype(np.int64))
    train, val = train_test_split(np.arange(len(labels)), train_size=DIGITS_TRAIN, stratify=labels, random_state=0)
    return SmallData(
        SmallImages(images[train], labels[train]),
        SmallImages(images[val], labels[val]),
        classes=10,
        mean=0.305,
        std=0.376,
        flip=False,
    )


def _fashion(folder: Path) -> SmallData:
    splits: list[SmallImages] = []
    for prefix, count in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or len(images) == 0:
            raise DataError(
                f"{folder}: expected {count} images and as many labels in {prefix}-*.gz, "
                f"got {tuple(images.shape)} and {tuple(labels.shape)}: install dataset-fashion-mnist again"
            )
        splits.append(SmallImages(images[:, None], labels.long()))
    train, val = splits
    return SmallData(train, val, classes=10, mean=0.286, std=0.353, flip=True)


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes (two zeros, type 8, the number of dimensions, each as a big-endian int32), gzipped.

    Raises:
        DataError: the file is missing, truncated or of another format.
    """
    if not path.is_file():
        raise DataError(
            f"no {path}: set --data-path to the folder with Fashion-MNIST's four .gz files "
            "(Debian: apt-get install dataset-fashion-mnist)"
        )
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or not gzipped: install dataset-fashion-mnist again") from error
    dimensions = content[3] if len(content) > 3 else 0
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if content[:3] != b"\0\0\x08" or dimensions == 0 or len(content) != header + math.prod(shape):
        raise DataError(f"{path} is not an IDX file of bytes: install dataset-fashion-mnist again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())

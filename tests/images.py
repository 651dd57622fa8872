"""Small data sets on disk, for the tests."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from PIL import Image


def write_images(root: Path, split: str, classes: int = 2, count: int = 3) -> Path:
    """``count`` images a class as ImageFolder has them."""
    for label in range(classes):
        folder = root / split / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 30), (80 * label, 10 * index, 7)).save(folder / f"{index}.png")
    return root


def write_idx(path: Path, values: torch.Tensor) -> None:
    """Bytes as IDX has them, gzipped."""
    header = bytes([0, 0, 8, values.dim()]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


def write_fashion(folder: Path, train: int = 6, val: int = 4) -> Path:
    """Noise in the files of Fashion-MNIST."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", train), ("t10k", val)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", torch.arange(count).remainder(10).to(torch.uint8))
    return folder

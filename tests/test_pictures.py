"""Pictures are PNG files, complete or absent, whatever the mask's shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from superblock.errors import CheckpointError
from superblock.inspection import LayerMask
from superblock.pictures import draw_accuracy, draw_latency, draw_masks

pytest.importorskip("matplotlib")


def size_of(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (1, 30)])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("living", [0, 1])
def test_a_mask_of_any_shape_is_drawn(tmp_path: Path, shape: tuple[int, int], scored: bool, living: int) -> None:
    mask = LayerMask("layer", torch.full(shape, bool(living)), torch.randn(shape).bfloat16() if scored else None)
    (path,) = draw_masks([mask], tmp_path / "masks")
    assert path == tmp_path / "masks" / "layer.png"
    width, height = size_of(path)
    assert 100 < width < 1200
    assert 100 < height < 1200


def test_curves_are_drawn(tmp_path: Path) -> None:
    accuracy = draw_accuracy({"dense": [50.0, 90.5], "90 %": [40.0, 88.0]}, tmp_path / "accuracy.png")
    latency = draw_latency({"bsr": [(0.9, 1.2), (0.8, 2.1)], "dense": [(0.0, 5.0)]}, tmp_path / "latency.png")
    assert size_of(accuracy) == size_of(latency) == (720, 480)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*accuracy\.png"):
        draw_accuracy({"dense": [1.0]}, tmp_path / "file" / "accuracy.png")

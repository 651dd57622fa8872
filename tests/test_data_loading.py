"""Data sets: what they hold, how they are cut and augmented, and what is said where they are missing or damaged."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from images import write_fashion, write_idx, write_images
from PIL import Image

from superblock.errors import ConfigError, DataError
from superblock.training.config import DataConfig
from superblock.training.data import batches, begin_epoch, eval_loader, load_data, train_loader
from superblock.training.distributed import World
from superblock.training.memory import AugmentedMemoryImages
from superblock.training.samplers import EvalSampler, TrainSampler
from superblock.training.small import load_small, read_idx

ALONE = World(torch.device("cpu"))


def test_digits_are_split_once_and_for_all() -> None:
    digits = load_small("digits", None)
    assert (len(digits.train.labels), len(digits.val.labels)) == (1440, 357)
    counts = digits.val.labels.bincount(minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert digits.train.images.shape == (1440, 1, 8, 8)
    assert digits.train.images.max() == 255
    again = load_small("digits", None)
    assert torch.equal(digits.train.images, again.train.images)
    both = torch.cat([digits.train.images, digits.val.images]).float() / 255
    assert both.mean().item() == pytest.approx(digits.mean, abs=1e-3)
    assert both.std().item() == pytest.approx(digits.std, abs=1e-3)


@pytest.mark.parametrize(("split", "count"), [("val", 357), ("train", 1440), ("all", 1797)])
def test_evaluation_looks_at_the_split_it_is_told(split: Any, count: int) -> None:
    data = load_data(DataConfig(dataset="digits", split=split), "vit_digits", training=False)
    assert len(data.val) == count
    assert data.train is None


@pytest.mark.parametrize(
    ("model", "config", "size"),
    [
        ("vit_digits", DataConfig(dataset="digits"), 8),
        ("vit_fashion", DataConfig(dataset="digits"), 28),
        ("vit_b_16", DataConfig(dataset="digits"), 32),
        ("vit_digits", DataConfig(dataset="digits", train_crop_size=12, val_crop_size=12), 12),
        ("resnet18", DataConfig(dataset="fake"), 224),
    ],
)
def test_images_have_the_size_that_the_model_takes(model: str, config: DataConfig, size: int) -> None:
    data = load_data(config, model)
    assert data.image_size == size
    loader = train_loader(data, config, ALONE, seed=0)
    images, labels = next(iter(loader)) if config.dataset == "digits" else (data.train[0, 0][0][None], None)
    assert images.shape[1:] == (3, size, size)
    assert labels is None or labels.shape == (32,)
    assert images.dtype == torch.float32


def test_fashion_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    data = load_data(DataConfig(dataset="fashion-mnist", path=str(tmp_path)), "vit_fashion")
    assert (len(data.train), len(data.val), data.image_size, data.classes) == (6, 4, 28, 10)
    assert read_idx(tmp_path / "train-labels-idx1-ubyte.gz").tolist() == [0, 1, 2, 3, 4, 5]
    write_idx(tmp_path / "some.gz", torch.arange(6, dtype=torch.uint8).view(1, 2, 3))
    assert read_idx(tmp_path / "some.gz").tolist() == [[[0, 1, 2], [3, 4, 5]]]


def test_a_damaged_or_missing_file_of_fashion_mnist_is_named(tmp_path: Path) -> None:
    config = DataConfig(dataset="fashion-mnist", path=str(tmp_path))
    with pytest.raises(DataError, match=r"no .*train-images-idx3-ubyte.gz: set --data-path .*apt-get install"):
        load_data(config, "vit_fashion")
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is truncated or not gzipped"):
        load_data(config, "vit_fashion")
    path.write_bytes(gzip.compress(b"not this"))
    with pytest.raises(DataError, match="is not an IDX file of bytes"):
        load_data(config, "vit_fashion")
    write_idx(path, torch.zeros(5, 28, 28, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"expected 60000 images and as many labels .*got \(5, 28, 28\) and \(6,\)"):
        load_data(config, "vit_fashion")


def test_a_folder_gives_its_images_under_every_policy(tmp_path: Path) -> None:
    write_images(write_images(tmp_path, "train"), "val")
    for policy in ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn"):
        config = DataConfig(path=str(tmp_path), auto_augment=policy, random_erase=0.5, workers=0, mixup_alpha=0.2)  # type: ignore[arg-type]
        data = load_data(config, "resnet18")
        images, targets = next(iter(train_loader(data, config, ALONE, seed=0)))
        assert images.shape == (6, 3, 224, 224)
        assert targets.shape == (6, 2)
        assert images.isfinite().all()
    assert (data.classes, len(data.val)) == (2, 6)


def test_the_list_of_files_is_kept_until_the_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    write_images(write_images(tmp_path, "train"), "val")
    config = DataConfig(path=str(tmp_path), cache=True)
    first = load_data(config, "resnet18").val.samples
    kept = list((tmp_path / "hub" / "superblock").iterdir())
    assert len(kept) == 2
    assert load_data(config, "resnet18").val.samples == first
    for path in kept:
        path.write_bytes(b"damaged")
    assert load_data(config, "resnet18").val.samples == first
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "class0" / "new.png")
    assert len(load_data(config, "resnet18").val) == 7


def test_folders_that_do_not_do_are_named(tmp_path: Path) -> None:
    config = DataConfig(path=str(tmp_path))
    with pytest.raises(DataError, match=r"no folder .*/val: --data-path must hold train/ and val/"):
        load_data(config, "resnet18", training=False)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"no images in .*/train: expected a folder a class"):
        load_data(config, "resnet18")
    (tmp_path / "train" / "class0").mkdir()
    with pytest.raises(DataError, match=r"no images in .*/train"):
        load_data(config, "resnet18")
    (tmp_path / "train" / "class0").rmdir()
    write_images(write_images(tmp_path, "train"), "val", classes=3)
    with pytest.raises(DataError, match=r"train has 2 classes, .*val 3, and they must be the same"):
        load_data(config, "resnet18")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path, "val")
    (tmp_path / "val" / "class0" / "0.png").write_bytes(b"no image")
    config = DataConfig(path=str(tmp_path), workers=workers)
    data = load_data(config, "resnet18", training=False)
    with pytest.raises(DataError, match=r"^/\S*0\.png is not a readable image: remove or replace it$"):
        list(batches(eval_loader(data, config, ALONE), ALONE.device))


def test_two_sizes_for_a_model_built_for_one_are_refused() -> None:
    config = DataConfig(dataset="digits", train_crop_size=8, val_crop_size=16)
    with pytest.raises(ConfigError, match=r"built for one size of image: set --train-crop-size \(8\)"):
        load_data(config, "vit_b_16")
    assert load_data(config, "resnet18").image_size == 8


@pytest.mark.parametrize("dataset", ["digits", "fake"])
def test_augmentation_follows_from_seed_epoch_and_position_alone(dataset: Any) -> None:
    config = DataConfig(dataset=dataset, auto_augment="ta_wide", random_erase=0.5)

    def draw(seed: int, epoch: int, position: int) -> torch.Tensor:
        data = load_data(config, "resnet18", seed=seed).train
        data.set_epoch(epoch)
        torch.rand(3)
        return data.__getitems__([(5, position)])[0][0] if dataset == "digits" else data[5, position][0]

    assert torch.equal(draw(0, 1, 2), draw(0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(draw(0, 1, 2), draw(*other))


def test_half_of_the_clothes_are_mirrored_and_no_digit_is() -> None:
    digits = load_small("digits", None)
    for flip in (False, True):
        data = AugmentedMemoryImages(replace(digits, flip=flip), digits.train, DataConfig(dataset="digits"), 8, seed=0)
        images, _ = data.__getitems__([(index, index) for index in range(200)])
        plain = data.normalized(data.images[:200])
        same, mirrored = ((images == other).flatten(1).all(1) for other in (plain, plain.flip(-1)))
        assert bool((same | mirrored).all())
        assert bool(same.all()) != flip
        assert 60 < int(same.sum()) <= 140 or not flip


@pytest.mark.parametrize(("size", "world"), [(10, 1), (10, 3), (2, 4), (1797, 2)])
def test_every_image_is_evaluated_once_at_any_number_of_processes(size: int, world: int) -> None:
    shares = [list(EvalSampler(size, rank, world)) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert [len(EvalSampler(size, rank, world)) for rank in range(world)] == [len(share) for share in shares]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_holds_every_image_once_and_marks_what_fills_it_up(world: int) -> None:
    samplers = [TrainSampler(10, DataConfig(), 0, rank, world) for rank in range(world)]
    drawn = [pair for sampler in samplers for pair in sampler]
    assert sorted(index for index, position in drawn if position < 10) == list(range(10))
    assert sorted(position for _, position in drawn) == list(range(len(drawn)))
    first = list(samplers[0])
    samplers[0].set_epoch(1)
    assert list(samplers[0]) != first


def test_repeated_augmentation_gives_an_image_to_several_processes() -> None:
    config = DataConfig(ra_sampler=True, ra_reps=3)
    samplers = [TrainSampler(12, config, 0, rank, 3) for rank in range(3)]
    rounds = list(zip(*samplers, strict=True))
    assert len(rounds) == 4
    assert all(len({index for index, _ in pairs}) == 1 for pairs in rounds)
    assert all(len({position for _, position in pairs}) == 3 for pairs in rounds)


def test_an_epochs_order_depends_on_nothing_before_it() -> None:
    config = DataConfig(dataset="digits", batch_size=8)
    loader = train_loader(load_data(config, "vit_digits"), config, ALONE, seed=3)
    begin_epoch(loader, 2, 3, ALONE)
    images, labels = next(iter(loader))
    begin_epoch(loader, 0, 3, ALONE)
    next(iter(loader))
    begin_epoch(loader, 2, 3, ALONE)
    again, same_labels = next(iter(loader))
    assert torch.equal(images, again)
    assert torch.equal(labels, same_labels)

"""``superblock inspect`` reports any checkpoint and draws its masks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import ORIGINAL, ORIGINAL_MODEL, digits_checkpoint, refused, run
from networks import ConvNet

from superblock import SupermaskConfig, TileSparsity, apply_supermask, models, save, sparsify_weights, to_bsr
from superblock.checkpoint import load
from superblock.inspection import layer_masks, model_report
from superblock.surgery import mark_folded, supermask_report
from superblock.targets import select


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("form", ["masked", "bsr"])
def test_every_weight_is_reported_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str) -> None:
    path = digits_checkpoint(tmp_path / "model.pth")
    if form == "bsr":
        run(capsys, "convert", path, "-o", tmp_path / "model.safetensors")
        path = tmp_path / "model.safetensors"
    status, out, err = run(capsys, "inspect", path, "--output-dir", tmp_path / "pictures")
    assert status == 0, err
    assert f"vit_digits, {form}" in out
    assert re.search(r"sparsity of the 17 masked weights 8\d\.\d\d%, of the whole model 8\d\.\d\d%", out)
    assert "wrote 17 pictures" in out
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert len(pictures) == 17
    assert all(is_picture(picture) for picture in pictures)


def test_an_original_checkpoint_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "inspect", ORIGINAL / "model_3.pth", "--model", ORIGINAL_MODEL)
    assert status == 0, err
    assert "they stay dense" in out
    assert "sparsity of the 7 masked weights" in out


def test_a_dense_checkpoint_has_nothing_to_draw(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(models.build("vit_digits").state_dict(), tmp_path / "dense.pth")
    arguments = ("inspect", tmp_path / "dense.pth", "--model", "vit_digits", "--output-dir", tmp_path / "pictures")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "no weight is masked (" in out
    assert "wrote 0 pictures" in out


def test_a_missing_file_is_one_line_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, "inspect", tmp_path / "model.pth", "--output-dir", tmp_path / "pictures")
    assert "no checkpoint at" in line
    assert not (tmp_path / "pictures").exists()


def test_a_folder_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = digits_checkpoint(tmp_path / "model.pth")
    assert "is not a folder" in refused(capsys, "inspect", path, "--output-dir", path / "pictures")


@pytest.fixture
def convnet() -> ConvNet:
    model = ConvNet()
    target = TileSparsity(0.5, 4)
    apply_supermask(model, SupermaskConfig(linear=target, conv1x1=target, conv=target))
    return model


def test_reports_and_masks_agree_in_every_form(convnet: ConvNet) -> None:
    report = supermask_report(convnet)
    masks = {mask.name: mask for mask in layer_masks(convnet)}
    assert all(mask.scores is not None and mask.scores.shape == mask.mask.shape for mask in masks.values())
    sparsify_weights(convnet)
    for step in range(2):
        found = {mask.name: mask.mask for mask in layer_masks(convnet)}
        assert found.keys() == masks.keys()
        assert all(torch.equal(found[name], masks[name].mask) for name in masks)
        now = model_report(convnet)
        assert {layer.name: layer.zeros for layer in now.layers} == {layer.name: layer.zeros for layer in report.layers}
        assert now.masked_sparsity == pytest.approx(report.masked_sparsity)
        assert now.parameters == report.parameters
        if step == 0:
            to_bsr(convnet)


def test_folds_are_recognised_again_in_a_folded_file(convnet: ConvNet, tmp_path: Path) -> None:
    target = TileSparsity(0.5, 4)
    config = SupermaskConfig(linear=target, conv1x1=target, conv=target)
    report = sparsify_weights(convnet)
    save(convnet, tmp_path / "folded.safetensors")
    model = load(tmp_path / "folded.safetensors", ConvNet())
    mark_folded(select(model, config), config)
    assert supermask_report(model) == report
    assert len(to_bsr(model).layers) == len(report.layers)

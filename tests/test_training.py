"""Training: it learns, resumes exactly, stops at a loss that is not finite, and leaves what it should."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from few_digits import few_digits  # noqa: F401 (a fixture)
from images import write_images

from superblock import Supermask, SupermaskConfig, TileSparsity
from superblock.errors import CheckpointError, ConfigError, DataError, TrainingError
from superblock.files import read_checkpoint, write_checkpoint
from superblock.training import (
    AverageConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    assess,
    fit,
    loop,
)
from superblock.training.state import find_checkpoint, save_checkpoint

MASKS = SupermaskConfig(linear=TileSparsity(0.5, 16))


class StopError(Exception):
    """What ends a run from outside."""


def config(folder: Path | None = None, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "model": "vit_digits",
        "supermask": MASKS,
        "data": DataConfig(dataset="digits", batch_size=16),
        "optimizer": OptimizerConfig(name="adamw", lr=1e-3, clip_grad_norm=1.0),
        "schedule": ScheduleConfig(name="cosineannealinglr", warmup_epochs=1, warmup_method="linear"),
        "average": AverageConfig(steps=1, decay=0.9),
        "epochs": 3,
        "output_dir": None if folder is None else str(folder),
    }
    return TrainConfig(**{**options, **changes})


def stop_after(epoch: int) -> Any:
    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == epoch:
            raise StopError

    return stop


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(
    "changes",
    [
        {"data": DataConfig(dataset="digits", batch_size=16, mixup_alpha=0.2, cutmix_alpha=1.0, auto_augment="ra")},
        {
            "optimizer": OptimizerConfig(lr=0.01, score_lr=0.1),
            "schedule": ScheduleConfig(step_size=1),
            "average": None,
            "amp": True,
            "accumulation_steps": 2,
            "data": DataConfig(dataset="digits", batch_size=16, ra_sampler=True, random_erase=0.5),
        },
    ],
    ids=["adamw-cosine-ema-mixup-ra", "sgd-step-amp-accumulation-erase-trained-scores"],
)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = fit(config(tmp_path / "whole", **changes), quiet=True)
    stopped = config(tmp_path / "stopped", resume="auto", **changes)
    with pytest.raises(StopError):
        fit(stopped, quiet=True, on_epoch=stop_after(0))
    torch.rand(7)
    resumed = fit(stopped, quiet=True)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    a, b = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "stopped"))
    assert same(a["model"], b["model"])
    assert (a["model_ema"] is None and b["model_ema"] is None) or same(a["model_ema"], b["model_ema"])
    assert a["lr_scheduler"] == b["lr_scheduler"]
    for key, state in a["optimizer"]["state"].items():
        assert same(
            *(
                {n: torch.as_tensor(v) for n, v in s.items() if v is not None}
                for s in (state, b["optimizer"]["state"][key])
            )
        )
    speed = {"images_per_second"}
    pairs = zip(whole.history, resumed.history, strict=True)
    assert all({k: x[k] for k in x if k not in speed} == {k: y[k] for k in y if k not in speed} for x, y in pairs)


def test_a_folder_read_by_workers_resumes_exactly_whatever_their_number(tmp_path: Path) -> None:
    write_images(write_images(tmp_path, "train"), "val")
    changes: dict[str, Any] = {"model": "vit_fashion", "average": None, "epochs": 2, "schedule": ScheduleConfig()}
    one, two = (
        {**changes, "data": DataConfig(path=str(tmp_path), batch_size=4, auto_augment="ta_wide", workers=workers)}
        for workers in (0, 2)
    )
    whole = fit(config(**one), quiet=True)
    stopped = config(tmp_path / "out", resume="auto", **two)
    with pytest.raises(StopError):
        fit(stopped, quiet=True, on_epoch=stop_after(0))
    assert same(whole.model.state_dict(), fit(stopped, quiet=True).model.state_dict())


@pytest.mark.usefixtures("few_digits")
def test_every_epoch_leaves_its_figures_and_a_bounded_number_of_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fit(config(tmp_path, keep_checkpoints=1, tensorboard=True))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == result.history
    assert [record["epoch"] for record in records] == [0, 1, 2]
    expected = "epoch loss acc1 lr masked_sparsity model_sparsity tiles_changed images_per_second val_loss val_acc1"
    assert set(expected.split()) <= set(records[0])
    assert 0.4 < records[0]["model_sparsity"] < records[0]["masked_sparsity"] <= 0.51
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint.pth", "model_2.pth"]
    assert list(tmp_path.glob("events.out.*"))
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert content["config"]["architecture"] == "vit_digits"
    assert content["config"]["num_classes"] == 10
    assert content["config"]["image_size"] == 8
    assert SupermaskConfig.from_dict(content["config"]["supermask"]) == MASKS
    out = capsys.readouterr().out
    assert "Epoch: [2] [3/3]" in out
    assert "images/s  left 0:00:00" in out
    assert "tiles changed" in out
    assert "Test: EMA Acc@1" in out


@pytest.mark.usefixtures("few_digits")
def test_training_learns_and_its_checkpoint_evaluates_in_every_form(tmp_path: Path) -> None:
    result = fit(config(tmp_path, epochs=6, schedule=ScheduleConfig(), average=AverageConfig(1, 0.5)), quiet=True)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    base = EvalConfig(weights_path=str(tmp_path / "checkpoint.pth"), data=DataConfig(dataset="digits"))
    online = assess(base, quiet=True)
    assert online.images == 20
    assert online.acc1 == pytest.approx(result.history[-1]["val_acc1"])
    for form in (replace(base, sparsify_weights=True), replace(base, sparsify_weights=True, bsr=16)):
        assert assess(form, quiet=True).loss == pytest.approx(online.loss, abs=1e-4)
    average = assess(replace(base, average=True, sparsify_weights=True, bsr=0), quiet=True)
    assert average.acc1 == pytest.approx(result.history[-1]["ema_acc1"])
    assert assess(replace(base, dtype="bfloat16"), quiet=True).loss == pytest.approx(online.loss, rel=0.05)


@pytest.mark.usefixtures("few_digits")
def test_accumulated_batches_train_like_one_large_batch() -> None:
    data = DataConfig(dataset="digits", batch_size=8)
    sgd = {"optimizer": OptimizerConfig(lr=0.05), "epochs": 1, "average": None, "schedule": ScheduleConfig()}
    large = fit(config(data=replace(data, batch_size=32), **sgd), quiet=True).model.state_dict()
    small = fit(config(data=data, accumulation_steps=4, **sgd), quiet=True).model.state_dict()
    assert all(torch.allclose(large[key], small[key], atol=1e-5) for key in large)


@pytest.mark.usefixtures("few_digits")
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = loop._update, []

    def poison(learner: loop.Learner, *rest: Any) -> None:
        update(learner, *rest)
        calls.append(1)
        if len(calls) == 4:  # The first update of epoch 1.
            next(iter(learner.model.parameters())).data.fill_(float("nan"))

    monkeypatch.setattr(loop, "_update", poison)
    with pytest.raises(TrainingError, match=r"not finite at step 1 of epoch 1 \(step 4 of the run\).*keeps the last"):
        fit(config(tmp_path), quiet=True)
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert content["epoch"] == 0
    assert all(value.isfinite().all() for value in content["model"].values())


@pytest.mark.usefixtures("few_digits")
def test_a_folder_that_cannot_take_checkpoints_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot take checkpoints of \d+ MiB: Not a directory; training was not"):
        fit(config(tmp_path / "file" / "out"), quiet=True)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="No space left on device; training was not started"):
        fit(config(tmp_path / "out"), quiet=True)


def test_the_newest_complete_checkpoint_wins(tmp_path: Path) -> None:
    for epoch in range(4):
        save_checkpoint(tmp_path, {"epoch": epoch}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pth",
        "model_1.pth",
        "model_2.pth",
        "model_3.pth",
    ]
    assert find_checkpoint(str(tmp_path), None).path == str(tmp_path / "checkpoint.pth")
    truncate(tmp_path / "checkpoint.pth")
    assert find_checkpoint("auto", str(tmp_path)).path == str(tmp_path / "model_3.pth")
    truncate(tmp_path / "model_3.pth")
    found = find_checkpoint("auto", str(tmp_path))
    assert found.path == str(tmp_path / "model_2.pth")
    assert [notice.rpartition("/")[2] for notice in found.notices] == [
        "checkpoint.pth is truncated: passed over",
        "model_3.pth is truncated: passed over",
    ]
    write_checkpoint(tmp_path / "checkpoint.pth", {"epoch": 1})
    write_checkpoint(tmp_path / "model_2.pth", {"epoch": 2})  # Stopped before checkpoint.pth followed.
    assert find_checkpoint("auto", str(tmp_path)).path == str(tmp_path / "model_2.pth")


def test_checkpoints_of_an_earlier_run_in_the_folder_are_neither_taken_nor_lost(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"epoch": 9}, keep=None)
    os.utime(tmp_path / "model_9.pth", ns=(1, 1))
    for epoch in range(2):
        save_checkpoint(tmp_path, {"epoch": epoch}, keep=1)
    assert find_checkpoint("auto", str(tmp_path)).path == str(tmp_path / "checkpoint.pth")
    assert sorted(path.name for path in tmp_path.glob("model_*")) == ["model_1.pth", "model_9.pth"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_resuming_says_where_it_starts(tmp_path: Path) -> None:
    assert find_checkpoint(None, str(tmp_path)).path is None
    assert find_checkpoint("auto", str(tmp_path / "none")).notices == (
        f"no checkpoint in {tmp_path / 'none'} yet: starting from the beginning",
    )
    assert "starting from the beginning" in find_checkpoint(str(tmp_path), None).notices[0]
    assert find_checkpoint("hf://owner/name/file.pth", None).path == "hf://owner/name/file.pth"
    (tmp_path / "model_0.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is truncated .*model_0.pth"):
        find_checkpoint("auto", str(tmp_path))


@pytest.mark.usefixtures("few_digits")
def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    fit(config(tmp_path, epochs=1, schedule=ScheduleConfig()), quiet=True)
    path = str(tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"the optimizer in .* does not fit this run .*--weights-path"):
        fit(config(resume=path, optimizer=OptimizerConfig(norm_weight_decay=0.0)), quiet=True)
    content = read_checkpoint(path)
    content["config"]["num_classes"] = 7
    write_checkpoint(path, content)
    with pytest.raises(DataError, match="tells 7 classes apart, the data set digits has 10: take the data"):
        fit(config(resume=path), quiet=True)
    with pytest.raises(DataError, match="tells 7 classes apart"):
        assess(EvalConfig(weights_path=path, data=DataConfig(dataset="digits")), quiet=True)


@pytest.mark.usefixtures("few_digits")
def test_training_goes_on_from_weights_alone(tmp_path: Path) -> None:
    dense = fit(config(tmp_path, supermask=SupermaskConfig(), epochs=1, schedule=ScheduleConfig()), quiet=True)
    masked = fit(
        config(weights_path=str(tmp_path / "checkpoint.pth"), epochs=1, optimizer=OptimizerConfig(lr=0.0)), quiet=True
    )
    assert len(masked.history) == 1
    original = masked.model.state_dict()["encoder.layers.encoder_layer_0.mlp.0.parametrizations.weight.original"]
    assert torch.equal(original, dense.model.state_dict()["encoder.layers.encoder_layer_0.mlp.0.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"accumulation_steps": 0}, "accumulation steps must be at least 1"),
        ({"label_smoothing": 1.5}, "label smoothing must be at most 1"),
        ({"sparsity_ramp": -0.1}, "sparsity ramp must be at least 0, got -0.1"),
        ({"sparsity_ramp": 1.1}, "sparsity ramp must be at most 1, got 1.1"),
        ({"resume": "auto"}, "--resume auto needs --output-dir"),
        ({"tensorboard": True}, "--tensorboard needs --output-dir"),
    ],
)
def test_a_run_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(name="adam"), "name must be one of sgd, rmsprop, adamw, got 'adam'"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(lr=float("nan")), "lr must be at least 0, got nan"),
        (lambda: OptimizerConfig(clip_grad_norm=0), "clip grad norm must be above 0"),
        (lambda: ScheduleConfig(warmup_decay=0), "warmup decay must be above 0"),
        (lambda: AverageConfig(steps=0), "steps must be at least 1"),
        (lambda: DataConfig(batch_size=0), "batch size must be at least 1"),
        (lambda: DataConfig(random_erase=2), "random erase must be at most 1"),
        (lambda: DataConfig(dataset="cifar"), "dataset must be one of imagefolder, digits"),  # type: ignore[arg-type]
        (lambda: EvalConfig(bsr=16), "--bsr needs --sparsify-weights"),
        (lambda: EvalConfig(average=True), "--model-ema needs --weights-path"),
    ],
)
def test_a_part_that_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.usefixtures("few_digits")
def test_each_masked_weight_is_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    forward = Supermask.forward

    def counted(self: Supermask, weight: torch.Tensor) -> torch.Tensor:
        made.append(id(self)) if torch.is_grad_enabled() else None
        return forward(self, weight)

    monkeypatch.setattr(Supermask, "forward", counted)
    steps: list[int] = []
    monkeypatch.setattr(loop, "_update", lambda *_: steps.append(len(made)))
    fit(config(epochs=1, average=None), quiet=True)
    assert {after - before for before, after in pairwise(steps)} == {len(set(made))}

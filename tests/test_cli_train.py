"""The command train: the model card's line, what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from few_digits import few_digits  # noqa: F401 (a fixture)
from images import write_fashion

from superblock import SupermaskConfig, TileSparsity
from superblock.cli.evaluate import parser as evaluate_parser
from superblock.cli.main import run
from superblock.cli.train import parser, train_config
from superblock.errors import ConfigError
from superblock.files import read_checkpoint
from superblock.training import AverageConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from superblock.training.state import prepare_folder

ROOT = Path(__file__).parents[1]
DOCUMENTATION = ROOT / "docs" / "training.md"
ORIGINAL = Path(__file__).parent / "data" / "original" / "model_3.pth"
CARD = (
    "--model vit_b_16 --epochs 300 --batch-size 512 --opt adamw --lr 0.003 --wd 0.3 --lr-scheduler cosineannealinglr "
    "--lr-warmup-method linear --lr-warmup-epochs 30 --lr-warmup-decay 0.033 --amp --label-smoothing 0.11 "
    "--mixup-alpha 0.2 --auto-augment ra --clip-grad-norm 1 --ra-sampler --cutmix-alpha 1.0 --model-ema "
    "--sparsity-linear 0.9 --sp-linear-tile-size 32"
)
DIGITS = "--model vit_digits --dataset digits --device cpu --batch-size 16"


def train(arguments: str, *rest: object) -> int:
    return run("train", [*shlex.split(arguments), *map(str, rest)])


def test_the_model_cards_line_means_its_recipe() -> None:
    args = parser().parse_args([*shlex.split(CARD), "--device", "cpu"])
    assert train_config(args) == TrainConfig(
        model="vit_b_16",
        supermask=SupermaskConfig(linear=TileSparsity(0.9, 32)),
        data=DataConfig(batch_size=512, auto_augment="ra", mixup_alpha=0.2, cutmix_alpha=1.0, ra_sampler=True),
        optimizer=OptimizerConfig("adamw", 0.003, weight_decay=0.3, clip_grad_norm=1.0),
        schedule=ScheduleConfig("cosineannealinglr", warmup_epochs=30, warmup_method="linear", warmup_decay=0.033),
        average=AverageConfig(32, 0.99998),
        epochs=300,
        amp=True,
        label_smoothing=0.11,
        output_dir=".",
    )


def test_every_other_flag_reaches_the_configuration(tmp_path: Path) -> None:
    line = (
        "--data-path d --dataset fake --workers 3 --cache-dataset --interpolation bicubic --val-resize-size 232 "
        "--val-crop-size 200 --train-crop-size 176 --auto-augment augmix --ra-magnitude 7 --augmix-severity 4 "
        "--random-erase 0.1 --ra-reps 4 --opt rmsprop --momentum 0.8 --norm-weight-decay 0 --bias-weight-decay 0.1 "
        "--transformer-embedding-decay 0.2 --score-lr 0.5 --accumulation-steps 2 --lr-scheduler exponentiallr "
        "--lr-step-size 2 --lr-gamma 0.9 --lr-min 0.001 --start-epoch 3 --sync-bn --print-freq 5 --seed 9 --threads 2 "
        "--world-size 2 --dist-url tcp://host:1 --use-deterministic-algorithms --keep-checkpoints 2 --tensorboard "
        "--model-ema --model-ema-steps 4 --model-ema-decay 0.9 --resume --weights-path w --device cpu"
    )
    config = train_config(parser().parse_args([*shlex.split(line), "--output-dir", str(tmp_path)]))
    assert config == TrainConfig(
        weights_path="w",
        data=DataConfig(
            dataset="fake",
            path="d",
            workers=3,
            cache=True,
            interpolation="bicubic",
            val_resize_size=232,
            val_crop_size=200,
            train_crop_size=176,
            auto_augment="augmix",
            ra_magnitude=7,
            augmix_severity=4,
            random_erase=0.1,
            ra_reps=4,
        ),
        optimizer=OptimizerConfig("rmsprop", 0.1, 0.8, 1e-4, 0.0, 0.1, 0.2, 0.5),
        schedule=ScheduleConfig("exponentiallr", 2, 0.9, 0.001),
        average=AverageConfig(4, 0.9),
        start_epoch=3,
        accumulation_steps=2,
        sync_bn=True,
        output_dir=str(tmp_path),
        resume="auto",
        keep_checkpoints=2,
        tensorboard=True,
        print_freq=5,
        seed=9,
        threads=2,
        deterministic=True,
        world_size=2,
        dist_url="tcp://host:1",
    )


def test_every_line_of_the_documentation_can_be_meant() -> None:
    lines = re.findall(r"^(?:torchrun|python) .*?(train|evaluate)\.py(.*)$", DOCUMENTATION.read_text(), re.MULTILINE)
    assert len(lines) > 15
    for command, arguments in lines:
        if command == "train":
            train_config(parser().parse_args([*shlex.split(arguments), "--device", "cpu"]))
        else:
            evaluate_parser().parse_args(shlex.split(arguments))


@pytest.mark.usefixtures("few_digits")
def test_the_documented_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    exec(example, {})
    assert (tmp_path / "digits" / "checkpoint.pth").exists()


@pytest.mark.usefixtures("few_digits")
def test_the_cards_recipe_runs_on_digits_and_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"{CARD} {DIGITS} --epochs 2 --sp-linear-tile-size 16 --model-ema-steps 1 --print-freq 2"
    assert train(recipe, "--output-dir", tmp_path) == 0
    out = capsys.readouterr().out
    assert "sparsity of the 17 masked weights" in out
    assert "Epoch: [1] [3/3]" in out
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pth",
        "metrics.jsonl",
        "model_0.pth",
        "model_1.pth",
    }
    folded = "--test-only --sparsify-weights --bsr 16 --model-ema"
    assert train(f"{DIGITS} {folded}", "--resume", tmp_path) == 0
    tested = capsys.readouterr().out
    assert "Test: EMA Total time: 0:00:" in tested
    after_training = [line for line in out.splitlines() if line.startswith("Test: EMA Acc@1")][-1]
    assert after_training in tested


@pytest.mark.usefixtures("few_digits")
def test_an_original_checkpoint_goes_on_with_its_masks_average_and_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "vit:image_size=32,patch_size=8,num_layers=3,num_heads=4,hidden_dim=64,mlp_dim=128"
    line = (
        f"--model {model} --dataset digits --device cpu --batch-size 16 --opt adamw --lr 0.001 --epochs 6 --model-ema"
    )
    assert train(line, "--resume", ORIGINAL, "--output-dir", tmp_path) == 0
    out = capsys.readouterr().out
    assert "that the original never applied" in out
    assert "the optimizer's state of" in out or "optimizer starts anew" in out
    assert "with epoch 4" in out
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert [record["epoch"] for record in content["metrics"]] == [4, 5]
    assert content["config"]["supermask"]["rule"] == "original"
    assert [group["initial_lr"] for group in content["optimizer"]["param_groups"]] == [0.001, 0.1]  # Weights, scores.
    assert content["model_ema"] is not None
    before = read_checkpoint(ORIGINAL)
    assert content["model_ema"]["n_averaged"] == before["model_ema"]["n_averaged"] + 2
    assert train(line, "--resume", tmp_path, "--output-dir", "") == 0
    assert "with epoch 6" in capsys.readouterr().out


def test_a_run_killed_in_the_middle_goes_on_to_the_same_end(tmp_path: Path) -> None:
    data = write_fashion(tmp_path / "data", train=40, val=4)
    common = f"--model vit_fashion --dataset fashion-mnist --data-path {data} --device cpu --batch-size 8 --epochs 3"
    command = [*shlex.split(common), "--threads", "1", "--print-freq", "1", "--resume"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command, "--output-dir", str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Epoch: [1] [2/5]"):
            process.kill()
            break
    process.wait()
    assert process.returncode == -9
    assert read_checkpoint(tmp_path / "killed" / "checkpoint.pth")["epoch"] == 0
    half_written = tmp_path / "killed" / ".checkpoint.pth.abc.tmp"
    half_written.write_bytes(b"PK")
    for folder in ("killed", "whole"):
        assert run("train", [*command, "--output-dir", str(tmp_path / folder)]) == 0
    assert not half_written.exists()
    killed, whole = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("killed", "whole"))
    assert all(torch.equal(value, killed["model"][key]) for key, value in whole["model"].items())
    for name in ("killed", "whole"):
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from superblock.training import state

    state.save_checkpoint(tmp_path, {"epoch": 0, "model": {}}, None)

    class KillError(BaseException):
        """Nothing after it runs."""

    def half(content: Any, path: Path) -> None:
        path.write_bytes(b"PK half")
        raise KillError

    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KillError):
        state.save_checkpoint(tmp_path, {"epoch": 1, "model": {}}, None)
    monkeypatch.undo()
    assert len(list(tmp_path.glob(".model_1.pth.*.tmp"))) == 1
    assert state.find_checkpoint(str(tmp_path), None).path == str(tmp_path / "checkpoint.pth")
    prepare_folder(tmp_path, 100)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sparsity-linear 1.0", "sparsity must be in [0, 1), got 1.0"),
        ("--sparsity-linear 0.5 --sp-linear-tile-size 0", "tile size must be a whole number of at least 1, got 0"),
        ("--bsr 16", "--bsr needs --sparsify-weights"),
        (
            "--sparsify-weights",
            "--sparsify-weights, --bsr, --bfloat16 and --float16 are for evaluation: add --test-only",
        ),
        ("--model vit_digit", "unknown model 'vit_digit' (did you mean vit_digits"),
        ("--dataset imagefolder --data-path nowhere", "no folder nowhere/train: --data-path must hold train/ and val/"),
        ("--weights-path nowhere.pth", "no checkpoint at nowhere.pth"),
        ("--resume nowhere.pth", "no checkpoint at nowhere.pth"),
        ("--weights V1 --weights-path model.pth", "no checkpoint at model.pth"),
        ("--weights V1", "there are no published weights of vit_digits"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--world-size 2", "--world-size 2, but this process was started alone"),
        ("--device tpu9", "unknown device 'tpu9'"),
        ("--train-crop-size 9 --val-crop-size 9", "vit_digits cannot be built for images of 9×9"),
    ],
)
@pytest.mark.usefixtures("few_digits")
def test_what_cannot_be_meant_is_one_line_and_writes_nothing(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(f"{DIGITS} {arguments}") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"train: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("superblock.cli.train.fit", interrupt)
    assert train(DIGITS) == 130
    assert capsys.readouterr().err == (
        "train: interrupted: the same line with --resume goes on from the last checkpoint\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_asked_for_and_absent_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--dataset digits") == 2
    assert capsys.readouterr().err.startswith(
        "train: --device cuda (the default) needs a CUDA GPU, and torch sees none"
    )


def test_synchronized_batch_normalization_needs_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from superblock.training.distributed import World
    from superblock.training.fit import _Run
    from superblock.training.log import Log

    with pytest.raises(ConfigError, match="--sync-bn needs GPUs, the device is cpu: leave it out"):
        _Run(TrainConfig(sync_bn=True), World(torch.device("cpu"), 0, 2), Log(quiet=True))

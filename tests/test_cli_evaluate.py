"""The command evaluate: the model card's lines, what they print, and what is refused."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from few_digits import few_digits  # noqa: F401 (a fixture)
from images import write_images

from superblock import SupermaskConfig, TileSparsity, apply_supermask, models, save, sparsify_weights, to_bsr
from superblock.cli.evaluate import parser
from superblock.cli.main import run
from superblock.cli.running import data_options, eval_config
from superblock.training import DataConfig, EvalConfig, evaluate, setup

CARD = (
    "--model vit_b_16 --batch-size 256 --sparsity-linear 0.9 --sp-linear-tile-size 32 --weights-path checkpoint.pth "
    "--data-path imagenet"
)


def evaluated(capsys: pytest.CaptureFixture[str], arguments: str, *rest: object) -> str:
    status = run("evaluate", [*shlex.split(arguments), *map(str, rest)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


@pytest.mark.parametrize("conversion", ["", " --sparsify-weights --bsr 32"])
def test_the_model_cards_lines_mean_what_they_say(conversion: str) -> None:
    args = parser().parse_args(shlex.split(f"{CARD} --device cpu{conversion}"))
    assert eval_config(args, DataConfig(**data_options(args))) == EvalConfig(
        model="vit_b_16",
        weights_path="checkpoint.pth",
        supermask=SupermaskConfig(linear=TileSparsity(0.9, 32)),
        data=DataConfig(path="imagenet", batch_size=256),
        sparsify_weights=bool(conversion),
        bsr=32 if conversion else None,
    )


def test_a_folder_of_two_classes_is_evaluated_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, "val", count=2)
    model = models.build("vit_fashion", num_classes=2)
    apply_supermask(model, SupermaskConfig(linear=TileSparsity(0.5, 16)))
    torch.nn.init.normal_(model.heads.head.parametrizations.weight.original)  # type: ignore[union-attr]
    path = tmp_path / "checkpoint.pth"
    said = {
        "architecture": "vit_fashion",
        "num_classes": 2,
        "image_size": 28,
        "supermask": SupermaskConfig(linear=TileSparsity(0.5, 16)).to_dict(),
    }
    torch.save({"format": "superblock", "version": 1, "model": model.state_dict(), "config": said}, path)
    common = f"--device cpu --workers 0 --data-path {tmp_path} --weights-path {path}"
    forms = ("", "--sparsify-weights", "--sparsify-weights --bsr", "--sparsify-weights --bsr 16 --val-crop-size 28")
    outs = [evaluated(capsys, f"{common} {form}") for form in forms]
    lines = [[line for line in out.splitlines() if "Acc@1" in line] for out in outs]
    assert re.fullmatch(r"Test:  Acc@1 \d+\.\d{3} Acc@5 100\.000", lines[0][0])
    assert re.search(r"^Test:  Total time: 0:00:\d\d$", outs[0], re.MULTILINE)
    assert lines[0] == lines[1] == lines[2]
    assert all("over 4 images" in out for out in outs)
    assert "sparsity of the 17" in outs[2]
    sparsify_weights(model)
    to_bsr(model)
    described = {name: said[name] for name in ("architecture", "num_classes", "image_size", "supermask")}
    save(model, tmp_path / "deployable.safetensors", **described)
    deployed = evaluated(capsys, common, "--weights-path", tmp_path / "deployable.safetensors")
    assert lines[0][0] in deployed


def test_images_are_cut_as_pretrained_weights_were_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.models, "build", lambda *_, **options: models.zoo.efficientnet_b1())
    run_config = EvalConfig(model="efficientnet_b1", weights="IMAGENET1K_V1", data=DataConfig(dataset="fake"))
    assert setup.prepare(run_config, None, training=False).data.image_size == 240
    sized = replace(run_config, data=DataConfig(dataset="fake", val_crop_size=64))
    assert setup.prepare(sized, None, training=False).data.image_size == 64


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("arithmetic", ["--bfloat16", "--amp", "--label-smoothing 0.1"])
def test_other_arithmetic_is_taken(arithmetic: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = evaluated(
        capsys,
        "--model vit_digits --dataset digits --device cpu --epochs 3 --model-ema-steps 2 --model-ema-decay 0.9 "
        f"--sync-bn --print-freq 1 --use-deterministic-algorithms --threads 1 {arithmetic}",
    )
    torch.use_deterministic_algorithms(False)
    assert "over 20 images" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bsr 32", "--bsr needs --sparsify-weights"),
        ("--sparsify-weights", "--sparsify-weights has no masks to fold"),
        (
            "--sparsity-linear 0.5 --sp-linear-tile-size 24 --sparsify-weights --bsr 16",
            "block 16 and tile 24 must divide one another",
        ),
        ("--bfloat16 --float16", "--bfloat16 and --float16 exclude each other"),
        ("--weights-path missing.pth", "no checkpoint at missing.pth"),
        ("--dataset fashion-mnist --data-path nowhere", "no nowhere/train-images-idx3-ubyte.gz"),
        ("--threads 100000", "--threads must be at most"),
        ("--model-ema", "--model-ema needs --weights-path"),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"--model vit_digits --dataset digits --device cpu {arguments}"
    assert run("evaluate", shlex.split(line)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"evaluate: {message}")
    assert err.count("\n") == 1


def test_evaluation_leaves_the_model_in_the_mode_it_was() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(12, 3))
    model[1].eval()
    images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=2)
    found = evaluate(model, loader)
    assert [module.training for module in model] == [True, False, True]
    logits = torch.nn.functional.linear(images.flatten(1), model[2].weight, model[2].bias)
    assert found.images == 5
    assert found.acc1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert found.acc5 == 100
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)

"""``superblock benchmark`` verifies, times, and says what it measured; what cannot be meant is one line."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import digits_checkpoint, refused, run

from superblock import BSRLinear
from superblock.benchmarking import Timing
from superblock.cli import benchmark

QUICK = ("benchmark", "--model", "vit_digits", "--device", "cpu", "-b", "2", "--warmup", "0", "--iters", "2")
SPARSE = (*QUICK, "--sparsity-linear", "0.8", "--sp-linear-tile-size", "16")


def test_the_result_alone_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *QUICK)
    assert status == 0
    assert re.fullmatch(r"\d+\.\d{3} ms\n", err)
    assert "vit_digits, batch 2, 8 × 8, torch.float32, cpu" in out


@pytest.mark.parametrize("flags", ["", "--sparsify-weights", "--sparsify-weights --bsr", "--sparsify-weights --bsr 8"])
def test_a_sparse_model_reports_both_sparsities_and_that_its_forms_agree(
    capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    status, out, err = run(capsys, *SPARSE, *flags.split())
    assert status == 0, err
    assert re.search(r"sparsity of the 17 masked weights \d+\.\d+%, of the whole model \d+\.\d+%", out)
    assert ("largest difference to masked: folded" in out) == bool(flags)
    assert (", bsr " in out) == ("--bsr" in flags)


@pytest.mark.parametrize("flag", ["--bfloat16", "--float16"])
def test_half_precision_is_verified_by_its_own_tolerance(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    status, out, err = run(capsys, *SPARSE, "--sparsify-weights", "--bsr", flag)
    assert status == 0, err
    assert f"torch.{flag.removeprefix('--')}" in out


def test_comparisons_are_timed_in_the_same_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    path = tmp_path / "result.json"
    status, out, err = run(
        capsys, *SPARSE, "--sparsify-weights", "--bsr", "--compare", "dense,compiled", "--compile", "--json", path
    )
    assert status == 0, err
    assert len(compiled) == 2
    assert any(isinstance(module, BSRLinear) for module in compiled[0].modules())
    assert not any(isinstance(module, BSRLinear) for module in compiled[1].modules())
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert lines["model"].endswith("1.00×")
    assert {"dense", "compiled"} <= lines.keys()
    result = json.loads(path.read_text())
    assert {name: len(timing["samples_ms"]) for name, timing in result["timings"].items()} == {
        "model": 2, "dense": 2, "compiled": 2
    }  # fmt: skip
    assert result["flags"]["sparsity_linear"] == 0.8
    assert result["machine"]["torch"] == torch.__version__
    assert 0 <= result["verification"]["largest_difference"] < 1e-4
    assert 0.7 < result["report"]["model_sparsity"] < result["report"]["masked_sparsity"] < 0.85
    assert f"{result['timings']['model']['median_ms']:.3f} ms\n" == err


def test_convolutional_models_run_in_channels_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bool] = {}

    def look(calls: dict[str, Any], *_: object, **__: object) -> dict[str, Timing]:
        for name, call in calls.items():
            images, model = inspect.getclosurevars(call).nonlocals["images"], call.__defaults__[0]
            seen[name] = all(
                tensor.is_contiguous(memory_format=torch.channels_last)
                for tensor in (images, *(kernel for kernel in model.parameters() if kernel.dim() == 4))
            )
        return {name: Timing((1.0,)) for name in calls}

    monkeypatch.setattr(benchmark, "measure", look)
    arguments = ("benchmark", "--device", "cpu", "-b", "2", "--val-crop-size", "32", "--compare", "dense")
    sparse = ("--sparsity-conv1x1", "0.5", "--sp-conv1x1-tile-size", "16", "--sparsify-weights", "--bsr")
    status, out, err = run(capsys, *arguments, "--model", "resnet18", *sparse)
    assert status == 0, err
    assert "resnet18, batch 2, 32 × 32, torch.float32, cpu, channels-last" in out
    assert seen == {"model": True, "dense": True}


def test_nothing_is_timed_when_the_forms_disagree(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BSRLinear, "forward", lambda self, x: self.project(x) + 1)
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: pytest.fail("timed"))
    path = tmp_path / "result.json"
    line = refused(capsys, *SPARSE, "--sparsify-weights", "--bsr", "--json", path)
    assert re.search(r"the forms do not agree, so nothing was timed: .* bsr \d\.\d\de[+-]\d\d \(tolerance 1e-04", line)
    assert not path.exists()


def test_a_checkpoint_says_which_model_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = digits_checkpoint(tmp_path / "model.pth")
    quick = ("benchmark", "--device", "cpu", "-b", "2", "--iters", "1", "--warmup", "0", "--weights-path")
    status, out, err = run(capsys, *quick, path, "--sparsify-weights", "--bsr")
    assert status == 0, err
    assert "vit_digits, batch 2, 8 × 8" in out
    assert run(capsys, "convert", path, "-o", tmp_path / "model.safetensors")[0] == 0
    status, out, err = run(capsys, *quick, tmp_path / "model.safetensors", "--sparsify-weights", "--bsr", "16")
    assert status == 0, err
    assert "form: bsr" in out


def test_images_have_the_side_that_the_model_is_built_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("benchmark", "--model", "timm:test_vit", "--device", "cpu", "-b", "1", "--iters", "1", "--warmup", "0")
    assert "timm:test_vit, batch 1, 160 × 160" in run(capsys, *arguments)[1]
    assert "timm:test_vit, batch 1, 64 × 64" in run(capsys, *arguments, "--val-crop-size", "64")[1]


def test_threads_and_seed_are_heeded(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *QUICK, "--threads", "1", "--seed", "7")[0] == 0
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sparsity-linear", "1.5"), r"sparsity must be in \[0, 1\), got 1\.5"),
        (("--sparsity-linear", "-0.1"), r"sparsity must be in \[0, 1\), got -0\.1"),
        (("--sparsity-linear", "0.8", "--sp-linear-tile-size", "0"), "tile size must be .* at least 1, got 0"),
        (("--sparsity-linear", "0.8", "--bsr", "16"), "--bsr needs --sparsify-weights"),
        (("--sparsity-linear", "0.8", "--sparsify-weights", "--bsr", "24"), "block 24 and tile 32 must divide"),
        (("--sparsify-weights",), "--sparsify-weights has no masks to fold: give --sparsity-linear"),
        (("--model", "vit_b_17"), r"unknown model 'vit_b_17' \(did you mean vit_b_16"),
        (("--device", "tpu9"), "unknown device 'tpu9': expected cpu, cuda"),
        (("--weights-path", "missing.pth"), "no checkpoint at missing.pth"),
        (("--weights-path", "checkpoints/superblock-vit-b-16-sp0.80-ts32.pth"), "superblock download sp0.80-ts32"),
        (("--weights", "NONE_SUCH"), "NONE_SUCH"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--iters", "0"), "--iters must be at least 1, got 0"),
        (("--warmup", "-1"), "--warmup must be at least 0, got -1"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--threads", "100000"), r"--threads must be at most \d+, the cores of this machine, got 100000"),
        (("--bfloat16", "--float16"), "--bfloat16 and --float16 exclude each other"),
        (("--sp-include", "nothing.*", "--sparsity-linear", "0.5"), r"pattern 'nothing\.\*' matches no layer"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(capsys, *QUICK, "--json", "result.json", *flags))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_is_the_default_and_its_absence_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    told = "needs a CUDA GPU, and torch sees none here: use --device cpu"
    assert f"--device cuda (the default) {told}" in refused(capsys, "benchmark", "--model", "vit_digits")
    assert f"--device cuda:0 {told}" in refused(capsys, "benchmark", "--model", "vit_digits", "--device", "cuda:0")


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: pytest.fail("timed"))
    (tmp_path / "file").touch()
    assert "it is a folder, give the name of a file" in refused(capsys, *QUICK, "--json", tmp_path)
    assert "file is not a folder" in refused(capsys, *QUICK, "--json", tmp_path / "file" / "result.json")


def test_an_unknown_comparison_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *QUICK, "--compare", "dense,sparse")
    assert status == 2
    assert "expected some of dense,compiled, got 'dense,sparse'" in err

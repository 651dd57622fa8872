"""``superblock convert`` writes models that every command and ``load`` take, near density times the dense size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import CONFIG, ORIGINAL, ORIGINAL_MODEL, digits_checkpoint, refused, run
from safetensors import safe_open

from superblock import apply_supermask, load, models
from superblock.weights import load_weights


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return digits_checkpoint(tmp_path / "model_3.pth", ema=True)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8)


@pytest.mark.parametrize("bsr", [None, "8", "32"])
def test_a_converted_checkpoint_gives_the_same_logits(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, images: torch.Tensor, bsr: str | None
) -> None:
    target = checkpoint.with_suffix(".safetensors")
    status, out, err = run(capsys, "convert", checkpoint, "-o", target, *([] if bsr is None else ["--bsr", bsr]))
    assert status == 0, err
    assert "sparsity of the 17 masked weights" in out
    masked = models.build("vit_digits").eval()
    load_weights(masked, checkpoint)
    with torch.inference_mode():
        torch.testing.assert_close(load(target).eval()(images), masked(images), rtol=0, atol=1e-5)
    again = models.build("vit_digits")
    loaded = load_weights(again, target, CONFIG)
    assert (loaded.form, loaded.supermask) == ("bsr", CONFIG)


def test_the_masked_layers_take_density_times_the_dense_size(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    target = checkpoint.with_suffix(".safetensors")
    _, out, _ = run(capsys, "convert", checkpoint, "-o", target)
    stored, dense, share, density = map(
        float,
        re.search(r"weights: ([\d.]+) MB of ([\d.]+) MB dense \(([\d.]+)%, .* at density ([\d.]+)%", out).groups(),  # type: ignore[union-attr]
    )
    assert stored / dense == pytest.approx(share / 100, abs=2e-3)
    assert density == pytest.approx(10.0, abs=0.3)
    assert share == pytest.approx(density, abs=0.5)
    with safe_open(str(target), "pt") as file:
        weights = sum(file.get_tensor(key).nbytes for key in file.keys() if key.endswith(".values"))  # noqa: SIM118
    assert weights < 0.11 * dense * 1e6


def test_the_averaged_model_is_converted_on_request(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, images: torch.Tensor
) -> None:
    for name, flags in (("plain", []), ("averaged", ["--model-ema"])):
        run(capsys, "convert", checkpoint, "-o", checkpoint.with_name(f"{name}.safetensors"), *flags)
    plain, averaged = (
        load(checkpoint.with_name(f"{name}.safetensors")).get_parameter("heads.head.bias")
        for name in ("plain", "averaged")
    )
    torch.testing.assert_close(averaged, plain + 1)


def test_an_original_checkpoint_is_converted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    case = torch.load(ORIGINAL / "cases.pt", weights_only=True)["vit"][0]
    target = tmp_path / "model.safetensors"
    status, out, err = run(capsys, "convert", ORIGINAL / "model_3.pth", "--model", ORIGINAL_MODEL, "-o", target)
    assert status == 0, err
    assert "attention projections carry scores that the original never applied" in out
    model = load(target).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(case["x"]), case["logits_offline"], rtol=0, atol=1e-5)
    status, out, err = run(capsys, "benchmark", "--weights-path", target, "--device", "cpu", "-b", "2", "--iters", "1")
    assert status == 0, err
    assert f"{ORIGINAL_MODEL}, batch 2, 32 × 32" in out


def test_a_model_of_another_image_size_is_built_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = models.build("timm:test_vit", num_classes=3, image_size=32).eval()
    apply_supermask(model, CONFIG)
    described = {"architecture": "timm:test_vit", "num_classes": 3, "image_size": 32, "supermask": CONFIG.to_dict()}
    content = {"format": "superblock", "version": 1, "model": model.state_dict(), "epoch": 0, "config": described}
    torch.save(content, tmp_path / "model.pth")
    target = tmp_path / "model.safetensors"
    status, _, err = run(capsys, "convert", tmp_path / "model.pth", "-o", target)
    assert status == 0, err
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(load(target).eval()(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.pth", "-o", "out.safetensors"), "no checkpoint at missing.pth"),
        (("model_3.pth", "-o", "out.pth"), r"--output must name a \.safetensors file, got out\.pth"),
        (("model_3.pth", "-o", "out.safetensors", "--bsr", "24"), "block 24 and tile 16 .* must divide one another"),
        (("model_3.pth", "-o", "out.safetensors", "--model", "vit_digit"), "unknown model 'vit_digit'"),
        (("model_3.pth", "-o", "out.safetensors", "--model", ORIGINAL_MODEL), r"another model .*of another shape \("),
        (("model_3.pth", "-o", "out.safetensors", "--sparsity-linear", "0.5"), "the flags give linear layers sparsity"),
        (("model_3.pth", "-o", "model_3.pth/out.safetensors"), "is not a folder"),
        (("dense.pth", "-o", "out.safetensors"), r"dense\.pth does not name its architecture: give --model"),
        (("dense.pth", "-o", "out.safetensors", "--model", "vit_digits"), r"dense\.pth has no masks to convert"),
        (("dense.pth", "-o", "out.safetensors", "--model", "vit_digits", "--model-ema"), "no averaged weights"),
        (("model_3.pth", "-o", "out.safetensors", "--model", "vit:num_layers=3"), "expected vit:image_size=<n>,patch"),
        (("cut.pth", "-o", "out.safetensors"), r"cut\.pth is truncated or not a checkpoint"),
        (("users.txt", "-o", "out.safetensors"), r"users\.txt is truncated or not a checkpoint"),
        (
            (".", "-o", "out.safetensors"),
            r"no checkpoint at \.: it is a folder, give a \.pth or \.safetensors file in it",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    torch.save(models.build("vit_digits").state_dict(), "dense.pth")
    Path("users.txt").write_text("root:x:0:0:root:/root:/bin/bash\n")
    Path("cut.pth").write_bytes(checkpoint.read_bytes()[:9999])
    before = sorted(path.name for path in Path().iterdir())
    assert re.search(message, refused(capsys, "convert", *arguments))
    assert sorted(path.name for path in Path().iterdir()) == before

"""The demo does all it says, on one epoch and a small model for the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="needs the vision extra")

from superblock import load
from superblock.cli.main import main
from superblock.demo import Row, table

SMALL = "vit:image_size=16,patch_size=8,num_layers=1,num_heads=2,hidden_dim=64,mlp_dim=128"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    options = ["--epochs", "1", "--threads", "1", "--benchmark-model", SMALL, "--benchmark-batch-size", "2"]
    assert main(["demo", "--output-dir", str(folder), *options]) == 0
    return folder


def test_the_table_has_every_form_of_every_model(folder: Path) -> None:
    content = json.loads((folder / "demo.json").read_text())
    assert [(row["model"], row["form"]) for row in content["rows"]] == [
        ("dense", "dense"),
        *((model, form) for model in ("80 %", "90 %") for form in ("masked", "folded", "bsr")),
    ]
    assert all(difference <= 1e-4 for difference in content["largest_difference_between_forms"].values())
    by_key = {(row["model"], row["form"]): row for row in content["rows"]}
    for model, target in (("80 %", 0.8), ("90 %", 0.9)):
        forms = [by_key[model, form] for form in ("masked", "folded", "bsr")]
        assert len({round(row["accuracy"], 6) for row in forms}) == 1
        assert all(abs(row["masked_sparsity"] - target) < 0.01 for row in forms)
        assert forms[2]["file_bytes"] < 0.35 * by_key["dense", "dense"]["file_bytes"]
    markdown = (folder / "demo.md").read_text()
    assert markdown.count("| bsr") == 2
    assert "× as fast" in markdown


def test_pictures_checkpoints_and_models_are_there(folder: Path) -> None:
    pictures = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert {"pictures/accuracy.png", "pictures/latency.png"} <= pictures
    assert sum(path.startswith("pictures/masks-90/") for path in pictures) == 16
    assert (folder / "checkpoints" / "90" / "checkpoint.pth").is_file()
    assert load(folder / "models" / "90-bsr.safetensors") is not None


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [("epochs", "0", "least 1,"), ("threads", "0", "least 1,"), ("threads", "99999", "most")],
)
def test_bad_options_write_nothing(
    option: str, value: str, bound: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--output-dir", str(tmp_path / "demo"), f"--{option}", value]) == 2
    assert capsys.readouterr().err.startswith(f"demo: --{option} must be at {bound} ")
    assert not (tmp_path / "demo").exists()


def test_the_table_is_markdown() -> None:
    row = Row("90 %", "bsr", 97.5, 0.9, 0.85, 420_000, 12.5, 2.0)
    title, rule, line, _, note = table([row])
    assert title.startswith("| model | form | accuracy |")
    assert set(rule) <= set("|- ")
    assert "97.50 %" in line
    assert "2.00×" in line
    assert len(title) == len(rule) == len(line)
    assert "training checkpoint" in note

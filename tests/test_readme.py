"""The README's example runs as it stands, and its signatures are the package's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import superblock

pytest.importorskip("torchvision", reason="needs the vision extra")

from superblock.demo import Row, table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("name", superblock.__all__)
def test_every_public_name_is_in_the_readme(name: str) -> None:
    assert re.search(rf"`[^`]*\b{name}\b", README), f"{name} is public but not in the README"


def test_the_results_are_those_of_the_committed_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    for line in table([Row(**row) for row in record["demo"]["rows"]]):
        assert line in README
    dense, sparse = (record["vit_b_16"]["timings"][name]["median_ms"] for name in ("dense", "model"))
    assert f"takes {sparse:.0f} ms,\ndense {dense:.0f} ms in torch: {dense / sparse:.2f}× as fast" in README


def test_the_network_results_are_those_of_the_committed_records() -> None:
    for dtype, name in (("float32", "networks-vit"), ("bfloat16", "networks-vit-bfloat16")):
        record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for batch in (16, 1):
            cells = [
                f"{row['speedup']:.2f}×"
                for sparsity in (0.8, 0.9)
                for row in record["rows"]
                if (row["batch"], row["sparsity"], row["tile"]) == (batch, sparsity, 64)
            ]
            label = f"{dtype}, batch {batch}"
            line = f"| {label:<22} | {cells[0]:<5} | {cells[1]:<5} |"
            assert line in README, line


def test_the_gpu_results_are_those_of_the_committed_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["rows"]}
    assert f"On an {record['machine']['device']}," in README
    shown = {
        "4096 × 4096, 65536 tokens": ("4096, 64k 4096×4096, 65536 tokens, block 64", "speedup"),
        "4096 × 4096, forward and backward": ("forward + backward 4096×4096, 16384 tokens, block 64", "speedup"),
        "ViT-B/16, batch 256": ("ViT-B/16, batch 256, torch.bfloat16", None),
        "ViT-H/14, batch 256": ("ViT-H/14, batch 256, torch.bfloat16", None),
        "ViT-B/16, batch 256, float32, no TF32": ("ViT-B/16, batch 256, torch.float32", None),
    }
    for label, (name, key) in shown.items():
        cells = []
        for sparsity in ("80%", "90%"):
            found = rows[f"{name}, {sparsity}"][key] if key else rows[name].get(f"speedup {sparsity}/64")
            cells.append(f"{found:.2f}×" if found else "")
        line = f"| {label:<37} | {cells[0]:<5} | {cells[1]:<5} |"
        assert line in README, line

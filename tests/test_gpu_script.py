"""``benchmarks/gpu.py``: the whole script on tiny operands, interpreted, and what it says where no GPU is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton")
pytest.importorskip("torchvision")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_products_need_no_file_format() -> None:
    """The script runs from a bare checkout, with no package but torch, torchvision and Triton."""
    others = ("safetensors", "timm", "huggingface_hub", "rich", "torchmetrics", "matplotlib", "sklearn", "pytest")
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import superblock, gpu_checks, gpu_stages"
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests", "benchmarks"))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_checks_measures_and_writes(tmp_path: Path) -> None:
    done = run("--dry-run", "--output", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    stages = {row["stage"] for row in written["rows"]}
    assert stages == {"check", "peak", "product", "training", "decoding", "transformer", "mask"}
    assert "## transformer" in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.strip() == "benchmarks/gpu.py: torch sees no CUDA GPU here; --dry-run tests the script itself"

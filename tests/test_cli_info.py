"""``superblock info`` names every backend, and says why one is not active."""

from __future__ import annotations

import pytest
import torch
from commands import run

from superblock.ops import native, status
from superblock.ops.status import BackendStatus, describe


def test_every_backend_is_named_with_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert f"torch {torch.__version__}" in out
    assert torch.backends.cpu.get_cpu_capability() in out
    states = {line.split()[0]: line for line in out.splitlines() if line.startswith(("cuda", "cpu", "reference"))}
    assert list(states) == ["cuda", "cpu", "reference"]
    assert all(" active " in line for line in states.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_reason_is_said() -> None:
    (cuda,) = (found for found in describe() if found.name == "cuda")
    assert not cuda.active
    assert cuda.detail in ("torch sees no CUDA GPU here",) or "built without CUDA" in cuda.detail


def test_with_a_gpu_triton_is_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(status, "version", lambda package: "3.0")
    monkeypatch.setattr(status, "find_spec", lambda name: object())
    cuda = status.describe()[0]
    assert (cuda.name, cuda.active) == ("cuda", True)
    assert cuda.detail.startswith("Triton 3.0, float16")
    monkeypatch.setattr(status, "find_spec", lambda name: None)
    assert status.describe()[0] == BackendStatus("cuda", False, "Triton is missing: pip install triton")


def test_a_missing_native_core_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "the native CPU core is not built: install a C compiler")
    (cpu,) = (found for found in describe() if found.name == "cpu")
    assert not cpu.active
    assert cpu.detail == "the native CPU core is not built: install a C compiler"

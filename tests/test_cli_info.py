"""``superblock info`` names every backend, and says why one is not active."""

from __future__ import annotations

import pytest
import torch
from commands import run

from superblock.ops import native
from superblock.ops.status import describe


def test_every_backend_is_named_with_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert f"torch {torch.__version__}" in out
    assert torch.backends.cpu.get_cpu_capability() in out
    states = {line.split()[0]: line for line in out.splitlines() if line.startswith(("cuda", "cpu", "reference"))}
    assert list(states) == ["cuda", "cpu", "reference"]
    assert all(" active " in line for line in states.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_reason_is_said() -> None:
    (cuda,) = (status for status in describe() if status.name == "cuda")
    assert not cuda.active
    assert cuda.detail in ("torch sees no CUDA GPU here",) or "built without CUDA" in cuda.detail


def test_a_missing_native_core_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "the native CPU core is not built: install a C compiler")
    (cpu,) = (status for status in describe() if status.name == "cpu")
    assert not cpu.active
    assert cpu.detail == "the native CPU core is not built: install a C compiler"

"""Kernels in machine code, with no GPU: tensor-core instructions, spills, shared memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compiled
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from superblock.ops.triton.launch import Launch

OPS = ("linear", "grad_input", "grad_values")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 32)])
@pytest.mark.parametrize("op", OPS)
def test_half_precision_uses_wgmma_on_hopper(op: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    for case, config, launch in compiled.launches(op, dtype, block, 4096, limit=1):
        result = compiled.compile_launch(launch, 90, case, config)
        assert result.fits, result
        assert result.instructions["wgmma"], result


@pytest.mark.parametrize("op", OPS)
def test_float32_uses_tensor_cores_without_losing_accuracy(op: str) -> None:
    for case, config, launch in compiled.launches(op, torch.float32, (32, 32), 4096, limit=1):
        assert launch.arguments["PRECISION"] == "tf32x3"
        result = compiled.compile_launch(launch, 90, case, config)
        assert result.fits, result
        assert result.instructions["wgmma"], result


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma"), (100, "tcgen05")])
@pytest.mark.parametrize("op", OPS)
def test_other_generations_use_their_tensor_cores(op: str, capability: int, instruction: str) -> None:
    for case, config, launch in compiled.launches(op, torch.bfloat16, (64, 64), 4096, capability, limit=1):
        result = compiled.compile_launch(launch, capability, case, config)
        assert result.fits, result
        assert result.instructions[instruction], result


def everything_else() -> list[tuple[str, str, Launch]]:
    rows = [*compiled.launches("linear", torch.bfloat16, (64, 64), 1, limit=1)]
    rows += [*compiled.launches("grad_input", torch.bfloat16, (64, 64), 16, limit=1)]
    rows += [*compiled.mask_launches(torch.bfloat16), *compiled.gradient_launches(torch.bfloat16)]
    return rows


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_few_tokens_the_mask_side_and_what_follows(capability: int) -> None:
    for case, config, launch in everything_else():
        assert compiled.compile_launch(launch, capability, case, config).fits


class AbsentHopper:
    """As much of Triton's driver as compiling a call takes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_calls_bind_as_they_were_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``Launch.run`` hands to Triton, up to the launch itself, gives the kernels that were looked at."""
    monkeypatch.setattr(driver, "_active", AbsentHopper())
    rows = [*compiled.launches("linear", torch.bfloat16, (64, 64), 4096, limit=1)]
    rows += [*compiled.launches("grad_values", torch.bfloat16, (64, 64), 4096, limit=1)]
    for case, config, launch in [*rows, *everything_else()]:
        kernel = launch.compile()
        looked_at = compiled.compile_launch(launch, 90, case, config)
        found = {name: kernel.asm["ptx"].count(text) for name, text in compiled.INSTRUCTIONS.items()}
        assert (found, kernel.metadata.shared) == (looked_at.instructions, looked_at.shared)

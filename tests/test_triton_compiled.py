"""Kernels in machine code, with no GPU: tensor-core instructions, spills, shared memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compiled

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


def test_few_tokens_and_the_mask_side() -> None:
    rows = [*compiled.launches("linear", torch.bfloat16, (64, 64), 1, limit=1)]
    rows += [*compiled.launches("grad_input", torch.bfloat16, (64, 64), 16, limit=1)]
    rows += [*compiled.mask_launches(torch.bfloat16)]
    for case, config, launch in rows:
        assert compiled.compile_launch(launch, 90, case, config).fits

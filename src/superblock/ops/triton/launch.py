"""One launch of a kernel, as data: the same object is run, timed, and compiled with no GPU present."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Kernels reach 256 rows from where a tile starts with 32-bit offsets.
WIDEST_ROW = 2**23 - 1


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, every argument by name, and how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Enqueue the kernel on the current stream; an empty grid is nothing to do."""
        if math.prod(self.grid):
            self.kernel[self.grid](**self.arguments, **self._options)

    def compile(self) -> Any:
        """The compiled kernel, without running it."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Device:
    """What the choice of a configuration asks of a GPU."""

    name: str
    capability: int
    multiprocessors: int
    shared_memory: int


# What the kernels are planned for where tensors are not on a GPU: under Triton's interpreter, or compiled ahead.
H100 = Device("NVIDIA H100", 90, 132, 232448)


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """The facts of a tensor's device."""
    if device.type != "cuda":
        return H100
    facts: Any = torch.cuda.get_device_properties(device)  # torch 2.14 declares only some of its attributes
    return Device(
        facts.name, 10 * facts.major + facts.minor, facts.multi_processor_count, facts.shared_memory_per_block_optin
    )


def rows_of(x: Tensor, features: int) -> Tensor:
    """``x [..., features]`` as ``[tokens, features]`` with a dense last dimension; a view wherever one exists."""
    rows = x if x.dim() == 2 else x.reshape(-1, features) if x.numel() else x.new_empty(0, features)
    dense = rows.stride(1) == 1 or features == 1
    return rows if dense and rows.stride(0) <= WIDEST_ROW else rows.contiguous()


def precision_of(dtype: torch.dtype, capability: int) -> str:
    """How float32 products are computed: as torch's own setting says, and never less exactly.

    Three TF32 products keep float32's accuracy on tensor cores; before sm_80 there is no TF32.
    """
    if dtype != torch.float32 or capability < 80:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def splits_for(programs: int, steps: int, device: Device) -> int:
    """In how many parts a sum of ``steps`` is cut so that few programs fill the device: at least 4 steps a part."""
    if programs >= device.multiprocessors or programs == 0:
        return 1
    return max(1, min(2 * device.multiprocessors // programs, steps // 4, 16))

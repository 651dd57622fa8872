"""Times calls against one another: interleaved rounds, every sample kept, on the CPU and on CUDA GPUs."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superblock.version import version

PACKAGES = ("torchvision", "timm", "triton")
MOST_ITERATIONS, FEWEST_ITERATIONS, SECONDS = 100, 3, 20.0


@dataclass(frozen=True)
class Timing:
    """The latencies of one call in milliseconds, in the order in which they were taken."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The latency that a share ``q`` of the samples does not exceed, interpolated."""
        return float(torch.tensor(self.samples, dtype=torch.float64).quantile(q))

    @property
    def median(self) -> float:
        """The result: half of the samples were faster."""
        return self.quantile(0.5)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as the commands write them to JSON."""
        return {
            "median_ms": self.median,
            "quartile_1_ms": self.quantile(0.25),
            "quartile_3_ms": self.quantile(0.75),
            "minimum_ms": min(self.samples),
            "mean_ms": sum(self.samples) / len(self.samples),
            "samples_ms": list(self.samples),
        }


def measure(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    warmup: int | None = None,
    iterations: int | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Timing]:
    """Time each call, in turn within each round, so that a change of the machine's speed touches all alike.

    Args:
        calls: what to time, by name.
        device: where it runs; on a GPU the time is taken by its own events.
        warmup: untimed runs of each; by default 10, or fewer once those of a call took two seconds.
        iterations: timed rounds; by default as many as fit into twenty seconds, at least 3 and at most 100.
        progress: takes a line now and then.

    Returns:
        The timing of each call.
    """
    longest = 0.0
    for name, call in calls.items():
        began = time.perf_counter()
        for done in range(10 if warmup is None else warmup):
            if warmup is None and done and time.perf_counter() - began > SECONDS / 10:
                break
            call()
            synchronize(device)
        progress(f"warmed up: {name}")
    rounds: list[dict[str, Callable[[], float]]] = []
    began = time.perf_counter()
    limit = MOST_ITERATIONS if iterations is None else iterations
    while len(rounds) < limit:
        start = time.perf_counter()
        order = list(calls)[len(rounds) % len(calls) :] + list(calls)[: len(rounds) % len(calls)]
        rounds.append({name: _timed(calls[name], device) for name in order})
        longest = max(longest, time.perf_counter() - start)
        elapsed = time.perf_counter() - began
        if longest > 1:
            progress(f"round {len(rounds)} of at most {limit}")
        if iterations is None and len(rounds) >= FEWEST_ITERATIONS and elapsed + longest > SECONDS:
            break
    synchronize(device)
    return {name: Timing(tuple(one[name]() for one in rounds)) for name in calls}


def is_convolutional(model: nn.Module) -> bool:
    """Whether most of a model's parameters are convolutions': such models are fastest in ``torch.channels_last``."""
    kernels = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d))
    return 2 * kernels > sum(parameter.numel() for parameter in model.parameters())


def synchronize(device: torch.device) -> None:
    """Wait until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know to compare: device, instruction set, threads and versions."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "superblock": version(),
        "packages": {name: installed(name) for name in PACKAGES if find_spec(name)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def _timed(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Run a call; what comes back tells its milliseconds once the device is done.

    On a GPU nothing waits in between: the host stays ahead, and launches cost only where they are the bottleneck.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        elapsed = (time.perf_counter() - began) * 1e3
        return lambda: elapsed
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(torch.cuda.current_stream(device))
    call()
    end.record(torch.cuda.current_stream(device))
    return lambda: start.elapsed_time(end)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

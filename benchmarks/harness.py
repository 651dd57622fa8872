"""What the CPU benchmarks share: matrices, ceilings of the machine, verified and interleaved timing, result files."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superblock.benchmarking import Timing, describe_machine, measure
from superblock.bsr import BSRMatrix
from superblock.ops import native
from superblock.ops.layout import feature_major

CPU = torch.device("cpu")
# Between float32 sums of the same products in another order, or bfloat16 results a rounding apart.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do, measured: GFLOP/s of multiply-adds and GB/s of memory."""

    gflops: float
    bandwidth: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The roofline: the larger of the two times."""
        return max(flops / self.gflops, nbytes / self.bandwidth) * 1e-9


@torch.inference_mode(False)
def random_matrix(out: int, in_: int, block: int, sparsity: float, dtype: torch.dtype) -> BSRMatrix:
    """Exactly the asked share of blocks, at random places; as a loaded model has it, with versions of its tensors."""
    rows, columns = out // block, in_ // block
    living = torch.zeros(rows * columns, dtype=torch.bool)
    living[torch.randperm(rows * columns)[: max(1, round((1 - sparsity) * rows * columns))]] = True
    living = living.view(rows, columns)
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = living.sum(1).cumsum(0)
    col = living.nonzero()[:, 1].int()
    values = torch.randn(len(col), block, block) / math.sqrt(max(1.0, in_ * (1 - sparsity)))
    return BSRMatrix(crow, col, feature_major(values.to(dtype)), (out, in_))


def ceilings(dtype: torch.dtype, clock: str) -> Ceilings:
    """The best of several runs of products that live in registers, and of a pass over memory beyond the caches."""
    big = torch.empty(64 << 20, dtype=torch.float32).fill_(1)
    passes = [_seconds(lambda: big.sum(), clock) for _ in range(7)]
    flops = 0.0

    def peak() -> None:
        nonlocal flops
        flops = native.library().sb_run_peak(native.DTYPES[dtype], 1_000_000, torch.get_num_threads())

    peaks = [_seconds(peak, clock) for _ in range(9)]
    return Ceilings(flops / min(peaks) * 1e-9, big.nbytes / min(passes) * 1e-9)


def _seconds(call: Callable[[], object], clock: str) -> float:
    read = time.thread_time if clock == "cpu" else time.perf_counter
    began = read()
    call()
    return read() - began


def verify(got: Tensor, want: Tensor, what: str) -> None:
    """Raise unless the contestants compute the same: nothing wrong is ever timed."""
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))
    if not error < TOLERANCE[got.dtype]:
        raise SystemExit(f"{what} differs from the dense result by {error:.1e} of the largest value: not timed")


def compete(contestants: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median, quartiles and minimum of each, in milliseconds, timed in turn."""
    if args.clock == "wall":
        timings = measure(contestants, CPU, warmup=2, iterations=args.iterations)
    else:
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(args.iterations + 1):
            for name, call in contestants.items():
                samples[name].append(_seconds(call, "cpu") * 1e3)
        timings = {name: Timing(tuple(times[1:])) for name, times in samples.items()}
    return {
        name: {key: value for key, value in timing.to_dict().items() if key != "samples_ms"}
        for name, timing in timings.items()
    }


def parser(description: str) -> argparse.ArgumentParser:
    """The options every CPU benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the time of the one thread that then runs, for a machine whose cores are shared",
    )
    options.add_argument("--iterations", type=int, default=15, help="timed rounds of every case")
    options.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    options.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.8, 0.9, 0.95])
    options.add_argument("--blocks", nargs="+", type=int, default=[16, 32, 64])
    options.add_argument("--compiled", action="store_true", help="let torch.compile compete too")
    options.add_argument("--output", type=Path, help="a JSON file for the results")
    return options


def prepare(args: argparse.Namespace) -> argparse.Namespace:
    """Set the threads: one for the clock that sees one."""
    args.threads = 1 if args.clock == "cpu" else args.threads
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_memory()
    return args


def keep_memory() -> None:
    """Let malloc keep what it was given back: a result of 10 MB costs more in page faults than in products.

    Whether glibc returns such memory to the system depends on what was freed before, so that contestants took turns
    at paying for it.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 30)


def dtypes_of(options: argparse.Namespace) -> Iterable[torch.dtype]:
    """The dtypes asked for."""
    return [getattr(torch, name) for name in options.dtypes]


def write(args: argparse.Namespace, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """The rows with the machine they were measured on."""
    path = args.output
    if path is None:
        return
    machine = describe_machine(CPU) | {"instruction_set": native.current(), "clock": args.clock}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": benchmark, "machine": machine, "rows": rows}, indent=1) + "\n")

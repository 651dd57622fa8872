"""Times on a GPU: CUDA graphs, a flushed L2, contestants in turn, medians; and what of it is written down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLUSHED_BYTES = 256 * 2**20
ROUNDS, SECONDS_A_CONTEST = 20, 1.0


@dataclass
class Bench:
    """What the stages share: the device, the seconds left, and the rows so far.

    ``dry`` runs everything on tiny operands where no GPU is, so that the script itself is tested.
    """

    device: str
    dry: bool = False
    fast: bool = False
    deadline: float = float("inf")
    rows: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, stage: str, name: str, **numbers: Any) -> None:
        """Keep a row and print it."""
        self.rows.append({"stage": stage, "name": name, **numbers})
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
        )
        print(f"{stage}: {name}: {shown}", flush=True)

    def contest(self, calls: Mapping[str, Callable[[], object]], graphs: bool = True) -> dict[str, float]:
        """The median milliseconds of each call, all in turn within a round."""
        if self.dry:
            return {name: _host_milliseconds(call) for name, call in calls.items()}
        runs = {name: _captured(call) if graphs else _warm(call) for name, call in calls.items()}
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        times: dict[str, list[float]] = {name: [] for name in runs}
        began = time.monotonic()
        for done in range(ROUNDS):
            if done >= 3 and time.monotonic() - began > SECONDS_A_CONTEST * len(runs):
                break
            for name, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flushed.zero_()
                start.record()
                run()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
        return {name: statistics.median(each) for name, each in times.items()}


def cell(value: object) -> str:
    """A number or a word, as it is shown."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _host_milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _warm(call: Callable[[], object]) -> Callable[[], object]:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return call


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of one call, after three on a stream of their own, in which kernels are tuned and compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def relative_error(got: Tensor, want: Tensor) -> float:
    """``‖got − want‖ / ‖want‖``, in float64."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


LIMIT = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def verify(name: str, got: Tensor, want: Tensor, limit: float | None = None) -> None:
    """Raise unless ``got`` is what ``want`` says, before anything is timed."""
    error = relative_error(got, want)
    if not error <= (LIMIT[got.dtype] if limit is None else limit):  # NaN never is.
        raise SystemExit(f"{name}: wrong by {error:.3g}: nothing of this run is a result")

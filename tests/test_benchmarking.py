"""The timing harness: interleaved rounds, every sample kept, quartiles interpolated."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from superblock import benchmarking
from superblock.benchmarking import Timing, describe_machine, measure

CPU = torch.device("cpu")


def test_calls_are_timed_in_turn_and_no_one_always_first() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = measure(calls, CPU, warmup=1, iterations=3)
    assert order == list("abc") + list("abc") + list("bca") + list("cab")
    assert list(timings) == list("abc")
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_a_sample_is_the_milliseconds_of_one_call() -> None:
    (timing,) = measure({"sleep": lambda: time.sleep(0.02)}, CPU, warmup=0, iterations=2).values()
    assert all(20 <= sample < 200 for sample in timing.samples)


def test_quick_calls_run_often_and_slow_ones_at_least_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"quick": 0, "slow": 0}

    def count(name: str, seconds: float) -> None:
        counts[name] += 1
        time.sleep(seconds)

    assert len(measure({"quick": lambda: count("quick", 0)}, CPU)["quick"].samples) == 100
    assert counts["quick"] == 10 + 100
    monkeypatch.setattr(benchmarking, "SECONDS", 0.05)
    assert len(measure({"slow": lambda: count("slow", 0.03)}, CPU)["slow"].samples) == 3
    assert counts["slow"] == 1 + 3


def test_quartiles_are_interpolated() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0))
    assert (timing.quantile(0.25), timing.median, timing.quantile(0.75)) == (1.75, 2.5, 3.25)
    plain = timing.to_dict()
    assert plain["samples_ms"] == [4.0, 1.0, 2.0, 3.0]
    assert (plain["minimum_ms"], plain["mean_ms"], plain["median_ms"]) == (1.0, 2.5, 2.5)


def test_the_machine_is_described() -> None:
    found = describe_machine(CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"cpu", "cpu_capability", "platform", "python", "superblock", "device"} <= found.keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_its_own_events_take_the_time() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    timings = measure({"large": lambda: x @ x, "small": lambda: x[:64] @ x}, device, warmup=3, iterations=20)
    assert 0 < timings["small"].median < timings["large"].median


def test_the_harness_needs_no_torchvision() -> None:
    assert "torchvision" not in vars(benchmarking)
    assert all(not name.startswith("torchvision") for name in _imports_of("superblock.benchmarking"))


def _imports_of(module: str) -> list[str]:
    """The modules that importing ``module`` in a fresh interpreter loads."""
    import subprocess

    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

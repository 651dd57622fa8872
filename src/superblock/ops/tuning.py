"""Which configuration a case runs with: measured at its first use, kept in a file, a model's guess where neither is.

``SUPERBLOCK_TUNE_SECONDS`` bounds what a process spends on measuring (60 by default, 0 turns it off), and
``SUPERBLOCK_TUNE_FILE`` names the file of results (``~/.cache/superblock/tuned.json``), which can be shared between
machines: a case names its device. The dense product is measured too, and used where it wins.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from superblock.errors import ConfigError
from superblock.files import write_atomically
from superblock.ops.triton.configs import DENSE, Case, Config
from superblock.ops.triton.launch import Launch

SECONDS_VARIABLE = "SUPERBLOCK_TUNE_SECONDS"
FILE_VARIABLE = "SUPERBLOCK_TUNE_FILE"
MEASURED = 8  # configurations a case: each costs about a second of one core to compile
Candidates = Callable[[Case], Sequence[Config]]


def choose(
    case: Case, candidates: Candidates, launches: Callable[[Config], list[Launch]], dense: Callable[[], object]
) -> Config:
    """The configuration for a case, remembered with its plan.

    Args:
        case: what is multiplied.
        candidates: the configurations that fit it, the likeliest first.
        launches: how one of them runs.
        dense: the dense product of the same operands.
    """
    key = (case.op, case.x.dtype, case.precision, case.shape, case.block, case.bucket)
    chosen: Config | None = case.plan.choices.get(key)
    if chosen is None:
        chosen, final = _decide(case, candidates(case), launches, dense)
        if final:
            case.plan.choices[key] = chosen
    return chosen


def _decide(
    case: Case, options: Sequence[Config], launches: Callable[[Config], list[Launch]], dense: Callable[[], object]
) -> tuple[Config, bool]:
    """The choice, and whether it holds for later calls too."""
    found = results().get(case.name)
    if found is not None and found in (*options, DENSE):
        return found, True
    if not case.x.is_cuda or case.tokens == 0 or case.plan.nnz == 0:
        return options[0], True
    if torch.cuda.is_current_stream_capturing():
        return options[0], False
    if results().seconds <= 0:
        return options[0], True
    return _measure(case, options, launches, dense), True


def _measure(
    case: Case, options: Sequence[Config], launches: Callable[[Config], list[Launch]], dense: Callable[[], object]
) -> Config:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def run(config: Config) -> None:
        if config == DENSE:
            dense()
        else:
            for launch in launches(config):
                launch.run()

    started = time.monotonic()
    options = options[:MEASURED]
    _compile(case, options, launches)
    times: dict[Config, float] = {}
    for config in (DENSE, *options):
        if len(times) > 1 and time.monotonic() - started > results().seconds:
            break
        # What does not fit this device, or the memory that is left on it, is no candidate.
        with suppress(OutOfResources, torch.OutOfMemoryError):
            times[config] = do_bench(partial(run, config), warmup=5, rep=20, return_mode="median")
    results().seconds -= time.monotonic() - started
    if not times:
        return options[0]
    best = min(times, key=lambda config: times[config])
    results().add(case.name, best, times[best], times.get(DENSE))
    return best


def _compile(case: Case, options: Sequence[Config], launches: Callable[[Config], list[Launch]]) -> None:
    """Compile all candidates side by side: the compiler lets other threads run, and takes most of the time."""

    def compile_one(config: Config) -> None:
        # Whatever stands in the way will say so again when the configuration is run.
        with torch.cuda.device_of(case.x), suppress(Exception):
            for launch in launches(config):
                launch.compile()

    with ThreadPoolExecutor(min(len(options), os.cpu_count() or 1)) as threads:
        list(threads.map(compile_one, options))


class Results:
    """A file of measured cases, and what is left of the seconds that this process may spend on more."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self.seconds = seconds
        self.cases = _read(path)

    def get(self, name: str) -> Config | None:
        """The configuration measured to be the fastest for a case, if it was."""
        return Config(**self.cases[name]["config"]) if name in self.cases else None

    def add(self, name: str, config: Config, milliseconds: float, dense_milliseconds: float | None) -> None:
        """Keep a result, beside those that other processes have written meanwhile."""
        case = {"config": asdict(config), "milliseconds": milliseconds, "dense_milliseconds": dense_milliseconds}
        self.cases = {**self.cases, **_read(self.path), name: case}
        text = json.dumps({"format": 1, "cases": self.cases}, indent=1, sort_keys=True)
        write_atomically(self.path, lambda temporary: temporary.write_text(text))

    def describe(self) -> str:
        """One line for ``superblock info``."""
        dense = [name for name, case in self.cases.items() if case["config"]["engine"] == DENSE.engine]
        return f"{len(self.cases)} tuned cases in {self.path}, of which {len(dense)} run dense because that is faster"


@lru_cache(maxsize=1)
def results() -> Results:
    """This process's results.

    Raises:
        ConfigError: the file or the number of seconds cannot be read.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get(FILE_VARIABLE) or cache / "superblock" / "tuned.json")
    text = os.environ.get(SECONDS_VARIABLE, "60")
    try:
        return Results(path, float(text))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{SECONDS_VARIABLE} must be a number of seconds, got {text!r}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        cases: dict[str, Any] = content["cases"]
        for case in cases.values():
            Config(**case["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of tuning results ({error}): delete it, or name another") from error
    return cases

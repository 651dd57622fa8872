"""Finding, choosing and sharing the native core."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from native_cases import ISAS, needs_core, random_weight

from superblock.errors import BackendError
from superblock.ops import backends, cpu, native, reference


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


REPORT = "from superblock.ops import native; print(native.available()); print(native.current())"


@needs_core
@pytest.mark.parametrize("name", ISAS)
def test_the_environment_forces_an_instruction_set(name: str) -> None:
    assert python(REPORT, SUPERBLOCK_CPU_ISA=name).stdout.splitlines()[1] == name


@needs_core
def test_the_best_instruction_set_is_the_default() -> None:
    environment = {key: value for key, value in os.environ.items() if key != native.ISA_VARIABLE}
    done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == ISAS[0]


@needs_core
def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(BackendError, match=r"SUPERBLOCK_CPU_ISA must be one .*portable.*, got 'mmx'"):
        native.select("mmx")
    code = "from superblock.ops.backends import select; import torch; select('cpu', torch.float32, 16, 16)"
    done = python(code, SUPERBLOCK_CPU_ISA="mmx")
    assert done.returncode
    assert "BackendError: SUPERBLOCK_CPU_ISA must be one" in done.stderr


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch):
    caches = (native.missing, native.library, backends.select, backends._warn_of_missing_core)

    def clear() -> None:
        for cache in caches:
            cache.cache_clear()

    clear()
    yield monkeypatch
    monkeypatch.undo()
    clear()


def test_without_the_library_the_reference_multiplies_and_one_warning_says_so(no_core: pytest.MonkeyPatch) -> None:
    no_core.setattr(native, "find", lambda: None)
    with pytest.warns(UserWarning, match="not built: install a C compiler"):
        assert backends.select("cpu", torch.float32, 16, 16) is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("cpu", torch.bfloat16, 16, 16) is reference
    assert cpu.unsupported(torch.float32, 16, 16) == native.missing()
    with pytest.raises(BackendError, match="the native CPU core is not built"):
        native.library()


def test_a_broken_library_says_why(no_core: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / native.LIBRARY
    broken.write_bytes(b"not a library")
    no_core.setattr(native, "find", lambda: broken)
    assert "cannot be loaded" in (native.missing() or "")


@needs_core
def test_cases_the_core_does_not_take_go_to_the_reference_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("cpu", torch.float64, 16, 16) is reference
        assert backends.select("cpu", torch.float32, 16, 12) is reference
        assert backends.select("cpu", torch.float32, 16, 16) is cpu


FORK = """
import os, torch
torch.set_num_threads(2)
from superblock.ops import cpu
x = torch.randn(500, 64)
values, crow, col = torch.randn(4, 32, 32), torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 1])
run = lambda: cpu.linear(x, values, crow, col, None, None, 64, 64, "relu")
before = run()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(run(), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(run(), before)
"""


@needs_core
def test_a_forked_child_multiplies() -> None:
    done = python(FORK)
    assert done.returncode == 0, done.stderr


@needs_core
def test_python_threads_and_models_side_by_side() -> None:
    torch.set_num_threads(2)
    layers = [(random_weight(96, 64, (16, 16)), torch.randn(500 + i, 64)) for i in range(4)]

    def run(i: int) -> torch.Tensor:
        (values, crow, col), x = layers[i]
        return cpu.linear(x, values, crow, col, None, None, 96, 64, "gelu")

    alone = [run(i) for i in range(4)]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        wrong.extend(i for _ in range(50) if not torch.equal(run(i), alone[i]))

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    assert not wrong


@needs_core
def test_one_openmp_runtime() -> None:
    """The core brings none of its own."""
    code = (
        "import torch; from superblock.ops import native; native.library();"
        "print(sum('gomp' in line and 'r-xp' in line for line in open('/proc/self/maps')))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps")
    assert python(code).stdout.strip() == "1"

"""What the tests of the native core share: matrices, instruction sets, tolerances, builds of their own."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from superblock.ops import native
from superblock.ops.layout import feature_major

CSRC = Path(__file__).parents[1] / "src/superblock/csrc"
ISAS = [] if native.missing() else native.available()
# Relative to the largest float64 result: half a unit of rounding of the result's dtype (2^-9 for bfloat16, 2^-12 for
# float16) with room for the sum's own rounding, which for float32 grows with the square root of its length.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = list(TOLERANCE)

needs_core = pytest.mark.skipif(not ISAS, reason=native.missing() or "no instruction set")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the machine in turn."""
    native.select(request.param)
    yield request.param
    native.select(ISAS[0])


def random_weight(
    out_features: int,
    in_features: int,
    block: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    density: float = 0.4,
    packed: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``values, crow_indices, col_indices``, zero beyond the edges; some rows are empty at low densities."""
    rows, columns = math.ceil(out_features / block[0]), math.ceil(in_features / block[1])
    living = torch.rand(rows, columns) < density
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = living.sum(1).cumsum(0)
    row, col = living.nonzero().T
    values = torch.randn(len(col), *block) / max(1.0, math.sqrt(in_features * density))
    for index, count, size, axis in ((row, rows, out_features, 1), (col, columns, in_features, 2)):
        edge = size - (count - 1) * block[axis - 1]
        values[index == count - 1] = values[index == count - 1].index_fill(
            axis, torch.arange(edge, block[axis - 1]), 0.0
        )
    values = values.to(dtype)
    return (feature_major(values) if packed else values), crow, col.int()


def read_features(col: Tensor, features: int, width: int) -> Tensor:
    """Which of so many features blocks of this width in these columns read."""
    columns = torch.zeros(-(-features // width), dtype=torch.bool).index_fill_(0, col.long(), True)
    return columns.repeat_interleave(width)[:features]


def before_a_hole(x: Tensor) -> Tensor:
    """A copy of x whose last element ends where the process may read no further."""
    page, bytes_, no_access = mmap.PAGESIZE, x.numel() * x.element_size(), 0
    whole = -(-bytes_ // page) * page
    memory = mmap.mmap(-1, whole + page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + whole), ctypes.c_size_t(page), no_access)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=whole - bytes_).view(x.shape)
    return copy.copy_(x)


class Seen(TorchDispatchMode):
    """Notes the names of the ops that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def near(got: Tensor, want: Tensor) -> None:
    """The same in float32, but for rounding."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def assert_compiles_whole(model: torch.nn.Module, x: Tensor) -> None:
    """In inference; from scratch, since every case is another model at the same place of torch's own code."""
    torch.compiler.reset()
    with torch.inference_mode():
        expected = model(x)
        near(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def assert_near(got: Tensor, want: Tensor) -> None:
    """``got`` of any dtype against float64 ``want``."""
    assert got.shape == want.shape
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[got.dtype] * scale)


def compiler(name: str = "gcc") -> str:
    """A C compiler, or skip."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


AVX512 = ["-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_FILES = {
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512": AVX512,
    "isa_avx512bf16": [*AVX512, "-mavx512bf16"],
    "isa_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def build(cc: str, target: Path, *flags: str, x86: bool, main: Path | None = None) -> None:
    """Compile the core, every instruction set or the portable one alone, and link it, with ``main`` if given.

    Unoptimized: a quarter of the time to compile the hundreds of tiles, which outweighs what they then take to run.
    Small products take all threads here.
    """
    sources = [path for path in sorted(CSRC.glob("*.c")) if x86 or path.stem not in X86_FILES]
    sources += [main] if main else []

    def compiled(source: Path) -> str:
        output = str(target.parent / f"{source.stem}.o")
        own = [*X86_FILES.get(source.stem, []), *(["-DSB_X86", "-DSB_AMX"] if x86 else [])]
        command = [
            cc,
            "-std=gnu11",
            "-O0",
            "-g",
            "-fPIC",
            "-DSB_WORTH_A_THREAD=1",
            *flags,
            *own,
            f"-I{CSRC}",
            "-c",
            str(source),
            "-o",
            output,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    kind = ["-rdynamic"] if main else ["-shared"]
    subprocess.run([cc, *flags, *kind, *objects, "-o", str(target), "-lm", "-ldl", "-lpthread"], check=True)

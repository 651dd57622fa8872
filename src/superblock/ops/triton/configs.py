"""The configurations worth trying for a case, the one that a model of the device expects to win first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from superblock.ops.triton.launch import Device, device_of, precision_of
from superblock.ops.triton.plans import Plan

# A model of an H100, fitted to a thousand measurements (docs/gpu.md): TFLOP/s by kind of arithmetic, TB/s from L2, and
# microseconds between a load and its use, to start and end a program, to finish a thousand outputs of a thread.
PEAK = {"half": 740.0, "tf32": 350.0, "tf32x3": 115.0, "ieee": 45.0}
L2_BANDWIDTH = 9.2
LATENCY, START, FINISH = 0.84, 2.2, 19.0
OVERLAP = 0.6  # of the shorter of arithmetic and traffic, hidden behind the longer
REGISTERS, REGISTERS_BESIDE_SUMS = 65536, 56
WGMMA_ROWS = 64
DECODED_TOKENS = 4
FEW_TOKENS = 256


@dataclass(frozen=True)
class Config:
    """How a kernel cuts its work: ``engine`` is ``product``, ``decode``, ``sampled`` or ``dense``.

    ``m × n`` is the tile of one program, ``k`` its step along the sum, in elements. A ``turned`` product puts outputs
    on the tensor core's M axis and tokens on N; a ``described`` one fetches ``x`` through a tensor descriptor.
    """

    engine: str
    m: int = 0
    n: int = 0
    k: int = 0
    warps: int = 4
    stages: int = 1
    turned: bool = False
    described: bool = False


DENSE = Config("dense")


@dataclass(frozen=True)
class Case:
    """A product as the choice sees it: ``x [tokens, in]`` and a weight's shape, block and density."""

    op: str
    x: Tensor
    plan: Plan
    shape: tuple[int, int]
    block: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def half(self) -> bool:
        """Whether the operands are of 16 bits."""
        return self.x.element_size() == 2

    @property
    def hopper(self) -> bool:
        """Whether the tensor cores read shared memory: Hopper and later."""
        return self.device.capability >= 90

    @property
    def measured(self) -> bool:
        """Whether configurations were measured on such a device: elsewhere some of the finer ones spill."""
        return self.device.capability == 90

    @property
    def device(self) -> Device:
        return device_of(self.x.device)

    @property
    def precision(self) -> str:
        return precision_of(self.x.dtype, self.device.capability)

    @property
    def bucket(self) -> int:
        """The power of two that tokens are rounded up to."""
        return 1 << max(0, self.tokens - 1).bit_length()

    @property
    def name(self) -> str:
        """What a file of results calls the case."""
        dtype = str(self.x.dtype).removeprefix("torch.")
        numbers = dtype if dtype != "float32" else f"{dtype}/{self.precision}"
        shape, block = (f"{rows}x{columns}" for rows, columns in (self.shape, self.block))
        return "|".join(
            (self.device.name, self.op, numbers, shape, block, f"{self.plan.density:.1g}", str(self.bucket))
        )


def product_configs(case: Case) -> list[Config]:
    """For ``x Wᵀ`` and ``dy W``: all that fit the device, by expected time."""
    if case.tokens <= DECODED_TOKENS:
        tiles = ((4, 256, 1), (4, 512, 4), (16, 128, 4), (8, 512, 4), (4, 512, 2), (16, 256, 4))
        return [Config("decode", case.bucket, n, k, warps) for n, k, warps in tiles]
    found = [
        Config("product", m, n, k, _warps(m, n, turned, case), stages, turned, _describes(n, k, case))
        for m, n, k, turned in product(*_tiles(case), (False, True))
        if _possible(m, n, k, turned, case)
        for stages in _depths(_stages(m, n, k, case), case)
    ]
    return sorted(found, key=lambda config: _expected(config, case))


def _depths(deepest: int, case: Case) -> list[int]:
    """The pipelines worth trying: on sm_90 shallow ones let more programs share a multiprocessor."""
    return sorted({2, min(3, deepest), deepest}) if case.measured else [deepest]


def _tiles(case: Case) -> tuple[list[int], list[int], list[int]]:
    """The extents that a tile may have: tokens, outputs, and steps along the sum."""
    few = case.tokens <= FEW_TOKENS
    rows = [m for m in (16, 32, 64, 128, 256) if (m < 2 * case.tokens or m == 16) and (few or m >= 64)]
    # Parts of a block row fill the device when tokens are few; whole and merged rows share a tile of x.
    outs = [n for n in (16, 32, 64, 128, 256) if n >= case.block[0] or few]
    depths = [16, 32, 64] if case.half else [16, 32]
    return rows, outs, [k for k in depths if k >= min(case.block[1], depths[-1])]


def _possible(m: int, n: int, k: int, turned: bool, case: Case) -> bool:
    """Whether the kernel takes a tile, and its sums and operands stay in registers."""
    block_out, block_in = case.block
    if k > block_in and n > block_out:
        return False  # Either a step gathers blocks or a panel merges rows.
    if turned and not (case.half and case.hopper and n >= WGMMA_ROWS):
        return False
    if not (case.half or case.hopper) and k < 32 and n > block_out:
        return False
    # Tiles that spill, as benchmarks/compiled.py finds.
    spills = n == 256 and (turned or m < 128 or block_out == 128)
    spills |= m == 256 and n == 128 and not turned
    spills |= case.device.capability >= 100 and (n == 256 or (m == 128 and n == block_out == 128))
    return not spills and _fits(m, n, k, case)


def _describes(n: int, k: int, case: Case) -> bool:
    """Whether tiles of ``x`` come through a descriptor: that pays for merged rows, and takes Hopper's copy engine."""
    return case.half and case.hopper and n > case.block[0] and k <= case.block[1]


def sampled_configs(case: Case) -> list[Config]:
    """For ``dyᵀ x`` at the living blocks: ``m`` gathered columns of ``x``, ``n`` outputs, ``k`` tokens a step."""
    n, block_in = case.block
    tiles = [(256, 64), (128, 64), (64, 64)] if case.half else [(128, 32), (64, 32), (64, 16)]
    if case.half and case.measured:
        tiles[1:1] = [(256, 32), (128, 32)]
    return [
        Config("sampled", m, n, k, _warps(m, n, False, case), _stages(m, n, k, case))
        for m, k in tiles
        if m >= block_in and _fits(m, n, k, case)
    ]


def _fits(m: int, n: int, k: int, case: Case) -> bool:
    """Whether a tile fits: its sums the registers, beside mma's operands before Hopper, its pipeline shared memory."""
    sums = (32768 if case.half else 16384) // (1 if case.hopper else 2)
    return m * n <= sums and _stages(m, n, k, case) >= 2


def _warps(m: int, n: int, turned: bool, case: Case) -> int:
    """Two groups of four warps where one would hold too many sums; on Hopper each multiplies at least 64 rows."""
    if turned:
        return 8 if n > WGMMA_ROWS else 4
    if not case.hopper and not case.half and m * n >= 8192:
        return 8
    return 8 if m == 256 or (m == 128 and n >= (128 if case.half else 64)) else 4


def _stages(m: int, n: int, k: int, case: Case) -> int:
    """The deepest pipeline of at most four stages that leaves some shared memory to the epilogue."""
    return min(4, (case.device.shared_memory - 4096) // ((m + n) * k * case.x.element_size()))


def _expected(config: Config, case: Case) -> float:
    """The expected microseconds of a product on an H100.

    A program's steps take the longer of arithmetic, traffic from L2 and the latency that its pipeline leaves, and its
    start and end are shared with the programs beside it on a multiprocessor. Merged rows walk the union of their
    columns: at density ``d``, ``1 - (1 - d)^rows`` of all.
    """
    m, n, k, size = config.m, config.n, config.k, case.x.element_size()
    density = max(case.plan.density, 1e-6)
    walked = 1 - (1 - density) ** max(1, n // case.block[0])
    sums = m * n // (32 * config.warps)
    beside = min(
        case.device.shared_memory // (config.stages * (m + n) * k * size + 2048),
        2048 // (32 * config.warps),
        REGISTERS // (min(255, sums + REGISTERS_BESIDE_SUMS) * 32 * config.warps),
    )
    beside = max(1, beside)
    padded = m * max(n, WGMMA_ROWS) if config.turned else max(m, WGMMA_ROWS) * n
    share = 1e6 / case.device.multiprocessors  # of the device's rates, a multiprocessor's in a microsecond
    arithmetic = 2 * padded * k / (PEAK["half" if case.half else case.precision] * share)
    traffic = size * k * (m + n * density / walked) / (L2_BANDWIDTH * share)
    latency = LATENCY / (beside * (config.stages - 1))
    step = max(arithmetic, traffic, latency) + (1 - OVERLAP) * min(arithmetic, traffic)
    program = walked * case.shape[1] / k * step + (START + FINISH * sums / 1000) / beside
    programs = math.ceil(case.tokens / m) * math.ceil(case.shape[0] / n)
    return max(1.0, programs / case.device.multiprocessors) * program

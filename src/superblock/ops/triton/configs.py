"""The configurations worth trying for a case, the one that a model of the device expects to win first."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from torch import Tensor

from superblock.ops.triton.launch import Device, device_of, precision_of
from superblock.ops.triton.plans import Plan

# What an H100 reaches, in TFLOP/s by kind of arithmetic and in TB/s from L2; only their ratios decide.
PEAK = {"half": 700.0, "tf32": 350.0, "tf32x3": 115.0, "ieee": 45.0}
L2_BANDWIDTH = 5.5
# The share of the peak that narrow tiles reach on tensor cores.
ROWS_REACH = {16: 0.15, 32: 0.3, 64: 0.85}
OUTPUTS_REACH = {16: 0.3, 32: 0.55, 64: 0.85}
DECODED_TOKENS = 4
FEW_TOKENS = 256


@dataclass(frozen=True)
class Config:
    """How a kernel cuts its work: ``engine`` is ``product``, ``decode``, ``sampled`` or ``dense``.

    ``m × n`` is the tile of one program, ``k`` its step along the sum, in elements.
    """

    engine: str
    m: int = 0
    n: int = 0
    k: int = 0
    warps: int = 4
    stages: int = 1


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
    block_out, block_in = case.block
    if case.tokens <= DECODED_TOKENS:
        tiles = ((16, 256), (8, 512), (16, 128), (4, 512))
        return [Config("decode", case.bucket, n, k) for n, k in tiles]
    depths = (16, 32, 64) if case.half else (16, 32)
    few = case.tokens <= FEW_TOKENS
    rows = [m for m in (16, 32, 64, 128, 256) if (m < 2 * case.tokens or m == 16) and (few or m >= 64)]
    # Parts of a block row fill the device when tokens are few; whole and merged rows share a tile of x.
    outs = [n for n in (16, 32, 64, 128, 256) if n >= block_out or few]
    sums = 16384 if case.hopper else 8192
    found = []
    for m, n, k in product(rows, outs, depths):
        gathers_and_merges = k > block_in and n > block_out
        # Tiles that spill, as benchmarks/compiled.py finds: in an exact GELU, and in three TF32 products before sm_90.
        spills = (n == 256 and (m < 128 or block_out == 128)) or (m == 256 and n == 128)
        spills |= not (case.half or case.hopper) and k < 32 and n > block_out
        if not gathers_and_merges and not spills and k >= min(block_in, depths[-1]) and _fits(m, n, k, case, sums):
            found.append(Config("product", m, n, k, _warps(m, n, case), _stages(m, n, k, case)))
    return sorted(found, key=lambda config: _expected(config, case))


def sampled_configs(case: Case) -> list[Config]:
    """For ``dyᵀ x`` at the living blocks: ``m`` gathered columns of ``x``, ``n`` outputs, ``k`` tokens a step."""
    n, block_in = case.block
    tiles = ((256, 64), (128, 64), (64, 64)) if case.half else ((128, 32), (64, 32), (64, 16))
    return [
        Config("sampled", m, n, k, _warps(m, n, case), _stages(m, n, k, case))
        for m, k in tiles
        if m >= block_in and _fits(m, n, k, case)
    ]


def _fits(m: int, n: int, k: int, case: Case, most_float32_sums: int = 16384) -> bool:
    """Whether a tile fits: its sums the registers, beside mma's operands before Hopper, its pipeline shared memory."""
    sums = (32768 if case.hopper else 16384) if case.half else most_float32_sums
    return m * n <= sums and _stages(m, n, k, case) >= 2


def _warps(m: int, n: int, case: Case) -> int:
    """Two groups of four warps where one would hold too many sums; on Hopper each multiplies at least 64 rows."""
    if not case.hopper and not case.half and m * n >= 8192:
        return 8
    return 8 if m == 256 or (m == 128 and n >= (128 if case.half else 64)) else 4


def _stages(m: int, n: int, k: int, case: Case) -> int:
    """The deepest pipeline of at most four stages that leaves some shared memory to the epilogue."""
    return min(4, (case.device.shared_memory - 4096) // ((m + n) * k * case.x.element_size()))


def _expected(config: Config, case: Case) -> float:
    """The relative time of a product, by the slower of tensor cores and L2, per token, input and output.

    Merged rows multiply the union of their columns: at density ``d``, ``1 - (1 - d)^rows`` of all.
    """
    merged = max(1, config.n // case.block[0])
    density = max(case.plan.density, 1e-6)
    walked = 1 - (1 - density) ** merged
    peak = PEAK["half" if case.half else case.precision]
    peak *= ROWS_REACH.get(config.m, 1.0) * OUTPUTS_REACH.get(config.n, 1.0) * (0.7 if config.k < 32 else 1.0)
    arithmetic = 2 * walked / peak
    traffic = case.x.element_size() * (walked / config.n + density / config.m) / L2_BANDWIDTH
    padding = -(-case.tokens // config.m) * config.m / case.tokens
    return padding * (max(arithmetic, traffic) + 0.1 * min(arithmetic, traffic))

"""What the kernels compile to, with no GPU: registers, shared memory, spills, tensor-core instructions.

python benchmarks/compiled.py [--capabilities 80 90 100] [--output benchmarks/results/compiled]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from superblock.bsr import BSRMatrix
from superblock.ops.triton import activation, decode, masks, product, sampled
from superblock.ops.triton.configs import Case, product_configs, sampled_configs
from superblock.ops.triton.launch import H100, Device, Launch
from superblock.ops.triton.plans import Operand, plan_of
from superblock.ops.tuning import MEASURED

BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128))
TOKENS = (1, 16, 4096)
DENSITY = 0.2
DTYPES = (torch.bfloat16, torch.float32)
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma": "mma.sync",
    "cp.async": "cp.async.c",
    "tma": "cp.async.bulk.tensor",
}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
TYPES |= {torch.bool: "*i1", torch.int64: "*i64"}


@dataclass(frozen=True)
class Compiled:
    """One kernel in machine code; ``stack`` is where spilled registers would go, in bytes."""

    kernel: str
    case: str
    config: str
    capability: int
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether nothing spills and the shared memory is there."""
        return self.stack == 0 and self.shared <= SHARED_MEMORY[self.capability]


def compile_launch(launch: Launch, capability: int, case: str = "", config: str = "") -> Compiled:
    """Compile a launch as the JIT would for its arguments, all pointers aligned."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, TensorDescriptor):
            tile = ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype].removeprefix('*')}[{tile}]>"
            continue
        pointer = isinstance(value, torch.Tensor)
        one = not pointer and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = TYPES[value.dtype] if pointer else "i32" if abs(value) < 2**31 else "i64"
        if pointer or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(place,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True},
    )
    registers, stack = _resources(binary.asm["cubin"])
    counts = {name: binary.asm["ptx"].count(text) for name, text in INSTRUCTIONS.items()}
    name = launch.kernel.__name__.removesuffix("_kernel")
    return Compiled(name, case, config, capability, registers, stack, binary.metadata.shared, counts)


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Ahead(Case):
    """A case on a device that is not there."""

    target: Device

    @property
    def device(self) -> Device:
        return self.target


def launches(
    op: str, dtype: torch.dtype, block: tuple[int, int], tokens: int, capability: int = 90, limit: int = MEASURED
) -> Iterator[tuple[str, str, Launch]]:
    """The configurations that tuning would measure for a case, best guess first: ``(case, configuration, launch)``."""
    shape, (height, width) = (1024, 1024), block
    blocks = torch.rand(shape[0] // height, shape[1] // width, generator=torch.Generator().manual_seed(0)) < DENSITY
    matrix = BSRMatrix.from_dense(blocks.repeat_interleave(height, 0).repeat_interleave(width, 1).float(), block)
    plan = plan_of(matrix.crow_indices, matrix.col_indices, matrix.nnz, *matrix.grid)
    values = torch.empty(matrix.values.shape, dtype=dtype, device="meta")
    x = torch.empty(tokens, shape[1], dtype=dtype, device="meta")
    operand = Operand(values, plan, shape, transposed=op == "grad_input")
    device = replace(H100, capability=capability, shared_memory=SHARED_MEMORY[capability])
    case = Ahead(op, x, plan, shape, block if op == "grad_values" else operand.block, device)
    bias, follows = (None, "none") if op == "grad_input" else (x[0], "gelu")
    for config in (sampled_configs if op == "grad_values" else product_configs)(case)[:limit]:
        if op == "grad_values":
            found = sampled.launches(x, x, values, plan, shape, config)
        else:
            engine = decode if config.engine == "decode" else product
            found = engine.launches(x, operand, x, None, bias, None, follows, config)
        name = f"{op} {str(dtype).removeprefix('torch.')} {height}×{width}, {tokens} tokens"
        how = f"{config.m}×{config.n}×{config.k}, {config.warps} warps, {config.stages} stages"
        how += ", turned" * config.turned + ", described" * config.described
        yield name, how, found[0]


def mask_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch]]:
    """The mask side, for a 3072 × 768 weight in tiles of 32."""
    weight = torch.empty(3072, 768, dtype=dtype, device="meta")
    scores = torch.empty(96, 24, dtype=dtype, device="meta")
    mask = scores.bool()
    name = f"masks {str(dtype).removeprefix('torch.')} 32×32"
    yield name, "threshold", masks.threshold_launch(scores, mask, 100)
    yield name, "mask", masks.mask_launch(weight, mask, weight, (32, 32))
    yield name, "gradient", masks.gradient_launch(weight, weight, mask, weight, scores.float(), (32, 32))


def gradient_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch]]:
    """The activation's gradient, and the sum of parts that follows it, of 4096 tokens and 3072 features."""
    z = torch.empty(4096, 3072, dtype=dtype, device="meta")
    for launch in activation.launches(z, z, z, z[0], "gelu"):
        yield f"activation gradient {str(dtype).removeprefix('torch.')}", launch.kernel.__name__, launch


def everything(capability: int) -> Iterator[tuple[str, str, Launch]]:
    """What the table holds."""
    for dtype, block, tokens in itertools.product(DTYPES, BLOCKS, TOKENS):
        for op in ("linear", "grad_input", "grad_values"):
            if op != "grad_values" or tokens == max(TOKENS):
                yield from launches(op, dtype, block, tokens, capability, MEASURED if tokens == max(TOKENS) else 2)
    for dtype in DTYPES:
        yield from mask_launches(dtype)
        yield from gradient_launches(dtype)


def table(rows: Sequence[Compiled]) -> str:
    """The results in Markdown, one line a kernel."""
    lines = [
        "| target | case | configuration | registers | spilled bytes | shared bytes | tensor-core instructions |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        counts = ", ".join(f"{count} {name}" for name, count in row.instructions.items() if count) or "none"
        numbers = f"{row.registers} | {row.stack} | {row.shared}"
        lines.append(f"| sm_{row.capability} | {row.case} | {row.config} | {numbers} | {counts} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything, write the table, and fail if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description="Compile every kernel with no GPU and say what became of it.")
    parser.add_argument("--capabilities", type=int, nargs="+", default=sorted(SHARED_MEMORY))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compiled")
    args = parser.parse_args(argv)
    rows = []
    for capability in args.capabilities:
        for case, config, launch in everything(capability):
            rows.append(compile_launch(launch, capability, case, config))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    bad = [row for row in rows if not row.fits]
    versions = f"Triton {triton.__version__}, torch {torch.__version__}"
    summary = f"{len(rows)} kernels, {len(bad)} that spill or do not fit. {versions}."
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    args.output.with_suffix(".md").write_text(f"# Compiled kernels\n\n{summary}\n\n{table(rows)}\n")
    print(summary)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())

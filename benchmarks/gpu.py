"""All GPU tests, then the benchmarks, each verified before it is timed. From a bare checkout:

PYTHONPATH=src python benchmarks/gpu.py [--fast] [--seconds 420] [--output benchmarks/results/gpu]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
SECONDS, FAST_SECONDS = 420.0, 180.0


def parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    parser = argparse.ArgumentParser(description="Check the GPU kernels, then time them.")
    parser.add_argument("--fast", action="store_true", help="fewer shapes, no ViT-H")
    parser.add_argument("--seconds", type=float, help="after which no new measurement starts (420, or 180 with --fast)")
    parser.add_argument("--tune-seconds", type=float, default=120.0, help="spent on tuning, of all")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny operands, interpreted on the CPU: tests the script"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and write what they found, also when one of them fails."""
    args = parser().parse_args(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA GPU here; --dry-run tests the script itself", file=sys.stderr)
        return 2
    os.environ["SUPERBLOCK_TUNE_SECONDS"] = str(0 if args.dry_run else args.tune_seconds)
    os.environ.setdefault("SUPERBLOCK_TUNE_FILE", f"{args.output}-tuned.json")
    import gpu_checks
    import gpu_stages
    from gpu_timing import Bench

    if args.dry_run:
        from superblock.ops import cuda, library

        library.select = lambda *_: cuda
    seconds = args.seconds or (FAST_SECONDS if args.fast else SECONDS)
    device = "cpu" if args.dry_run else "cuda"
    bench = Bench(device, args.dry_run, args.fast, time.monotonic() + seconds)
    torch.manual_seed(0)
    try:
        for stage in (
            gpu_checks.check, gpu_stages.peaks, gpu_stages.products, gpu_stages.training, gpu_stages.decoding,
            gpu_stages.transformers, gpu_stages.mask_overhead, gpu_stages.more_products, gpu_stages.tuned_torch_product,
        ):  # fmt: skip
            stage(bench)
    finally:
        words = sys.argv[1:] if argv is None else argv
        write(args.output, bench.rows, {**describe(device), "command": shlex.join(["benchmarks/gpu.py", *words])})
    return 0


def describe(device: str) -> dict[str, Any]:
    """Device, driver and versions."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        found |= {"device": properties.name, "driver": driver, "multiprocessors": properties.multi_processor_count}
    return {**found, "date": time.strftime("%Y-%m-%d")}


def write(output: Path, rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """One JSON file and one Markdown file, a table a stage."""
    from gpu_timing import cell

    output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    lines = ["# GPU benchmarks", "", ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        columns = list(dict.fromkeys(key for row in own for key in row if key != "stage"))
        lines += [f"## {stage}", "", f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
        lines += [f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |" for row in own]
        lines.append("")
    Path(f"{output}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())

"""``superblock demo``: the whole path on handwritten digits, then the model card's benchmark on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from superblock import demo
from superblock.cli import benchmark
from superblock.cli.options import Parser
from superblock.errors import ConfigError
from superblock.files import check_writable
from superblock.threads import check_threads

MODEL_CARD = "--device cpu --sparsity-linear 0.8 --sp-linear-tile-size 64 --sparsify-weights --bsr 64 --compare dense"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="superblock demo",
        description="Train a small ViT on handwritten digits, dense and at 80 and 90 %% sparsity, fold, convert, "
        "evaluate and time every form; then time ViT-B/16, dense against 80 %% sparse. Minutes on a CPU.",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=demo.EPOCHS, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--benchmark-model", default="vit_b_16", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--benchmark-batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    for name in ("epochs", "benchmark_batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    check_threads(args.threads)
    check_writable(args.output_dir / "demo.json")
    demo.run(args.output_dir, epochs=args.epochs, seed=args.seed, threads=args.threads, say=_say)
    print()
    results = args.output_dir / "benchmark.json"
    threads = ["--threads", str(args.threads)] if args.threads else []
    sizes = ["--model", args.benchmark_model, "--batch-size", str(args.benchmark_batch_size), "--seed", str(args.seed)]
    benchmark.main([*sizes, *MODEL_CARD.split(), "--json", str(results), *threads])
    print()
    print("\n".join(demo.summary(args.output_dir, json.loads(results.read_text(encoding="utf-8")))))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)

"""Speed-up against sparsity from the results of benchmarks/linear.py, a line per block size.

python benchmarks/plot.py [--results benchmarks/results/linear.json] [--shape 768x3072] [--output docs/cpu-speedup.svg]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/linear.json")
    options.add_argument("--shape", default="768x3072", help="in x out")
    options.add_argument("--tokens", type=int, default=1576)
    options.add_argument("--output", type=Path, default=ROOT / "docs/cpu-speedup.svg")
    args = options.parse_args()
    in_, out = map(int, args.shape.split("x"))
    results = json.loads(args.results.read_text())
    rows = [row for row in results["rows"] if (row["in"], row["out"], row["tokens"]) == (in_, out, args.tokens)]
    if not rows:
        raise SystemExit(f"{args.results} has no rows of {args.shape}, {args.tokens} tokens")
    matplotlib.rcParams |= {"svg.hashsalt": "superblock", "font.size": 9}
    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    figure, panels = pyplot.subplots(1, len(dtypes), figsize=(4 * len(dtypes), 3.2), sharey=True, squeeze=False)
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        draw(panel, [row for row in rows if row["dtype"] == dtype], dtype.removeprefix("torch."))
    panels[0][0].set_ylabel("speed-up over the best dense")
    threads = results["machine"]["threads"]
    figure.suptitle(f"{in_}→{out}, {args.tokens} tokens, {threads} thread{'s' if threads > 1 else ''}")
    figure.tight_layout()
    figure.savefig(args.output, metadata={"Date": None})


def draw(panel: Any, rows: list[dict[str, Any]], title: str) -> None:
    """One dtype's lines."""
    sparsities = sorted({row["sparsity"] for row in rows})
    panel.plot(sparsities, [1 / (1 - sparsity) for sparsity in sparsities], "k--", linewidth=1, label="1 / density")
    for block in sorted({row["block"] for row in rows}):
        line = sorted((row["sparsity"], row["speedup"]) for row in rows if row["block"] == block)
        panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"block {block}")
    panel.axhline(1, color="0.7", linewidth=0.8)
    panel.set(title=title, xlabel="sparsity")
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


if __name__ == "__main__":
    main()

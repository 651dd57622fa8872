"""A feed-forward layer (linear, GELU, linear), both weights block-sparse: fused, as two products, and dense.

python benchmarks/mlp.py [--width 768] [--hidden 3072] [--tokens 197 1576] [--output benchmarks/results/mlp.json]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import compete, dtypes_of, parser, prepare, random_matrix, verify, write

from superblock import BSRMatrix, bsr_linear
from superblock.ops.cpu import Weight, feed_forward


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--hidden", type=int, default=3072)
    options.add_argument("--tokens", nargs="+", type=int, default=[197, 1576])
    args = prepare(options.parse_args())
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for dtype in dtypes_of(args):
            for tokens in args.tokens:
                for block in args.blocks:
                    for sparsity in args.sparsities:
                        rows.append(case(args, dtype, tokens, block, sparsity))
    write(args, "mlp", rows)


def arguments(matrix: BSRMatrix, bias: torch.Tensor) -> Weight:
    """A matrix as the core's feed-forward takes it."""
    return matrix.values, matrix.crow_indices, matrix.col_indices, bias, *matrix.shape


def case(args: Any, dtype: torch.dtype, tokens: int, block: int, sparsity: float) -> dict[str, Any]:
    """One shape: the three ways in one race."""
    up = random_matrix(args.hidden, args.width, block, sparsity, dtype)
    down = random_matrix(args.width, args.hidden, block, sparsity, dtype)
    x, b1, b2 = (torch.randn(*shape).to(dtype) for shape in ((tokens, args.width), (args.hidden,), (args.width,)))
    w1, w2 = up.to_dense(), down.to_dense()
    contestants = {
        "dense": lambda: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        "two products": lambda: bsr_linear(bsr_linear(x, up, b1, "gelu"), down, b2),
        "fused": lambda: feed_forward(x, arguments(up, b1), "gelu", arguments(down, b2)),
    }
    if args.compiled:
        compiled = torch.compile(contestants["dense"])
        contestants["compiled"] = lambda: compiled()
    for name in ("two products", "fused"):
        verify(contestants[name](), contestants["dense"](), name)
    times = compete(contestants, args)
    two, fused = (times[name]["median_ms"] for name in ("two products", "fused"))
    dense = min(times[name]["median_ms"] for name in ("dense", "compiled") if name in times)
    print(
        f"{dtype} {args.width}→{args.hidden}→{args.width} {tokens} tokens, block {block}, {sparsity:.0%}: "
        f"dense {dense:.2f} ms, two products {dense / two:.1f}×, fused {dense / fused:.1f}×",
        flush=True,
    )
    return {"dtype": str(dtype), "tokens": tokens, "block": block, "sparsity": sparsity, "times": times}


if __name__ == "__main__":
    main()

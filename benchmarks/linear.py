"""One block-sparse linear layer against torch's dense one.

python benchmarks/linear.py [--shapes 768x3072 4096x4096] [--tokens 1 197 1576] [--output results.json]

Every line: milliseconds (median), GFLOP/s on the non-zeros, share of the roofline, speed-up over the best dense.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import ceilings, compete, dtypes_of, parser, prepare, random_matrix, verify, write

from superblock import bsr_linear


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--shapes", nargs="+", default=["768x3072", "3072x768"], help="in x out")
    options.add_argument("--tokens", nargs="+", type=int, default=[197, 1576])
    options.add_argument("--torch-bsr", action="store_true", help="let torch's own BSR product compete (float32)")
    args = prepare(options.parse_args())
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for dtype in dtypes_of(args):
            ceiling = ceilings(dtype, args.clock)
            print(f"{dtype}: {ceiling.gflops:.0f} GFLOP/s, {ceiling.bandwidth:.1f} GB/s, {args.threads} threads")
            for shape in args.shapes:
                in_, out = map(int, shape.split("x"))
                for tokens in args.tokens:
                    for block in args.blocks:
                        rows += case(args, dtype, ceiling, in_, out, tokens, block)
    write(args, "linear", rows)


def case(
    args: Any, dtype: torch.dtype, ceiling: Any, in_: int, out: int, tokens: int, block: int
) -> list[dict[str, Any]]:
    """All sparsities of one shape and block, in one race."""
    x, bias = torch.randn(tokens, in_).to(dtype), torch.randn(out).to(dtype)
    matrices = {sparsity: random_matrix(out, in_, block, sparsity, dtype) for sparsity in args.sparsities}
    dense = next(iter(matrices.values())).to_dense()
    contestants = {"dense": lambda: F.linear(x, dense, bias)}
    if args.compiled:
        compiled = torch.compile(F.linear)
        contestants["compiled"] = lambda: compiled(x, dense, bias)
    for sparsity, matrix in matrices.items():
        verify(bsr_linear(x, matrix, bias), F.linear(x, matrix.to_dense(), bias), f"{sparsity:.0%}")
        contestants[f"{sparsity}"] = lambda matrix=matrix: bsr_linear(x, matrix, bias)
    if args.torch_bsr and dtype == torch.float32:
        sparse = matrices[args.sparsities[0]].to_torch()
        contestants["torch BSR"] = lambda: F.linear(x, sparse, bias)
    times = compete(contestants, args)
    best = min(times[name]["median_ms"] for name in ("dense", "compiled") if name in times)
    rows = []
    for sparsity, matrix in matrices.items():
        taken = times[f"{sparsity}"]["median_ms"]
        flops = 2 * tokens * matrix.values.numel()
        moved = (tokens * (in_ + out)) * x.element_size() + matrix.nbytes
        share = ceiling.seconds(flops, moved) * 1e3 / taken
        rows.append(
            {"dtype": str(dtype), "in": in_, "out": out, "tokens": tokens, "block": block, "sparsity": sparsity}
            | {"gflops": flops / taken * 1e-6, "roofline": share, "speedup": best / taken, "dense_ms": best}
            | times[f"{sparsity}"]
        )
        print(
            f"{dtype} {in_}→{out} {tokens} tokens, block {block}, {sparsity:.0%}: {taken:.2f} ms, "
            f"{rows[-1]['gflops']:.0f} GFLOP/s, {share:.0%} of the roofline, {best / taken:.1f}×",
            flush=True,
        )
    if "torch BSR" in times:
        print(f"  torch BSR at {args.sparsities[0]:.0%}: {best / times['torch BSR']['median_ms']:.2f}× of dense")
    return rows


if __name__ == "__main__":
    main()

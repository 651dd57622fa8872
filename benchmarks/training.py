"""One training step, forward and backward, of a feed-forward layer with a fixed mask, against the dense one.

python benchmarks/training.py [--tokens 1576] [--output benchmarks/results/training.json]
"""

from __future__ import annotations

from typing import Any

import torch
from harness import compete, dtypes_of, parser, prepare, random_matrix, verify, write
from torch import Tensor, nn

from superblock.feed_forward import fuse_feed_forward
from superblock.fuse import fuse_activations
from superblock.nn import BSRLinear


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--hidden", type=int, default=3072)
    options.add_argument("--tokens", type=int, default=1576)
    args = prepare(options.parse_args())
    rows = [
        case(args, dtype, block, sparsity)
        for dtype in dtypes_of(args)
        for block in args.blocks
        for sparsity in args.sparsities
    ]
    write(args, "training", rows)


def case(args: Any, dtype: torch.dtype, block: int, sparsity: float) -> dict[str, Any]:
    """One block and sparsity: both steps in one race."""
    matrices = [
        random_matrix(args.hidden, args.width, block, sparsity, dtype),
        random_matrix(args.width, args.hidden, block, sparsity, dtype),
    ]
    biases = [torch.randn(matrix.shape[0]).to(dtype).requires_grad_() for matrix in matrices]
    up, down = (BSRLinear(matrix, bias) for matrix, bias in zip(matrices, biases, strict=True))
    sparse = nn.Sequential(up, nn.GELU(), down)
    fuse_activations(sparse)
    fuse_feed_forward(sparse)  # As `to_bsr` leaves it.
    dense = nn.Sequential(nn.Linear(args.width, args.hidden), nn.GELU(), nn.Linear(args.hidden, args.width)).to(dtype)
    for layer, matrix, bias in zip((dense[0], dense[2]), matrices, biases, strict=True):
        layer.weight, layer.bias = nn.Parameter(matrix.to_dense()), nn.Parameter(bias)
    x = torch.randn(args.tokens, args.width).to(dtype).requires_grad_()
    upstream = torch.randn(args.tokens, args.width).to(dtype)

    def step(model: nn.Module) -> Tensor:
        model.zero_grad()
        x.grad = None
        model(x).backward(upstream)
        assert x.grad is not None
        return x.grad

    verify(step(sparse), step(dense), "the gradient of x")
    contestants = {"dense": lambda: step(dense), "sparse": lambda: step(sparse)}
    if args.compiled:
        compiled = torch.compile(dense)
        contestants["compiled"] = lambda: step(compiled)
    times = compete(contestants, args)
    best = min(times[name]["median_ms"] for name in ("dense", "compiled") if name in times)
    ratio = best / times["sparse"]["median_ms"]
    print(f"{dtype} block {block}, {sparsity:.0%}: {times['sparse']['median_ms']:.1f} ms, {ratio:.1f}×", flush=True)
    return {"dtype": str(dtype), "block": block, "sparsity": sparsity, "speedup": ratio, "times": times}


if __name__ == "__main__":
    main()

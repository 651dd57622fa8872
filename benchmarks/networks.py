"""Whole networks, block-sparse against dense, in inference: random tiles of every layer named below are zero.

python benchmarks/networks.py [--networks resnet50 vit_b_16] [--batch 16 1] [--output benchmarks/results/networks.json]
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from harness import compete, dtypes_of, parser, prepare, verify, write
from torch import nn

import superblock as sb
from superblock import models
from superblock.benchmarking import is_convolutional

# What is sparse: every linear layer of a transformer, every convolution but the stem of a residual network.
CASES = {
    "vit_b_16": [(0.8, 64), (0.9, 64), (0.9, 32)],
    "resnet50": [(0.8, 16), (0.9, 16)],
}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    options.add_argument("--batch", nargs="+", type=int, default=[16])
    options.add_argument("--scope", choices=["all", "mlp"], default="all", help="mlp: attention stays dense")
    args = prepare(options.parse_args())
    with torch.inference_mode():
        rows = [
            case(args, dtype, network, batch, sparsity, tile)
            for dtype in dtypes_of(args)
            for network in args.networks
            for sparsity, tile in CASES[network]
            if sparsity in args.sparsities and tile in args.blocks
            for batch in args.batch
        ]
    write(args, "networks", rows)


def case(args: Any, dtype: torch.dtype, network: str, batch: int, sparsity: float, tile: int) -> dict[str, Any]:
    """One network: ours and torch's, each in the memory format that is best for it, in one race."""
    dense, sparse = forms(network, dtype, sparsity, tile, args.scope)
    x = torch.randn(batch, 3, 224, 224).to(dtype)
    if is_convolutional(dense):
        dense, x = dense.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    contestants = {"dense": lambda: dense(x), "sparse": lambda: sparse(x)}
    times = compete(contestants, args)
    ratio = times["dense"]["median_ms"] / times["sparse"]["median_ms"]
    print(
        f"{dtype} {network}, batch {batch}, {sparsity:.0%} of tiles of {tile}: "
        f"{times['sparse']['median_ms']:.0f} ms, dense {times['dense']['median_ms']:.0f} ms, {ratio:.2f}×",
        flush=True,
    )
    shared = {"dtype": str(dtype), "network": network, "batch": batch, "tile": tile, "sparsity": sparsity}
    shared |= {"scope": args.scope}
    return {**shared, "speedup": ratio, "times": times}


def forms(
    network: str, dtype: torch.dtype, sparsity: float, tile: int, scope: str = "all"
) -> tuple[nn.Module, nn.Module]:
    """The network dense, zero tiles included, and converted: they compute the same."""
    torch.manual_seed(0)
    model = models.build(network).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    tiles = sb.TileSparsity(sparsity, tile)
    linear = network.startswith("vit")
    kinds = {"linear": tiles, "scope": scope} if linear else {"conv1x1": tiles, "conv": tiles, "exclude": ("conv1",)}
    sb.apply_supermask(model, sb.SupermaskConfig(**kinds))  # type: ignore[arg-type]
    sb.sparsify_weights(model)
    dense, sparse = copy.deepcopy(model).to(dtype), model.to(dtype)
    sb.to_bsr(sparse)
    image = torch.randn(1, 3, 224, 224).to(dtype)
    verify(sparse(image), dense(image), network)
    return dense, sparse


if __name__ == "__main__":
    main()

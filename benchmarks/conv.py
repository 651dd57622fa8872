"""A block-sparse convolution over channels-last images against torch's dense one.

python benchmarks/conv.py [--training] [--batch 16] [--output benchmarks/results/conv.json]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import compete, dtypes_of, parser, prepare, verify, write
from torch import Tensor

from superblock.ops.conv2d import bsr_conv2d
from superblock.ops.convolution import matrix_of
from superblock.ops.layout import feature_major

# (channels, out, size, kernel, stride): what ResNet-50 is made of.
LAYERS = [(64, 64, 56, 3, 1), (128, 128, 28, 3, 1), (256, 256, 14, 3, 1), (512, 512, 7, 3, 1), (256, 64, 56, 1, 1)]
LAYERS += [(64, 256, 56, 1, 1), (1024, 256, 14, 1, 1), (256, 1024, 14, 1, 1), (512, 1024, 28, 1, 2)]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--training", action="store_true", help="time a step, forward and backward")
    args = prepare(options.parse_args())
    with torch.inference_mode(not args.training):
        rows = [
            case(args, dtype, layer, block, sparsity)
            for dtype in dtypes_of(args)
            for layer in LAYERS
            for block in args.blocks
            for sparsity in args.sparsities
        ]
    write(args, "conv-training" if args.training else "conv", rows)


def case(args: Any, dtype: torch.dtype, layer: tuple[int, ...], block: int, sparsity: float) -> dict[str, Any]:
    """One layer: ours and torch's in one race."""
    channels, out, size, kernel, stride = layer
    tiles = torch.zeros(out // block, channels // block)
    tiles.view(-1)[torch.randperm(tiles.numel())[: max(1, round((1 - sparsity) * tiles.numel()))]] = 1
    living = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)
    weight = torch.randn(out, channels, kernel, kernel) * living[:, :, None, None]
    weight = (weight / (channels * kernel * kernel) ** 0.5).to(dtype).to(memory_format=torch.channels_last)
    matrix, padding = matrix_of(weight, block), kernel // 2
    values, indices = feature_major(matrix.values), (matrix.crow_indices, matrix.col_indices)
    x = torch.randn(args.batch, channels, size, size).to(dtype).to(memory_format=torch.channels_last)
    contestants: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.conv2d(x, weight, None, stride, padding),
        "sparse": lambda: bsr_conv2d(
            x, values, *indices, None, None, tuple(weight.shape), (stride, stride), (padding, padding)
        ),
    }
    if args.training:
        leaves = {"dense": (x.requires_grad_(), weight.requires_grad_()), "sparse": (x, values.requires_grad_())}
        upstream = torch.randn_like(contestants["dense"]().detach())
        contestants = {name: training_step(call, leaves[name], upstream) for name, call in contestants.items()}
    verify(contestants["sparse"](), contestants["dense"](), "sparse")
    times = compete(contestants, args)
    ratio = times["dense"]["median_ms"] / times["sparse"]["median_ms"]
    print(
        f"{dtype} {channels}→{out}, {size}×{size}, kernel {kernel}, stride {stride}, block {block}, {sparsity:.0%}: "
        f"{times['sparse']['median_ms']:.2f} ms, {ratio:.1f}×",
        flush=True,
    )
    return {"dtype": str(dtype), "layer": layer, "block": block, "sparsity": sparsity, "speedup": ratio, "times": times}


def training_step(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], upstream: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; gives the gradient of the images."""
    return lambda: torch.autograd.grad(forward(), leaves, upstream)[0]


if __name__ == "__main__":
    main()

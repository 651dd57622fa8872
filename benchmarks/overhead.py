"""What a call of one small layer costs over the native core's own time.

python benchmarks/overhead.py [--width 768] [--tokens 1] [--output benchmarks/results/overhead.json]

Every line: microseconds of the calling thread (median over the rounds of the mean of a round) by way of calling.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import parser, prepare, random_matrix, verify, write

from superblock import bsr_linear
from superblock.nn import BSRLinear
from superblock.ops import cpu, native, prepared

CALLS = 500


def main() -> None:
    options = parser(__doc__ or "")
    options.set_defaults(clock="cpu", iterations=31)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--tokens", type=int, default=1)
    args = prepare(options.parse_args())
    with torch.inference_mode():
        times = case(args)
    for name, taken in times.items():
        print(f"{name}: {taken:.1f} µs, {taken - times['native call']:.1f} over the native call")
    row = {"width": args.width, "tokens": args.tokens, "block": 64, "sparsity": 0.9, "microseconds": times}
    write(args, "overhead", [row])


def case(args: argparse.Namespace) -> dict[str, float]:
    """Every way to call one float32 layer, block 64, 90 % sparse, timed in turn."""
    width = args.width
    matrix = random_matrix(width, width, 64, 0.9, torch.float32)
    with torch.inference_mode(False):
        bias = torch.randn(width)
        layer = BSRLinear(matrix, bias).eval()
    dense, x = matrix.to_dense(), torch.randn(args.tokens, width)
    weight = matrix.values, matrix.crow_indices, matrix.col_indices, bias
    product = prepared.product_of(prepared.prepare(*weight, (width, width), "none"), args.tokens)
    y, tensors = torch.empty(args.tokens, width), (*weight, None, width, width, "none")
    product.x, product.x_stride = x.data_ptr(), width
    product.y, product.y_stride = y.data_ptr(), width
    ways: dict[str, Callable[[], object]] = {
        "native call": partial(native.library().sb_run_product, ctypes.byref(product)),
        "backend (ops.cpu.linear)": partial(cpu.linear, x, *tensors),
        "dispatcher (torch.ops)": partial(torch.ops.superblock.bsr_linear, x, *tensors),
        "function (bsr_linear)": partial(bsr_linear, x, matrix, bias),
        "layer (BSRLinear)": partial(layer, x),
        "dense F.linear": partial(F.linear, x, dense, bias),
    }
    verify(layer(x), F.linear(x, dense, bias), "the layer")
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.iterations):
        for name, call in ways.items():
            began = time.thread_time()
            for _ in range(CALLS):
                call()
            samples[name].append((time.thread_time() - began) / CALLS * 1e6)
    return {name: statistics.median(taken) for name, taken in samples.items()}


if __name__ == "__main__":
    main()

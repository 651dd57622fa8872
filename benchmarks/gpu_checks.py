"""What ``benchmarks/gpu.py`` checks before it times: every kernel, and what only a GPU can show."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
import triton_cases as cases
from gpu_timing import Bench, verify
from torch import Tensor

from superblock import BSRMatrix, bsr_linear
from superblock.ops.triton import product, sampled
from superblock.ops.triton.configs import Case, product_configs, sampled_configs
from superblock.ops.triton.plans import Operand, plan_of
from superblock.ops.tuning import MEASURED

BF16, FP32 = torch.bfloat16, torch.float32


def check(bench: Bench) -> None:
    """Run every check: compiling takes most of the time, so on a GPU they are shared out over processes."""
    places = range(len(checks(bench)))
    if bench.dry:
        for place in places:
            _run(bench, place)
    else:
        processes = min(16, os.cpu_count() or 1)
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            list(pool.map(partial(_run, bench), places))
    bench.add("check", "all kernels against float64", passed=len(places))


def _run(bench: Bench, place: int) -> None:
    torch.manual_seed(0)
    checks(bench)[place]()


def checks(bench: Bench) -> list[Callable[[], object]]:
    """Every kernel against float64, and what only a GPU can show: graphs, streams, compiled graphs, big offsets."""
    known = (FP32, torch.float16) if bench.dry else cases.DTYPES  # The interpreter multiplies no bfloat16.
    products = list(itertools.product(cases.PRODUCTS, (False, True)))[: 4 if bench.dry else None]
    found: list[Callable[[], object]] = []
    for place, (case, transposed) in enumerate(products):
        activation = cases.ACTIVATIONS[place % len(cases.ACTIVATIONS)]
        dtype = known[place % len(known)]
        found.append(partial(cases.check_product, case, dtype, transposed, activation, bench.device))
    for case, dtype in itertools.product(cases.SAMPLED[: 1 if bench.dry else None], known):
        found.append(partial(cases.check_sampled, case, dtype, bench.device))
    for place, (shape, tile) in enumerate(cases.MASKS):
        found.append(partial(cases.check_masks, shape, tile, cases.DTYPES[place % len(cases.DTYPES)], bench.device))
    for place, activation in enumerate(cases.ACTIVATIONS):
        dtype = known[place % len(known)]
        found.append(partial(cases.check_activation_gradient, (3, 50), activation, dtype, bench.device))
    for op, side in itertools.product(("linear", "grad_input", "grad_values"), (32,) if bench.dry else (64, 32)):
        found.append(partial(_every_configuration, op, side, bench))
    if not bench.dry:
        for tokens in ((40,), (3, 5), (1,), (0,), ()):
            found.append(partial(cases.check_backend, tokens, 0.4, BF16, bench.device))
        for only_here in (_graph, _streams, _compiled, _autocast, _far_offsets, _deterministic):
            found.append(partial(only_here, bench))
    return found


def _layer(bench: Bench, tokens: int = 512, side: int = 512, dtype: torch.dtype = BF16) -> tuple[Tensor, BSRMatrix]:
    return torch.randn(tokens, side, device=bench.device, dtype=dtype), random_weight(
        (side, side), 64, 0.8, bench, dtype
    )


def _graph(bench: Bench) -> None:
    x, weight = _layer(bench)
    bsr_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bsr_linear(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    verify("a replayed graph", y, x.double() @ weight.to_dense().double().mT)


def _streams(bench: Bench) -> None:
    x, weight = _layer(bench)
    want = x.double() @ weight.to_dense().double().mT
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(bsr_linear(x, weight))
    torch.cuda.synchronize()
    for y in results:
        verify("several streams", y, want)


def _compiled(bench: Bench) -> None:
    x, weight = _layer(bench)

    def step(x: Tensor, values: Tensor) -> Tensor:
        index = weight.crow_indices, weight.col_indices
        return torch.ops.superblock.bsr_linear(x, values, *index, None, None, *weight.shape, "gelu").square().mean()

    values = weight.values.requires_grad_()
    got, want = (
        torch.autograd.grad(function(x, values), values)[0] for function in (torch.compile(step, fullgraph=True), step)
    )
    verify("torch.compile", got, want, 2e-2)


def _autocast(bench: Bench) -> None:
    x, weight = _layer(bench, dtype=FP32)
    with torch.autocast("cuda", BF16):
        y = bsr_linear(x, weight)
    assert y.dtype == BF16
    verify("autocast", y, x.double() @ weight.to_dense().double().mT, 1e-2)


def _far_offsets(bench: Bench) -> None:
    """Offsets beyond 32 bits, where memory allows them."""
    tokens, side = 2**20 + 7, 4096
    if bench.fast or torch.cuda.mem_get_info()[0] < 30 * 2**30:
        return
    x = torch.empty(tokens, side, device=bench.device, dtype=BF16).normal_()
    weight = random_weight((side, side), 64, 0.98, bench, BF16)
    y = bsr_linear(x, weight)
    verify("far tokens", y[-100:], x[-100:].double() @ weight.to_dense().double().mT)


def _deterministic(bench: Bench) -> None:
    x, weight = _layer(bench, 4096)
    arguments = (x, x, weight.crow_indices, weight.col_indices, *weight.shape, 64, 64)
    first, second = (torch.ops.superblock.bsr_grad_values(*arguments) for _ in range(2))
    assert torch.equal(first, second)


def _every_configuration(op: str, side: int, bench: Bench) -> None:
    """All that tuning may choose for a product of many tokens."""
    tokens, width, dtype = (70, 128, FP32) if bench.dry else (4000, 1024, BF16)
    shape, block = (width, width), (side, side)
    weight = random_weight(shape, side, 0.8, bench, dtype)
    plan = plan_of(weight.crow_indices, weight.col_indices, weight.nnz, *weight.grid)
    x, grad = (torch.randn(tokens, width, device=bench.device, dtype=dtype) for _ in range(2))
    case, dense = Case(op, x, plan, shape, block), weight.to_dense().double()
    if op == "grad_values":
        full = BSRMatrix(weight.crow_indices, weight.col_indices, torch.ones_like(weight.values), shape).to_dense()
        want = (grad.double().mT @ x.double()) * full
    else:
        want = x.double() @ (dense if op == "grad_input" else dense.mT)
    options = (sampled_configs if op == "grad_values" else product_configs)(case)[:MEASURED]
    for config in options:
        with cases.nan_filled():
            out = torch.empty_like(weight.values if op == "grad_values" else x)
            if op == "grad_values":
                found = sampled.launches(grad, x, out, plan, shape, config)
            else:
                operand = Operand(weight.values, plan, shape, transposed=op == "grad_input")
                found = product.launches(x, operand, out, None, None, None, "none", config)
            for launch in found:
                launch.run()
        got = out if op != "grad_values" else BSRMatrix(weight.crow_indices, weight.col_indices, out, shape).to_dense()
        verify(f"{op} {config}", got, want)


def random_weight(shape: tuple[int, int], block: int, sparsity: float, bench: Bench, dtype: torch.dtype) -> BSRMatrix:
    """Random blocks, exactly as many as the sparsity says."""
    rows, columns = -(-shape[0] // block), -(-shape[1] // block)
    live = torch.randperm(rows * columns)[: max(1, round((1 - sparsity) * rows * columns))].sort().values
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(live // columns, minlength=rows).cumsum(0)
    values = torch.randn(len(live), block, block, device=bench.device).div_(shape[1] ** 0.5).to(dtype)
    return BSRMatrix(crow.to(bench.device), (live % columns).int().to(bench.device), values, shape)

"""What ``benchmarks/gpu.py`` times: products, training, decoding, vision transformers, masks."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_checks import random_weight
from gpu_timing import Bench, verify
from torch import Tensor, nn
from torch.nn.utils import parametrize

from superblock import BSRMatrix, SupermaskConfig, TileSparsity, apply_supermask, bsr_linear, sparsify_weights, to_bsr
from superblock.ops.triton.plans import plan_of

BF16, FP32 = torch.bfloat16, torch.float32
# name, shape, tokens
SHAPES = (
    ("4096", (4096, 4096), 16384),
    ("ViT-B", (3072, 768), 50432),
    ("ViT-L", (4096, 1024), 50432),
    ("Llama-8B", (14336, 4096), 8192),
    ("Llama-8B down", (4096, 14336), 8192),
    ("4096, 64k", (4096, 4096), 65536),
)
MOST_WANTED = 9  # of the products: the others wait until the other stages are done
SPARSITIES = {64: (0.4, 0.8, 0.9), 128: (0.25, 0.8, 0.9), 32: (0.65, 0.8, 0.9)}


def peaks(bench: Bench) -> None:
    """What cuBLAS reaches here: the measure of every fraction."""
    side = 32 if bench.dry else 8192
    for dtype in (BF16, FP32):
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        time = bench.contest({"dense": lambda a=a, b=b: a @ b})["dense"]
        bench.peaks[str(dtype)] = 2 * side**3 / time / 1e9
        bench.add("peak", f"{dtype} {side}³", ms=time, tflops=bench.peaks[str(dtype)])


def product_cases(bench: Bench) -> list[tuple[str, tuple[int, int], int, int, float]]:
    """``(name, shape, tokens, block, sparsity)``, the most wanted first."""
    if bench.dry:
        return [("tiny", (64, 64), 32, 32, 0.5), ("tiny", (64, 64), 40, 32, 0.5)]
    found = [(*case, 64, sparsity) for case in SHAPES[:3] for sparsity in SPARSITIES[64]]
    found += [(*SHAPES[0], block, sparsity) for block in (128, 32) for sparsity in SPARSITIES[block]]
    return found + [(*case, 64, sparsity) for case in SHAPES[3:] for sparsity in SPARSITIES[64]]


def products(bench: Bench) -> None:
    """The most wanted of the products."""
    _products(bench, product_cases(bench)[: 1 if bench.dry else 3 if bench.fast else MOST_WANTED])


def more_products(bench: Bench) -> None:
    """The others, in what time the other stages have left."""
    if not bench.fast:
        _products(bench, product_cases(bench)[1 if bench.dry else MOST_WANTED :])


def _products(bench: Bench, cases: list[tuple[str, tuple[int, int], int, int, float]]) -> None:
    """``act(x Wᵀ + b)`` against cuBLAS, eager and compiled, and torch's own BSR product."""
    compiled = None if bench.dry else torch.compile(lambda x, w, b: F.gelu(F.linear(x, w, b)))
    for name, shape, tokens, block, sparsity in cases:
        if skipped(bench, "product", f"{name}, block {block}, {sparsity:.0%}", 10):
            continue
        weight = random_weight(shape, block, sparsity, bench, BF16 if not bench.dry else FP32)
        dense, x = weight.to_dense(), torch.randn(tokens, shape[1], device=bench.device, dtype=weight.values.dtype)
        bias = torch.randn(shape[0], device=bench.device, dtype=x.dtype)
        some = x[:256].double()
        verify(name, bsr_linear(x, weight, bias)[:256], some @ dense.double().mT + bias.double())
        calls: dict[str, Callable[[], object]] = {
            "cublas": lambda x=x, w=dense, b=bias: F.linear(x, w, b),
            "superblock": lambda x=x, w=weight, b=bias: bsr_linear(x, w, b),
        }
        if compiled and block == 64 and sparsity == 0.8:
            calls["compiled gelu"] = lambda x=x, w=dense, b=bias: compiled(x, w, b)
            calls["superblock gelu"] = lambda x=x, w=weight, b=bias: bsr_linear(x, w, b, "gelu")
        if name == "4096" and block == 64 and not bench.dry:
            calls |= torch_product(bench, x, weight, bias)
        times = bench.contest(calls)
        flops = 2 * tokens * weight.nnz * block * block / times["superblock"] / 1e9
        bench.add(
            "product", f"{name} {shape[0]}×{shape[1]}, {tokens} tokens, block {block}, {sparsity:.0%}", **_ms(times),
            speedup=times["cublas"] / times["superblock"], tflops=flops, of_peak=flops / bench.peaks[str(x.dtype)],
            chosen=chosen(weight),
        )  # fmt: skip


def chosen(weight: BSRMatrix) -> str:
    """The configurations that run a weight's products; ``dense`` where that was measured to be faster."""
    choices = plan_of(weight.crow_indices, weight.col_indices, weight.nnz, *weight.grid).choices.values()
    return ", ".join(sorted({f"{one.engine} {one.m}×{one.n}×{one.k}" if one.m else one.engine for one in choices}))


def torch_product(bench: Bench, x: Tensor, weight: BSRMatrix, bias: Tensor) -> dict[str, Callable[[], object]]:
    """torch's ``bsr_dense_addmm`` as it comes, where it takes the case."""
    theirs = weight.to_torch()
    try:
        F.linear(x, theirs, bias)
    except (RuntimeError, ValueError, AssertionError) as error:
        bench.add("product", "bsr_dense_addmm", refused=str(error).splitlines()[0][:120])
        return {}
    return {"bsr_dense_addmm": lambda: F.linear(x, theirs, bias)}


def tuned_torch_product(bench: Bench) -> None:
    """torch's ``bsr_dense_addmm`` after its own tuning, as far as that gets in a minute."""
    if bench.dry or bench.fast or skipped(bench, "product", "bsr_dense_addmm tuned", 80):
        return
    from torch.sparse._triton_ops_meta import optimize_bsr_dense_addmm

    _, shape, tokens = SHAPES[0]
    weight = random_weight(shape, 64, 0.8, bench, BF16)
    x, bias = (torch.randn(*size, device=bench.device, dtype=BF16) for size in ((tokens, shape[1]), (shape[0],)))

    def stop(*_: object) -> None:
        raise TimeoutError("stopped after a minute")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        optimize_bsr_dense_addmm(shape[0], shape[1], tokens, 64, 64, dtype=BF16, sparsity=0.8, force=True)
    except (RuntimeError, ValueError, AssertionError, TypeError, TimeoutError) as error:
        bench.add("product", "bsr_dense_addmm tuning", stopped=str(error).splitlines()[0][:120])
    finally:
        signal.alarm(0)
    calls = {"superblock": partial(bsr_linear, x, weight, bias), **torch_product(bench, x, weight, bias)}
    bench.add("product", "bsr_dense_addmm tuned, 4096×4096, block 64, 80%", **_ms(bench.contest(calls)))


def training(bench: Bench) -> None:
    """Forward and backward, gradients of activations and weights."""
    side, tokens, block = (64, 32, 32) if bench.dry else (4096, 16384, 64)
    for sparsity in (0.8, 0.9):
        if skipped(bench, "training", f"{sparsity:.0%}", 20):
            continue
        weight = random_weight((side, side), block, sparsity, bench, FP32 if bench.dry else BF16)
        x = torch.randn(tokens, side, device=bench.device, dtype=weight.values.dtype, requires_grad=True)
        dense, values, upstream = (
            weight.to_dense().requires_grad_(),
            weight.values.requires_grad_(),
            torch.randn_like(x),
        )

        def sparse_step(x: Tensor = x, values: Tensor = values, w: BSRMatrix = weight, g: Tensor = upstream) -> object:
            y = torch.ops.superblock.bsr_linear(x, values, w.crow_indices, w.col_indices, None, None, *w.shape, "none")
            return torch.autograd.grad(y, (x, values), g)

        def dense_step(x: Tensor = x, dense: Tensor = dense, upstream: Tensor = upstream) -> object:
            return torch.autograd.grad(F.linear(x, dense), (x, dense), upstream)

        (dx, _), (want, _) = sparse_step(), dense_step()
        verify("dx", dx, want, 1e-2)
        times = bench.contest({"cublas": dense_step, "superblock": sparse_step})
        name = f"forward + backward {side}×{side}, {tokens} tokens, block {block}, {sparsity:.0%}"
        bench.add("training", name, **_ms(times), speedup=times["cublas"] / times["superblock"])


def decoding(bench: Bench) -> None:
    """One token through layer after layer, as a decoder runs them: more weights than the caches hold."""
    layers = 2 if bench.dry else 16
    for shape in ((64, 64),) if bench.dry else ((14336, 4096), (4096, 14336)):
        dtype = FP32 if bench.dry else BF16
        weights = [random_weight(shape, 32 if bench.dry else 64, 0.9, bench, dtype) for _ in range(layers)]
        dense, x = [weight.to_dense() for weight in weights], torch.randn(1, shape[1], device=bench.device, dtype=dtype)
        verify("one token", bsr_linear(x, weights[-1]), x.double() @ dense[-1].double().mT)
        calls = {
            "cublas": lambda x=x, dense=dense: [F.linear(x, w) for w in dense],
            "superblock": lambda x=x, weights=weights: [bsr_linear(x, w) for w in weights],
        }
        times = {name: time / layers for name, time in bench.contest(calls).items()}
        rate = weights[0].values.nbytes / times["superblock"] / 1e6
        name = f"one token {shape[1]} → {shape[0]}, block 64, 90%"
        bench.add("decoding", name, **_ms(times), speedup=times["cublas"] / times["superblock"], gb_per_s=rate)


def transformers(bench: Bench) -> None:
    """Whole vision transformers, every linear layer sparse, encoder blocks compiled, against the compiled dense one."""
    from torchvision.models import VisionTransformer, vit_b_16, vit_h_14

    def tiny() -> nn.Module:
        return VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=16)

    plans = [("ViT-B/16", vit_b_16, BF16, (0.8, 64), (0.9, 64)), ("ViT-B/16", vit_b_16, FP32, (0.8, 64), (0.8, 32))]
    if not bench.fast:
        plans.append(("ViT-H/14", vit_h_14, BF16, (0.8, 64), (0.9, 64)))
    for name, build, dtype, *targets in [("tiny", tiny, FP32, (0.5, 16))] if bench.dry else plans:
        if skipped(bench, "transformer", f"{name} {dtype}", 40):
            continue
        with torch.device(bench.device):
            dense = build().eval()
        images = torch.randn(
            2 if bench.dry else 256, 3, *(2 * [32 if bench.dry else 224]), device=bench.device, dtype=dtype
        )
        models = {"compiled dense": dense}
        for sparsity, tile in targets:
            model = copy.deepcopy(dense)
            apply_supermask(model, SupermaskConfig(linear=TileSparsity(sparsity, tile)))
            sparsify_weights(model)
            folded = copy.deepcopy(model).to(dtype)
            to_bsr(model)
            model.to(dtype)
            with torch.no_grad():
                verify(name, model(images), folded(images), 3e-2 if dtype == BF16 else 1e-3)
            models[f"{sparsity:.0%}/{tile}"] = model
        dense.to(dtype)
        for model in () if bench.dry else models.values():
            for block in model.encoder.layers:
                block.compile()
        with torch.no_grad():
            times = bench.contest({key: partial(model, images) for key, model in models.items()})
        first = times["compiled dense"]
        speedups = {f"speedup {key}": first / time for key, time in times.items() if key != "compiled dense"}
        bench.add("transformer", f"{name}, batch {len(images)}, {dtype}", **_ms(times), **speedups)


def mask_overhead(bench: Bench) -> None:
    """A masked training step of ViT-B/16 over the dense one."""
    from torchvision.models import VisionTransformer, vit_b_16

    if skipped(bench, "mask", "training step", 20):
        return
    with torch.device(bench.device):
        dense = VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=16) if bench.dry else vit_b_16()
    masked = copy.deepcopy(dense)
    apply_supermask(masked, SupermaskConfig(linear=TileSparsity(0.8, 32)))
    batch, side = (2, 32) if bench.dry else (256, 224)
    images = torch.randn(batch, 3, side, side, device=bench.device)
    labels = torch.zeros(batch, dtype=torch.long, device=bench.device)

    def step(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def run() -> None:
            with torch.autocast(torch.device(bench.device).type, BF16), parametrize.cached():
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return run

    times = bench.contest({"dense": step(dense), "masked": step(masked)}, graphs=False)
    bench.add("mask", f"training step, batch {batch}", **_ms(times), overhead=times["masked"] / times["dense"])


def skipped(bench: Bench, stage: str, name: str, seconds: float) -> bool:
    """Whether too little time is left, which the result then says."""
    if bench.left < seconds:
        bench.add(stage, name, skipped="no time left")
        return True
    return False


def _ms(times: dict[str, float]) -> dict[str, float]:
    return {f"{name} ms": time for name, time in times.items()}

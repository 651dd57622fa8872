"""What every Triton kernel must compute, in plain Python: interpreted in tests, and run on a GPU before timing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from superblock import masks as plain_masks
from superblock.bsr import BSRMatrix
from superblock.ops import cuda, reference
from superblock.ops.triton import decode, masks, product, sampled
from superblock.ops.triton.configs import Config
from superblock.ops.triton.plans import Operand, plan_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of the largest entry of the float64 result: one unit in the last place of the output, because the interpreter cuts
# where a GPU rounds; in float32 the rounding of the sum.
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-5}
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class Product:
    """A weight of ``shape`` in blocks of ``block``, and the tile that multiplies it."""

    shape: tuple[int, int]
    block: tuple[int, int]
    tokens: int
    tile: tuple[int, int, int]
    engine: str = "product"
    turned: bool = False
    described: bool = False


PRODUCTS = (
    Product((100, 75), (16, 32), 37, (32, 32, 32)),  # two rows merged, edges cut, a token tail
    Product((96, 160), (16, 64), 33, (16, 64, 32)),  # four rows merged, half a block a step
    Product((128, 128), (64, 32), 17, (16, 32, 32)),  # half a block row a program
    Product((70, 200), (16, 16), 20, (32, 16, 64)),  # four blocks gathered a step
    Product((70, 100), (32, 16), 5, (16, 16, 32)),  # half a row of gathered blocks
    Product((64, 100), (32, 64), 40, (32, 32, 16)),  # quarters of a block a step
    Product((130, 260), (128, 128), 3, (16, 128, 64)),
    Product((40, 600), (16, 16), 9, (16, 16, 16)),  # sums long enough to be cut in parts
    Product((40, 1200), (16, 16), 9, (16, 32, 16)),  # the same, of merged rows
    Product((100, 75), (16, 32), 37, (32, 64, 32), turned=True),  # outputs on the tensor core's M axis
    Product((128, 96), (64, 32), 70, (64, 64, 32), turned=True, described=True),  # x through a descriptor
    Product((112, 88), (16, 32), 37, (32, 64, 16), turned=True, described=True),  # merged, cut by every edge
    Product((100, 75), (16, 32), 37, (32, 32, 32), described=True),  # rows that no descriptor takes
    Product((100, 75), (16, 32), 1, (1, 16, 64), "decode"),
    Product((130, 100), (128, 16), 3, (4, 8, 32), "decode"),
    Product((64, 256), (16, 128), 2, (2, 16, 64), "decode"),
)
SAMPLED = (
    Product((100, 75), (16, 32), 37, (64, 16, 32)),
    Product((70, 200), (32, 16), 70, (64, 32, 32)),
    Product((128, 128), (64, 64), 1, (64, 64, 16)),
    Product((130, 260), (128, 128), 40, (128, 128, 16)),
    Product((32, 48), (16, 16), 600, (32, 16, 16)),  # tokens cut in shares
)
MASKS = (
    ((100, 75), (32, 32)),
    ((64, 48), (16, 16)),
    ((33, 9, 3, 3), (8, 4, 3, 3)),
    ((40, 300), (64, 200)),
    ((7, 5), (7, 5)),
)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN, so that an output nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def weight_of(shape: tuple[int, int], block: tuple[int, int], density: float = 0.45) -> BSRMatrix:
    """A random matrix whose first block row is full, second empty, and whose last block column is empty."""
    rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    living = torch.rand(rows, columns) < density
    living[0] = True
    living[1:2] = False
    living[1:, -1] = False
    spread = living.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    return BSRMatrix.from_dense(torch.randn(shape) * spread, block)


def check_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Raise unless every entry is within the dtype's tolerance of the float64 result; NaN never is."""
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


def check_product(case: Product, dtype: torch.dtype, transposed: bool, activation: str, device: str) -> None:
    """A tile of ``act(x Wᵀ + b) + r``, or of ``dy W``, against float64, with everything that can be fused."""
    torch.manual_seed(0)
    shape, block = (case.shape[::-1], case.block[::-1]) if transposed else (case.shape, case.block)
    matrix = weight_of(shape, block).to(dtype).to(device)
    plan = plan_of(matrix.crow_indices, matrix.col_indices, matrix.nnz, *matrix.grid)
    operand = Operand(matrix.values, plan, shape, transposed)
    out_features, in_features = case.shape
    wide = torch.randn(case.tokens, in_features + 8).to(dtype).to(device)
    x, bias = wide[:, :in_features], torch.randn(out_features).to(dtype).to(device)
    residual = torch.randn(case.tokens, 2 * out_features).to(dtype).to(device)[:, out_features:]
    m, n, k = case.tile
    engine = decode if case.engine == "decode" else product
    with nan_filled():
        y, z = (x.new_empty(case.tokens, out_features) for _ in range(2))
        config = Config(case.engine, m, n, k, 4, 2, case.turned, case.described)
        for launch in engine.launches(x, operand, y, z, bias, residual, activation, config):
            launch.run()
    dense = matrix.to_dense().double().cpu()
    want = x.double().cpu() @ (dense if transposed else dense.mT) + bias.double().cpu()
    check_close(z, want, dtype)
    check_close(y, reference.activate(want, activation) + residual.double().cpu(), dtype)


def check_sampled(case: Product, dtype: torch.dtype, device: str) -> None:
    """``dyᵀ x`` at the stored blocks against float64."""
    torch.manual_seed(0)
    matrix = weight_of(case.shape, case.block).to(dtype).to(device)
    plan = plan_of(matrix.crow_indices, matrix.col_indices, matrix.nnz, *matrix.grid)
    grad = torch.randn(case.tokens, case.shape[0] + 8).to(dtype).to(device)[:, : case.shape[0]]
    x = torch.randn(case.tokens, case.shape[1]).to(dtype).to(device)
    m, n, k = case.tile
    with nan_filled():
        out = torch.empty_like(matrix.values)
        for launch in sampled.launches(grad, x, out, plan, case.shape, Config("sampled", m, n, k, 4, 2)):
            launch.run()
    indices = matrix.crow_indices.cpu(), matrix.col_indices.cpu()
    want = reference.grad_values(grad.double().cpu(), x.double().cpu(), *indices, *case.shape, *case.block)
    check_close(out, want, dtype)


def check_backend(tokens: tuple[int, ...], density: float, dtype: torch.dtype, device: str) -> None:
    """The whole backend, as the ops call it, with the configurations it chooses, against float64."""
    torch.manual_seed(0)
    shape, block = (100, 90), (32, 16)
    matrix = weight_of(shape, block, density)
    if density == 0:
        matrix = BSRMatrix.from_dense(torch.zeros(shape), block)
    matrix = matrix.to(dtype).to(device)
    index = matrix.crow_indices, matrix.col_indices
    x, grad = (torch.randn(*tokens, side).to(dtype).to(device) for side in (shape[1], shape[0]))
    bias = torch.randn(shape[0]).to(dtype).to(device)

    def want(function: Any, *arguments: Any) -> Any:
        exact = (argument.cpu() if isinstance(argument, Tensor) else argument for argument in arguments)
        return function(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in exact))

    with nan_filled():
        arguments = (x, matrix.values, *index, bias, grad, *shape, "gelu")
        check_close(cuda.linear(*arguments), want(reference.linear, *arguments), dtype)
        arguments = (x, matrix.values, *index, bias, *shape, "silu")
        exact = want(reference.linear_with_preactivation, *arguments)
        for got, each in zip(cuda.linear_with_preactivation(*arguments), exact, strict=True):
            check_close(got, each, dtype)
        arguments = (grad, matrix.values, *index, *shape)
        check_close(cuda.grad_input(*arguments), want(reference.grad_input, *arguments), dtype)
        arguments = (grad, x, *index, *shape, *block)
        check_close(cuda.grad_values(*arguments), want(reference.grad_values, *arguments), dtype)


def check_activation_gradient(tokens: tuple[int, ...], activation: str, dtype: torch.dtype, device: str) -> None:
    """``dz`` and ``db`` against float64, from a strided gradient."""
    torch.manual_seed(0)
    z, wide = torch.randn(*tokens, 150).to(dtype).to(device), torch.randn(*tokens, 160).to(dtype).to(device)
    grad = wide[..., :150]
    with nan_filled():
        dz, dbias = cuda.activation_gradient(grad, z, activation)
    exact = z.double().cpu().requires_grad_()
    want = torch.autograd.grad(reference.activate(exact, activation), exact, grad.double().cpu())[0]
    check_close(dz, want, dtype)
    check_close(dbias, dz.double().cpu().reshape(-1, 150).sum(0), dtype)


def check_masks(shape: tuple[int, ...], tile: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Threshold, masked weight and both gradients: exactly what plain torch gives, sums to float32 rounding."""
    torch.manual_seed(0)
    weight, grad = (torch.randn(shape).to(dtype).to(device) for _ in range(2))
    scores = torch.randn(plain_masks.tile_grid(shape, tile)).to(dtype).to(device)
    scores.view(-1)[::3] = 0.5
    live = max(1, scores.numel() // 2)
    with nan_filled():
        mask = masks.threshold(scores, live)
        masked = masks.mask_tiles(weight, mask, tile)
        grad_weight, grad_scores = masks.mask_gradients(grad, weight, mask, tile)
    order = scores.cpu().flatten().argsort(descending=True, stable=True)[:live]
    want = torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, order, True).view(scores.shape)
    assert torch.equal(mask.cpu(), want)
    exact = want.to(dtype)
    assert torch.equal(masked.cpu(), plain_masks.mask_tiles(weight.cpu(), exact, tile))
    assert torch.equal(grad_weight.cpu(), plain_masks.mask_tiles(grad.cpu(), exact, tile))
    sums = plain_masks.tile_sums(grad.double().cpu() * weight.double().cpu(), tile).view(scores.shape)
    torch.testing.assert_close(grad_scores.double().cpu(), sums, rtol=1e-5, atol=1e-4)

"""The backend as the ops call it: chosen configurations, gradients, empty operands, strides, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_cases import ACTIVATIONS, DTYPES, check_activation_gradient, check_backend, check_close, weight_of

from superblock import BSRMatrix, Supermask, TileSparsity, bsr_linear, masks
from superblock.errors import MatrixError
from superblock.ops import cuda, library
from superblock.ops import tuning as tuning_module
from superblock.ops.triton import masks as kernels


@pytest.fixture(autouse=True)
def _through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "select", lambda *_: cuda)
    monkeypatch.setattr(library, "_fuses", lambda _: True)
    monkeypatch.setattr(masks, "_kernels", lambda _: kernels)
    monkeypatch.setattr(tuning_module.results(), "cases", {})
    monkeypatch.setattr(tuning_module.results(), "seconds", 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(40,), (3, 5), (1,), (0,), ()])
def test_all_products(tokens: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_backend(tokens, 0.4, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_gradient(activation: str, dtype: torch.dtype, device: str) -> None:
    check_activation_gradient((3, 50), activation, dtype, device)


@pytest.mark.parametrize("tokens", [(), (0,), (1,)])
def test_activation_gradient_of_few_tokens(tokens: tuple[int, ...], device: str) -> None:
    check_activation_gradient(tokens, "silu", torch.float32, device)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_blocks_and_all_blocks(density: float, device: str) -> None:
    check_backend((7,), density, torch.float32, device)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_through_the_op(activation: str | None, device: str) -> None:
    matrix = weight_of((64, 48), (16, 16)).to(device)
    values = matrix.values.requires_grad_()
    x, bias = torch.randn(5, 48, device=device), torch.randn(64, device=device)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    upstream = torch.randn(5, 64, device=device)
    y = bsr_linear(x, BSRMatrix(matrix.crow_indices, matrix.col_indices, values, matrix.shape), bias, activation)
    got = torch.autograd.grad(y, (x, values, bias), upstream)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in (x, values, bias)]
    dense = BSRMatrix(matrix.crow_indices.cpu(), matrix.col_indices.cpu(), exact[1], matrix.shape).to_dense()
    expected = F.linear(exact[0], dense, exact[2])
    expected = F.gelu(expected) if activation else expected
    check_close(y.detach(), expected.detach(), torch.float32)
    for each, want in zip(got, torch.autograd.grad(expected, exact, upstream.double().cpu()), strict=True):
        check_close(each, want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strided_operands(dtype: torch.dtype, device: str) -> None:
    matrix = weight_of((48, 32), (16, 16)).to(dtype).to(device)
    wide = torch.randn(6, 64, device=device).to(dtype)
    packed = matrix.values.transpose(1, 2).contiguous().transpose(1, 2)
    strange = torch.stack([matrix.values, matrix.values], -1)[..., 0]
    tall = torch.randn(32, 6, device=device).to(dtype)
    for values in (matrix.values, packed, strange):
        weight = BSRMatrix(matrix.crow_indices, matrix.col_indices, values, matrix.shape)
        for x in (
            wide[:, ::2],
            wide[:, 10:42],
            tall.mT,
            wide[:1, :32].expand(6, 32),
        ):
            check_close(bsr_linear(x, weight), (x.double() @ matrix.to_dense().double().mT).cpu(), dtype)


def test_results_do_not_depend_on_the_run(device: str) -> None:
    matrix = weight_of((32, 48), (16, 16)).to(device)
    grad, x = torch.randn(600, 32, device=device), torch.randn(600, 48, device=device)
    arguments = (grad, x, matrix.crow_indices, matrix.col_indices, 32, 48, 16, 16)
    assert torch.equal(cuda.grad_values(*arguments), cuda.grad_values(*arguments))


def test_a_masked_weight_trains_through_the_kernels(device: str) -> None:
    weight = torch.randn(48, 40, device=device)
    mask = Supermask(weight, TileSparsity(0.5, 16)).to(device)
    upstream = torch.randn_like(weight)
    weight.requires_grad_()
    grad_weight, grad_scores = torch.autograd.grad(mask(weight), (weight, mask.scores), upstream)
    spread = masks.mask_tiles(torch.ones(48, 40), mask.mask().cpu().float(), mask.tile)
    torch.testing.assert_close(grad_weight.cpu(), upstream.cpu() * spread)
    torch.testing.assert_close(grad_scores.cpu(), masks.tile_sums((upstream * weight).detach().cpu(), mask.tile))


def test_operands_that_do_not_fit_are_refused(device: str) -> None:
    matrix = weight_of((32, 48), (16, 16)).to(device)
    arguments = (matrix.crow_indices, matrix.col_indices, 32, 48, 16, 16)
    with pytest.raises(MatrixError, match="grad and x must have the same tokens and dtype"):
        cuda.grad_values(torch.randn(3, 32, device=device), torch.randn(4, 48, device=device), *arguments)
    wrong = matrix.col_indices.clone()
    wrong[0] = 7
    with pytest.raises(MatrixError, match="col_indices must be in"):
        cuda.grad_input(torch.randn(3, 32, device=device), matrix.values, matrix.crow_indices, wrong, 32, 48)


def test_what_goes_to_the_reference() -> None:
    assert cuda.unsupported(torch.bfloat16, 16, 128) is None
    assert "not torch.float64" in str(cuda.unsupported(torch.float64, 16, 16))
    assert "16, 32, 64 and 128, not 8 × 16" in str(cuda.unsupported(torch.float16, 8, 16))

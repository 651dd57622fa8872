"""The products against dense float64, with gradients, under every way torch calls an op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_bsr import blocky

from superblock import BSRMatrix, bsr_linear
from superblock.errors import ConfigError, MatrixError
from superblock.ops import ACTIVATIONS
from superblock.ops.reference import activate

CASES = [
    ((70, 50), 16, (3, 7)),
    ((64, 32), 8, (5,)),
    ((16, 24), (8, 4), (0,)),
    ((33, 9), 32, (2, 3, 4)),
    ((8, 8), 8, ()),
]
# Relative to the float64 result; one unit of rounding for each dtype, widened for sums of up to 50 terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "block", "leading"), CASES)
def test_product_and_gradients_match_dense_float64(
    shape: tuple[int, int], block: int | tuple[int, int], leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    matrix = BSRMatrix.from_dense(blocky(shape, block), block).to(dtype)
    x, bias = torch.randn(*leading, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    upstream = torch.randn(*leading, shape[0]).to(dtype)
    dense = matrix.to_dense().double().requires_grad_()
    inputs = [tensor.double().requires_grad_() for tensor in (x, bias)]
    expected = F.linear(inputs[0], dense, inputs[1])
    expected.backward(upstream.double())
    values, x, bias = (tensor.detach().clone().requires_grad_() for tensor in (matrix.values, x, bias))
    y = bsr_linear(x, BSRMatrix(matrix.crow_indices, matrix.col_indices, values, matrix.shape), bias)
    y.backward(upstream)
    grad_weight = BSRMatrix(matrix.crow_indices, matrix.col_indices, values.grad, matrix.shape).to_dense()
    living = matrix_of_ones(matrix)
    for got, want in (
        (y.detach(), expected.detach()),
        (x.grad, inputs[0].grad),
        (bias.grad, inputs[1].grad),
        (grad_weight, dense.grad * living),
    ):
        assert got.dtype == dtype
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


def matrix_of_ones(matrix: BSRMatrix) -> torch.Tensor:
    """1 where a block is stored."""
    ones = torch.ones_like(matrix.values, dtype=torch.float64)
    return BSRMatrix(matrix.crow_indices, matrix.col_indices, ones, matrix.shape).to_dense()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_activation_and_residual_are_applied_in_order_with_gradients(activation: str, with_residual: bool) -> None:
    matrix = BSRMatrix.from_dense(blocky((24, 20), 8).double(), 8)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(24, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(6, 24, dtype=torch.float64, requires_grad=True) if with_residual else None
    values = matrix.values.requires_grad_()
    inputs = [tensor for tensor in (x, bias, values, residual) if tensor is not None]
    y = bsr_linear(x, matrix, bias, activation, residual)
    expected = activate(F.linear(x, matrix.to_dense(), bias), activation)
    expected = expected if residual is None else expected + residual
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        torch.testing.assert_close(bsr_linear(x, matrix, bias, activation, residual), expected)
    upstream = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


def op_arguments(activation: str) -> tuple[object, ...]:
    matrix = BSRMatrix.from_dense(blocky((24, 20), 8), 8)
    return (
        torch.randn(3, 6, 20, requires_grad=True),
        matrix.values.requires_grad_(),
        matrix.crow_indices,
        matrix.col_indices,
        torch.randn(24, requires_grad=True),
        torch.randn(3, 6, 24, requires_grad=True),
        24,
        20,
        activation,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_linear(activation: str) -> None:
    torch.library.opcheck(torch.ops.superblock.bsr_linear, op_arguments(activation))


def test_opcheck_the_other_products() -> None:
    x, values, crow, col, bias, residual, *shape, _ = op_arguments("gelu")
    grad = residual
    ops = torch.ops.superblock
    torch.library.opcheck(ops.bsr_linear_with_preactivation, (x, values, crow, col, bias, *shape, "gelu"))
    torch.library.opcheck(ops.bsr_grad_input, (grad, values, crow, col, *shape))
    torch.library.opcheck(ops.bsr_grad_values, (grad, x, crow, col, *shape, 8, 8))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_activation_and_bias_in_one_op(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z, grad = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    torch.library.opcheck(torch.ops.superblock.activation_gradient, (grad, z, activation))
    matrix = BSRMatrix.from_dense(blocky((24, 20), 8), 8)
    x, bias = torch.randn(6, 20, requires_grad=True), torch.randn(24, requires_grad=True)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(bsr_linear(x, matrix, bias, activation).square().sum(), (x, bias))

    natural = gradients()
    for fuses in (True, False):
        monkeypatch.setattr("superblock.ops.library._fuses", lambda _, fuses=fuses: fuses)
        torch.testing.assert_close(gradients(), natural)


def test_the_preactivation_has_a_gradient_too() -> None:
    x, values, crow, col, bias, _, *shape, _ = op_arguments("gelu")
    y, z = torch.ops.superblock.bsr_linear_with_preactivation(x, values, crow, col, bias, *shape, "gelu")
    (from_z,) = torch.autograd.grad(z.sum(), (values,), retain_graph=True)
    (from_both,) = torch.autograd.grad((y + z).sum(), (values,), retain_graph=True)
    (from_y,) = torch.autograd.grad(y.sum(), (values,))
    torch.testing.assert_close(from_both, from_y + from_z)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_of_gradients(activation: str | None) -> None:
    matrix = BSRMatrix.from_dense(blocky((6, 5), 2).double(), 2)

    def product(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return bsr_linear(x, BSRMatrix(matrix.crow_indices, matrix.col_indices, values, matrix.shape), bias, activation)

    inputs = (torch.randn(3, 5), matrix.values, torch.randn(6))
    inputs = tuple(tensor.double().clone().requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


def test_strided_activations() -> None:
    matrix = BSRMatrix.from_dense(blocky((24, 20), 8), 8)
    wide = torch.randn(6, 40)
    for x in (wide[:, ::2], wide[:, 10:30], torch.randn(20, 6).mT, torch.randn(1, 20).expand(6, 20)):
        torch.testing.assert_close(bsr_linear(x, matrix), x @ matrix.to_dense().mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(dtype: torch.dtype) -> None:
    matrix = BSRMatrix.from_dense(blocky((24, 20), 8), 8)
    x, bias = torch.randn(6, 20), torch.randn(24)
    with torch.autocast("cpu", dtype):
        y, expected = bsr_linear(x, matrix, bias), F.linear(x, matrix.to_dense(), bias)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_autocast_keeps_a_wider_residual_whole() -> None:
    matrix = BSRMatrix.from_dense(blocky((24, 20), 8), 8)
    x, residual = torch.randn(6, 20), 1000 + torch.randn(6, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, product = bsr_linear(x, matrix, residual=residual), bsr_linear(x, matrix)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, product + residual)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    matrix = BSRMatrix.from_dense(blocky((24, 20), 8), 8)
    values = matrix.values.requires_grad_()

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.superblock.bsr_linear(
            x, values, matrix.crow_indices, matrix.col_indices, None, None, 24, 20, "gelu"
        ).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (6, 9):
        x = torch.randn(tokens, 20, requires_grad=True)
        (got,), (want,) = (torch.autograd.grad(function(x), (x,)) for function in (compiled, step))
        torch.testing.assert_close(got, want)


def _arguments() -> dict[str, object]:
    return {"x": torch.randn(3, 20), "weight": BSRMatrix.from_dense(blocky((24, 20), 8), 8)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": torch.randn(3, 19)},
            MatrixError,
            r"x must be \[..., 20\] for a weight of shape \(24, 20\), got \(3, 19\)",
        ),
        ({"x": torch.tensor(1.0)}, MatrixError, r"x must be \[..., 20\]"),
        ({"x": torch.ones(3, 20, dtype=torch.int64)}, MatrixError, "x must be of a floating dtype, got torch.int64"),
        ({"x": torch.randn(3, 20).double()}, MatrixError, "values must have the dtype and device of x, torch.float64"),
        ({"x": torch.randn(3, 20, device="meta")}, MatrixError, "values must have the dtype and device of x"),
        ({"bias": torch.randn(23)}, MatrixError, r"bias must be \[24\] for a weight of shape \(24, 20\), got \(23,\)"),
        (
            {"residual": torch.randn(24)},
            MatrixError,
            r"residual must be \(3, 24\), the shape of the product, got \(24,\)",
        ),
        (
            {"activation": "tanh"},
            ConfigError,
            "activation must be one of none, relu, gelu, gelu_tanh, silu, got 'tanh'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bsr_linear(**{**_arguments(), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("inference", [False, True])
def test_all_but_dense_tensors_and_block_sparse_weights_are_refused(inference: bool) -> None:
    known = _arguments()
    x, weight = torch.randn(3, 20), known["weight"]
    assert isinstance(weight, BSRMatrix)
    others = [x.to_sparse(), x.to_sparse_csr(), torch.nested.nested_tensor([x, x[:2]])]
    others += [x.to_mkldnn()] if torch.backends.mkldnn.is_available() else []
    with torch.inference_mode(inference):
        for other in others:
            with pytest.raises(MatrixError, match=r"x must be a plain, dense tensor, got (a nested one|one of layout)"):
                bsr_linear(other, weight)
        with pytest.raises(
            MatrixError, match=r"weight must be a BSRMatrix, as BSRMatrix\.from_dense makes it, got a Tensor"
        ):
            bsr_linear(x, weight.to_dense())  # type: ignore[arg-type]
        for activation in ("", []):
            with pytest.raises(ConfigError, match="activation must be one of none, relu, gelu, gelu_tanh, silu, got"):
                bsr_linear(x, weight, activation=activation)  # type: ignore[arg-type]

"""The convolution over a block-sparse kernel against torch's dense one, with gradients, under every way torch calls."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_cases import Seen, needs_core

from superblock.errors import ConfigError, MatrixError
from superblock.nn import BSRConv2d
from superblock.ops import ACTIVATIONS
from superblock.ops.conv2d import bsr_conv2d
from superblock.ops.convolution import dense_kernel, matrix_of
from superblock.ops.reference import activate

# (n, c, out, (h, w), kernel, stride, padding, dilation, groups, block)
CASES = [
    (2, 20, 30, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, 8),
    (1, 16, 24, (8, 9), (3, 5), (2, 1), (0, 2), (1, 1), 1, 8),
    (1, 32, 32, (7, 7), (3, 3), (1, 1), (2, 2), (2, 2), 2, 8),
    (2, 20, 24, (6, 5), (1, 1), (2, 3), (1, 0), (1, 1), 1, 8),
    (2, 24, 16, (5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1, 8),
    (1, 12, 20, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1, (4, 3)),
]
# Relative to the largest float64 result; sums of up to 300 terms in the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def case_of(case: tuple[Any, ...], dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor, dict[str, Any]]:
    """``bsr_conv2d``'s tensors, the dense kernel and the rest of its arguments."""
    count, channels, out, size, kernel, stride, padding, dilation, groups, block = case
    bh, bw = (block, block) if isinstance(block, int) else block
    living = torch.rand(-(-out // bh), -(-channels // groups // bw)) < 0.6
    tiles = living.repeat_interleave(bh, 0).repeat_interleave(bw, 1)[:out, : channels // groups]
    dense = (torch.randn(out, channels // groups, *kernel) * tiles[:, :, None, None] / 10).to(dtype)
    matrix = matrix_of(dense, block)
    tensors = {
        "x": torch.randn(count, channels, *size).to(dtype),
        "values": matrix.values,
        "crow_indices": matrix.crow_indices,
        "col_indices": matrix.col_indices,
        "bias": torch.randn(out).to(dtype),
    }
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return tensors, dense, geometry


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_convolution_and_gradients_match_dense_float64(
    case: tuple[Any, ...], dtype: torch.dtype, activation: str
) -> None:
    tensors, dense, geometry = case_of(case, dtype)
    shape = tuple(dense.shape)
    kernel = dense.double().requires_grad_()
    exact = {name: tensors[name].double().requires_grad_() for name in ("x", "bias")}
    z = F.conv2d(exact["x"], kernel, exact["bias"], **geometry)
    residual = torch.randn(z.shape).to(dtype)
    exact["residual"] = residual.double().requires_grad_()
    want = activate(z + exact["residual"], activation)
    upstream = torch.randn(want.shape).to(dtype)
    want.backward(upstream.double())
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in ("x", "values", "bias")}
    leaves["residual"] = residual.requires_grad_()
    with torch.no_grad():
        inferred = bsr_conv2d(**{**tensors, **leaves}, kernel_shape=shape, **geometry, activation=activation)
    y = bsr_conv2d(**{**tensors, **leaves}, kernel_shape=shape, **geometry, activation=activation)
    y.backward(upstream)
    indices = tensors["crow_indices"], tensors["col_indices"]
    grad_kernel = dense_kernel(leaves["values"].grad, *indices, shape)
    living = dense_kernel(torch.ones_like(leaves["values"]), *indices, shape) != 0
    for got, wanted in (
        (inferred, want.detach()),
        (y.detach(), want.detach()),
        (leaves["x"].grad, exact["x"].grad),
        (leaves["bias"].grad, exact["bias"].grad),
        (leaves["residual"].grad, exact["residual"].grad),
        (grad_kernel, kernel.grad * living),
    ):
        assert got.dtype == dtype
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * scale)
    for result in (inferred, y):
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_memory_formats_and_strides_agree() -> None:
    tensors, dense, geometry = case_of(CASES[0], torch.float32)
    wide = torch.randn(2, 40, 20, 16)
    for x in (wide[:, ::2, ::2, ::2][..., :9, :7], wide[:, :20, 3:12, 2:9].to(memory_format=torch.channels_last)):
        y = bsr_conv2d(**{**tensors, "x": x}, residual=None, kernel_shape=tuple(dense.shape), **geometry)
        torch.testing.assert_close(y, F.conv2d(x, dense, tensors["bias"], **geometry), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(case: tuple[Any, ...], activation: str) -> None:
    tensors, dense, geometry = case_of(case, torch.float32)
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("x", "values", "bias")}
    y = F.conv2d(tensors["x"], dense, **geometry)
    residual = torch.randn(y.shape, requires_grad=True)
    arguments = (*{**tensors, **leaves}.values(), residual, tuple(dense.shape), *geometry.values(), activation)
    torch.library.opcheck(torch.ops.superblock.bsr_conv2d, arguments)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2]], ids=str)
def test_opcheck_of_the_gradients(case: tuple[Any, ...]) -> None:
    tensors, dense, geometry = case_of(case, torch.float32)
    x, values, crow, col, _ = tensors.values()
    grad = torch.randn(F.conv2d(x, dense, **geometry).shape).requires_grad_()
    shape, rest = tuple(dense.shape), tuple(geometry.values())
    x, values = x.requires_grad_(), values.clone().requires_grad_()
    ops = torch.ops.superblock
    torch.library.opcheck(ops.bsr_conv2d_grad_input, (grad, values, crow, col, shape, x.shape[2:], *rest))
    torch.library.opcheck(ops.bsr_conv2d_grad_values, (grad, x, crow, col, shape, *rest, *values.shape[1:]))


@needs_core
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_gradients_of_gradients_are_native_too(case: tuple[Any, ...]) -> None:
    tensors, dense, geometry = case_of(case, torch.float32)
    results = []
    for dtype in (torch.float32, torch.float64):  # The core, and the reference.
        given = {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
        leaves = [given[name].detach().requires_grad_() for name in ("x", "values", "bias")]
        given |= dict(zip(("x", "values", "bias"), leaves, strict=True))
        y = bsr_conv2d(**given, residual=None, kernel_shape=tuple(dense.shape), **geometry, activation="silu")
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), leaves)
        results.append([*first, *second])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4 * float(want.detach().abs().max()))


def test_gradients_of_gradients() -> None:
    tensors, dense, geometry = case_of((1, 4, 4, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1, 2), torch.float64)

    def convolution(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        given = {**tensors, "x": x, "values": values, "bias": bias}
        return bsr_conv2d(**given, residual=None, kernel_shape=tuple(dense.shape), **geometry, activation="silu")

    inputs = tuple(tensors[name].clone().requires_grad_() for name in ("x", "values", "bias"))
    assert torch.autograd.gradcheck(convolution, inputs)
    assert torch.autograd.gradgradcheck(convolution, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_convolutions_do(dtype: torch.dtype) -> None:
    tensors, dense, geometry = case_of(CASES[0], torch.float32)
    with torch.autocast("cpu", dtype):
        y = bsr_conv2d(**tensors, residual=None, kernel_shape=tuple(dense.shape), **geometry)
        expected = F.conv2d(tensors["x"], dense, tensors["bias"], **geometry)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    tensors, dense, geometry = case_of(CASES[0], torch.float32)
    values = tensors.pop("values").requires_grad_()

    def step(x: torch.Tensor) -> torch.Tensor:
        given = {**tensors, "x": x, "values": values}
        y = bsr_conv2d(**given, residual=None, kernel_shape=tuple(dense.shape), **geometry, activation="relu")
        return y.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (2, 3):
        x = torch.randn(count, 20, 9, 7, requires_grad=True)
        got, want = (torch.autograd.grad(function(x), (x, values)) for function in (compiled, step))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(2, 19, 9, 7)}, MatrixError, r"x must be \[n, 20, h, w\], got \(2, 19, 9, 7\)"),
        ({"x": torch.randn(20, 9, 7)}, MatrixError, r"x must be \[n, 20, h, w\], got \(20, 9, 7\)"),
        ({"x": torch.ones(2, 20, 9, 7, dtype=torch.int64)}, MatrixError, "x must be of a floating dtype"),
        ({"x": torch.randn(2, 20, 9, 7).double()}, MatrixError, "values must have the dtype and device of x"),
        ({"x": torch.randn(2, 20, 9, 7, device="meta")}, MatrixError, "values must have the dtype and device of x"),
        ({"x": torch.randn(2, 20, 0, 7)}, MatrixError, "window of 3 × 3 does not fit into images of 0 × 7"),
        ({"bias": torch.randn(29)}, MatrixError, r"bias must be \[30\], one for each output channel, got \(29,\)"),
        (
            {"residual": torch.randn(2, 30, 9, 9)},
            MatrixError,
            r"residual must be \(2, 30, 9, 7\), the shape of the convolution, got \(2, 30, 9, 9\)",
        ),
        ({"stride": (0, 1)}, MatrixError, r"stride must be two numbers of at least 1, got \(0, 1\)"),
        ({"dilation": (-1, -1)}, MatrixError, r"dilation must be two numbers of at least 1, got \(-1, -1\)"),
        ({"padding": (0, -1)}, MatrixError, r"padding must be two numbers of at least 0, got \(0, -1\)"),
        (
            {"stride": (1, 2**31)},
            MatrixError,
            r"stride must be two numbers of at most 2147483647, got \(1, 2147483648\)",
        ),
        ({"dilation": (2**33, 1)}, MatrixError, "dilation must be two numbers of at most 2147483647"),
        ({"padding": (2**40, 1)}, MatrixError, "padding must be two numbers of at most 2147483647"),
        ({"activation": "tanh"}, ConfigError, "activation must be one of none, relu, gelu, gelu_tanh, silu"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors, dense, geometry = case_of(CASES[0], torch.float32)
    arguments = {**tensors, "residual": None, "kernel_shape": tuple(dense.shape), **geometry}
    with pytest.raises(error, match=message):
        bsr_conv2d(**{**arguments, **changes})


@pytest.mark.parametrize("kernel", [(3, 0), (0, 3)])
@pytest.mark.parametrize("graded", [False, True])
def test_a_kernel_without_places_is_refused(kernel: tuple[int, int], graded: bool) -> None:
    x, indices = torch.randn(2, 8, 9, 9, requires_grad=graded), (torch.zeros(2).int(), torch.zeros(0).int())
    with pytest.raises(MatrixError, match="kernel_shape must be"):
        bsr_conv2d(x, torch.zeros(0, 8, 8), *indices, None, None, (8, 8, *kernel))


@needs_core
@pytest.mark.parametrize("kernel", [1, 3])
def test_results_can_be_changed_in_place(kernel: int) -> None:
    x, weight = torch.randn(2, 16, 6, 6, requires_grad=True), torch.randn(16, 16, kernel, kernel)
    matrix = matrix_of(weight, 8)
    values = matrix.values.detach().requires_grad_()
    y = bsr_conv2d(x, values, matrix.crow_indices, matrix.col_indices, None, None, weight.shape, padding=(1, 1))
    F.relu_(y).sum().backward()
    gradient, x.grad = x.grad, None
    F.relu(F.conv2d(x, weight, padding=1)).sum().backward()
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graded", [False, True])
def test_a_kernel_of_other_than_four_sizes_is_refused(graded: bool) -> None:
    tensors, _, geometry = case_of(CASES[0], torch.float32)
    with (
        torch.set_grad_enabled(graded),
        pytest.raises(MatrixError, match=r"kernel_shape must be \(out, .* got \(30, 20\)"),
    ):
        bsr_conv2d(**tensors, residual=None, kernel_shape=(30, 20), **geometry)


@pytest.mark.parametrize("graded", [False, True])
def test_one_number_serves_height_and_width(graded: bool) -> None:
    tensors, dense, _ = case_of(CASES[0], torch.float32)
    tensors["x"].requires_grad_(graded)
    y = bsr_conv2d(**tensors, residual=None, kernel_shape=tuple(dense.shape), stride=2, padding=1, dilation=2)
    torch.testing.assert_close(y, F.conv2d(tensors["x"], dense, tensors["bias"], 2, 1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1,), "same", 1.5, None], ids=str)
def test_all_but_one_or_two_numbers_are_refused(name: str, sizes: Any, graded: bool) -> None:
    tensors, dense, geometry = case_of(CASES[0], torch.float32)
    tensors["x"].requires_grad_(graded)
    arguments = {**tensors, "residual": None, "kernel_shape": tuple(dense.shape), **geometry}
    message = re.escape(f"{name} must be a number, or two for height and width, got {sizes!r}")
    with pytest.raises(MatrixError, match=message):
        bsr_conv2d(**{**arguments, name: sizes})
    with pytest.raises(MatrixError, match=message):
        BSRConv2d(matrix_of(dense, 8), kernel_shape=tuple(dense.shape), **{name: sizes})
    with pytest.raises(MatrixError, match=rf"{name} must be two numbers of at least \d, got \(1\.5, 1\)"):
        bsr_conv2d(**{**arguments, name: (1.5, 1)})


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("stride", [(4, 1), (3, 50), (5000, 5000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pixels_between_wide_steps_have_no_gradient(
    stride: tuple[int, int], dilation: int, padding: tuple[int, int], dtype: torch.dtype
) -> None:
    dense, x = torch.randn(16, 8, 3, 2, dtype=dtype), torch.randn(2, 8, 9, 7, dtype=dtype, requires_grad=True)
    matrix = matrix_of(dense, 8)
    step = tuple(min(one, 30) for one in stride)  # All the same to images of this size.
    y = F.conv2d(x, dense, None, step, padding, dilation)
    grad = torch.randn_like(y)
    dx = torch.ops.superblock.bsr_conv2d_grad_input(
        grad, matrix.values, matrix.crow_indices, matrix.col_indices,
        dense.shape, x.shape[2:], stride, padding, (dilation, dilation), 1,
    )  # fmt: skip
    torch.testing.assert_close(dx, torch.autograd.grad(y, x, grad)[0])


@pytest.mark.parametrize("name", ["bsr_conv2d_grad_input", "bsr_conv2d_grad_values"])
def test_second_derivatives_are_taken_only_where_asked_for(name: str) -> None:
    tensors, dense, geometry = case_of(CASES[0], torch.float32)
    x, values, crow, col, _ = tensors.values()
    grad = torch.randn(F.conv2d(x, dense, **geometry).shape)
    other, sizes = (values, [x.shape[2:]]) if name.endswith("input") else (x, [])
    blocks = [] if name.endswith("input") else values.shape[1:]
    for asked, unasked in ((grad, other), (other, grad)):
        asked.requires_grad_()
        unasked.requires_grad_(False)
        gradient = getattr(torch.ops.superblock, name)(
            grad, other, crow, col, tuple(dense.shape), *sizes, *geometry.values(), *blocks
        )
        with Seen() as seen:
            gradient.sum().backward()
        assert len([op for op in seen.names if "superblock" in op]) == 1
        asked.grad = None


@needs_core
def test_the_op_itself_refuses_what_the_core_cannot_read() -> None:
    tensors, dense, geometry = case_of(CASES[0], torch.float32)
    x = tensors.pop("x").bfloat16()
    with pytest.raises(MatrixError, match=r"x must be of torch\.float32 on cpu, got torch\.bfloat16 on cpu"):
        torch.ops.superblock.bsr_conv2d.default(
            x, *tensors.values(), None, tuple(dense.shape), *geometry.values(), "none"
        )

"""The fused feed-forward and the convolutions, against the products and convolutions they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_cases import DTYPES, assert_near, isa, needs_core, random_weight, read_features

from superblock.errors import MatrixError
from superblock.ops import cpu, reference
from superblock.ops.convolution import dense_kernel, matrix_of, output_size

pytestmark = [needs_core, pytest.mark.usefixtures("nan_filled", isa.__name__)]

LAYERS = [
    ((200,), 64, 128, 64, (16, 16), (16, 16)),
    ((2, 49), 72, 100, 40, (32, 24), (8, 16)),
    ((131,), 96, 90, 70, (16, 8), (64, 64)),
    ((60,), 32, 33, 32, (64, 32), (8, 8)),
    ((3,), 32, 64, 32, (16, 16), (16, 16)),
    ((0,), 32, 64, 32, (16, 16), (16, 16)),
    # Weights of 64 outputs beyond L1 in one of the two.
    ((197,), 64, 1600, 96, (32, 32), (32, 32)),
    ((75,), 64, 1500, 70, (48, 16), (24, 40)),
    ((75,), 64, 1500, 70, (48, 16), (48, 40)),
    ((41,), 1600, 60, 80, (16, 32), (16, 32)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("leading", "in_", "hidden", "out", "first_block", "second_block"), LAYERS)
def test_feed_forward_matches_two_products(leading, in_, hidden, out, first_block, second_block, dtype) -> None:
    first = (*random_weight(hidden, in_, first_block, dtype), torch.randn(hidden).to(dtype), hidden, in_)
    second = (*random_weight(out, hidden, second_block, dtype), torch.randn(out).to(dtype), out, hidden)
    x, residual = torch.randn(*leading, in_).to(dtype), torch.randn(*leading, out).to(dtype)
    for activation in ("gelu", "relu", "none"):
        y = cpu.feed_forward(x, first, activation, second, residual)
        inner = reference.linear(
            x.double(), first[0].double(), *first[1:3], first[3].double(), None, hidden, in_, activation
        )
        # The core rounds its hidden activations to the dtype only where its products take that dtype.
        want = reference.linear(
            inner, second[0].double(), *second[1:3], second[3].double(), residual.double(), out, hidden, "none"
        )
        assert_near(y, want)


# Few living blocks: most hidden features are read by none of the second weight's, whole strips of 64 among them, which
# end with one of the first's blocks or not.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "first_block", "second_block"),
    [
        (197, 1024, (64, 64), (64, 64)),
        (131, 500, (48, 16), (40, 24)),
        (75, 1000, (16, 16), (16, 64)),
        (60, 640, (128, 32), (16, 16)),
        (90, 900, (80, 40), (8, 64)),
        (70, 320, (32, 32), (32, 96)),
    ],
)
def test_hidden_features_that_nothing_reads_are_left_out(tokens, hidden, first_block, second_block, dtype) -> None:
    second = *random_weight(64, hidden, second_block, dtype, density=0.06), None, 64, hidden
    bias = torch.randn(hidden).to(dtype)
    first = *random_weight(hidden, 96, first_block, dtype), bias, hidden, 96
    x = torch.randn(tokens, 96).to(dtype)
    inner = reference.linear(x.double(), first[0].double(), *first[1:3], bias.double(), None, hidden, 96, "gelu")
    want = reference.linear(inner, second[0].double(), *second[1:3], None, None, 64, hidden, "none")
    unread = ~read_features(second[2], hidden, second_block[1])
    assert unread.any()
    for spoiled in (False, True):
        if spoiled:
            bias[unread] = torch.nan
        assert_near(cpu.feed_forward(x, first, "gelu", second), want)


def test_weights_that_do_not_chain_are_refused() -> None:
    first = (*random_weight(64, 32, (16, 16)), None, 64, 32)
    second = (*random_weight(32, 48, (16, 16)), None, 32, 48)
    with pytest.raises(MatrixError, match=r"must take the first's 64 outputs in torch\.float32, got 48"):
        cpu.feed_forward(torch.zeros(2, 32), first, "relu", second)


# (n, c, out, (h, w), kernel, stride, padding, dilation, groups, block)
CONVOLUTIONS = [
    (2, 32, 48, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1, 16),
    (1, 20, 30, (11, 11), (3, 3), (2, 2), (1, 1), (1, 1), 1, 8),
    (2, 64, 64, (8, 8), (1, 1), (2, 2), (0, 0), (1, 1), 1, 16),
    (1, 32, 64, (10, 10), (3, 3), (1, 1), (2, 2), (2, 2), 2, 16),
    (2, 24, 32, (7, 7), (5, 5), (3, 3), (2, 2), (1, 1), 1, 16),
    # Rows that are wide enough to be packed once for all places of the kernel: groups of tokens divide them or overlap,
    # tiles end within an image or reach over several.
    (2, 32, 48, (9, 28), (3, 3), (1, 1), (1, 1), (1, 1), 1, 16),
    (5, 24, 40, (3, 31), (3, 3), (1, 1), (1, 1), (1, 1), 1, 8),
    (1, 64, 96, (60, 34), (3, 3), (1, 1), (1, 1), (1, 1), 1, 32),
    (2, 20, 30, (31, 61), (3, 5), (2, 2), (0, 2), (1, 1), 1, 8),
    (1, 32, 64, (12, 40), (3, 3), (1, 1), (2, 2), (2, 2), 2, 16),
    (2, 16, 24, (40, 55), (5, 3), (3, 2), (3, 1), (2, 3), 1, 8),
    (1, 16, 32, (6, 80), (1, 3), (1, 4), (0, 0), (1, 1), 1, 16),
    (2, 48, 32, (2, 19), (2, 2), (1, 1), (1, 1), (1, 1), 1, (32, 16)),
    (3, 72, 40, (5, 17), (1, 3), (1, 1), (2, 3), (1, 1), 1, 16),
]


def blocky_kernel(
    out: int, channels: int, size: tuple[int, int], block: int | tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    height, width = (block, block) if isinstance(block, int) else block
    living = torch.rand(-(-out // height), -(-channels // width)) < 0.5
    tiles = living.repeat_interleave(height, 0).repeat_interleave(width, 1)[:out, :channels]
    kernel = torch.randn(out, channels, *size) / math.sqrt(channels * math.prod(size))
    return (kernel * tiles[:, :, None, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution_matches_torch(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    count, channels, out, size, kernel, *geometry, groups, block = case
    weight = blocky_kernel(out, channels // groups, kernel, block, dtype)
    matrix, bias = matrix_of(weight, block), torch.randn(out).to(dtype)
    arguments = matrix.values, matrix.crow_indices, matrix.col_indices, bias
    pixels = torch.randn(count, *size, channels + 8).to(dtype)[..., :channels]  # Further apart than channels fill.
    x = pixels.permute(0, 3, 1, 2)
    z = F.conv2d(x.double(), weight.double(), bias.double(), *geometry, groups)
    residual = torch.randn(z.shape).to(dtype)
    for images in (x, x.contiguous(memory_format=torch.channels_last), x.contiguous()):
        # What an earlier call leaves in the scratch memory must not reach the result.
        cpu.conv2d(torch.full_like(images, torch.nan), *arguments, None, tuple(weight.shape), *geometry, groups)
        y = cpu.conv2d(images, *arguments, residual, tuple(weight.shape), *geometry, groups, "relu")
        assert_near(y, F.relu(z + residual.double()))
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(cpu.conv2d(x, *arguments, None, tuple(weight.shape), *geometry, groups), z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_gradients_of_convolutions_match_the_reference(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    count, channels, out, size, kernel, *geometry, groups, block = case
    weight = blocky_kernel(out, channels // groups, kernel, block, dtype)
    matrix, shape = matrix_of(weight, block), tuple(weight.shape)
    indices, blocksize = (matrix.crow_indices, matrix.col_indices), matrix.values.shape[1:]
    x = torch.randn(count, channels, *size).to(dtype)
    grad = torch.randn(count, out, *output_size(size, kernel, *geometry)).to(dtype)
    want = (
        reference.conv2d_grad_input(grad.double(), matrix.values.double(), *indices, shape, size, *geometry, groups),
        reference.conv2d_grad_values(grad.double(), x.double(), *indices, shape, *geometry, groups, *blocksize),
    )
    for memory_format in (torch.channels_last, torch.contiguous_format):
        images, upstream = (each.to(memory_format=memory_format) for each in (x, grad))
        # What an earlier call leaves in the scratch memory must not reach the result.
        cpu.conv2d_grad_values(upstream * torch.nan, images, *indices, shape, *geometry, groups, *blocksize)
        dx = cpu.conv2d_grad_input(upstream, matrix.values, *indices, shape, size, *geometry, groups)
        assert_near(dx, want[0])
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert_near(cpu.conv2d_grad_values(upstream, images, *indices, shape, *geometry, groups, *blocksize), want[1])


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_gradients_of_kernels_do_not_depend_on_the_threads(case: tuple[Any, ...]) -> None:
    count, channels, out, size, kernel, *geometry, groups, block = case
    weight = blocky_kernel(out, channels // groups, kernel, block, torch.float32)
    matrix, x = matrix_of(weight, block), torch.randn(count, channels, *size)
    arguments = matrix.values, matrix.crow_indices, matrix.col_indices, None, None
    y, sizes = cpu.conv2d(x, *arguments, tuple(weight.shape), *geometry, groups), matrix.values.shape[1:]
    results = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        results.append(cpu.conv2d_grad_values(y, x, *arguments[1:3], tuple(weight.shape), *geometry, groups, *sizes))
    assert torch.equal(*results)


def test_a_kernel_survives_its_matrix() -> None:
    kernel = blocky_kernel(24, 20, (3, 3), 8, torch.float32)
    matrix = matrix_of(kernel, 8)
    assert torch.equal(
        dense_kernel(matrix.values, matrix.crow_indices, matrix.col_indices, tuple(kernel.shape)), kernel
    )


def test_lists_that_change_are_read_again() -> None:
    kernel = torch.randn(16, 8, 3, 3)
    matrix, x = matrix_of(kernel, 8), torch.randn(1, 8, 9, 9)
    stride = [1, 1]
    for step in (1, 2):
        stride[0] = step
        y = cpu.conv2d(x, matrix.values, matrix.crow_indices, matrix.col_indices, None, None, (16, 8, 3, 3), stride)
        assert_near(y, F.conv2d(x.double(), kernel.double(), stride=stride))


def test_what_does_not_convolve_is_refused() -> None:
    matrix = matrix_of(torch.ones(16, 8, 3, 3), 8)
    arguments = (matrix.values, matrix.crow_indices, matrix.col_indices, None)
    with pytest.raises(MatrixError, match=r"x must be \[n, 8, h, w\], got \(1, 9, 4, 4\)"):
        cpu.conv2d(torch.zeros(1, 9, 4, 4), *arguments, None, (16, 8, 3, 3))
    with pytest.raises(MatrixError, match="16 output channels in 4 groups must divide into blocks of 8"):
        cpu.conv2d(torch.zeros(1, 32, 4, 4), *arguments, None, (16, 8, 3, 3), groups=4)
    with pytest.raises(MatrixError, match="16 output channels in 3 groups must divide into blocks of 8"):
        cpu.conv2d(torch.zeros(1, 24, 4, 4), *arguments, None, (16, 8, 3, 3), groups=3)
    with pytest.raises(MatrixError, match=r"dilation must be two numbers of at least 1, got \(-1, 1\)"):
        cpu.conv2d(torch.zeros(1, 8, 4, 4), *arguments, None, (16, 8, 3, 3), dilation=(-1, 1))
    with pytest.raises(MatrixError, match=r"residual must be \(1, 16, 2, 2\), as the result is, got \(1, 16, 3, 3\)"):
        cpu.conv2d(torch.zeros(1, 8, 4, 4), *arguments, torch.zeros(1, 16, 3, 3), (16, 8, 3, 3))
    with pytest.raises(MatrixError, match="the window of 3 × 3 does not fit into images of 2 × 2"):
        cpu.conv2d(torch.zeros(1, 8, 2, 2), *arguments, None, (16, 8, 3, 3))
    places = (*arguments[1:3], (16, 8, 3, 3))
    rest, sizes = ((1, 1), (0, 0), (1, 1), 1), (8, 8)
    grad, x = torch.zeros(1, 16, 2, 2), torch.zeros(1, 8, 4, 4)
    message = r"grad must be \[n, 16, 2, 2\] of torch\.float32 on cpu, got \(1, 16, 3, 3\) of torch\.float32 on cpu"
    with pytest.raises(MatrixError, match=message):
        cpu.conv2d_grad_input(torch.zeros(1, 16, 3, 3), arguments[0], *places, (4, 4), *rest)
    with pytest.raises(MatrixError, match=message):
        cpu.conv2d_grad_values(torch.zeros(1, 16, 3, 3), x, *places, *rest, *sizes)
    with pytest.raises(MatrixError, match=r"grad must be .* got \(1, 16, 2, 2\) of torch\.bfloat16 on cpu"):
        cpu.conv2d_grad_values(grad.bfloat16(), x, *places, *rest, *sizes)
    with pytest.raises(MatrixError, match=r"x must be \[n, 8, h, w\] on cpu, got \(1, 9, 4, 4\) on cpu"):
        cpu.conv2d_grad_values(grad, torch.zeros(1, 9, 4, 4), *places, *rest, *sizes)
    for call in (
        lambda: cpu.conv2d_grad_input(grad, arguments[0], *places, (4, 4), (0, 1), *rest[1:]),
        lambda: cpu.conv2d_grad_values(grad, x, *places, (0, 1), *rest[1:], *sizes),
    ):
        with pytest.raises(MatrixError, match=r"stride must be two numbers of at least 1, got \(0, 1\)"):
            call()
    for shape in ((16, 8, 0, 3), (16, 8, 3, 0)):
        with pytest.raises(MatrixError, match="kernel must be two numbers of at least 1"):
            cpu.conv2d_grad_input(grad, arguments[0], *arguments[1:3], shape, (4, 4), *rest)
    with pytest.raises(MatrixError, match="grad and x must have the same images, got 2 and 1"):
        cpu.conv2d_grad_values(grad.repeat(2, 1, 1, 1), x, *places, *rest, *sizes)
    with pytest.raises(MatrixError, match=r"expected a kernel \[out, c, kh, kw\], got shape \(4, 4\)"):
        matrix_of(torch.zeros(4, 4), 8)

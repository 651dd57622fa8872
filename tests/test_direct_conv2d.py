"""Convolutions on the short way to the native core: whatever images come, and never hidden from who must see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_cases import Seen, needs_core
from torch import Tensor

from superblock.errors import MatrixError
from superblock.nn import BSRConv2d
from superblock.ops.convolution import matrix_of

pytestmark = needs_core


def layer_of(groups: int) -> BSRConv2d:
    kernel = torch.randn(32, 32 // groups, 3, 3) / 8
    layer = BSRConv2d(
        matrix_of(kernel, 8), torch.randn(32), padding=(1, 1), kernel_shape=tuple(kernel.shape), groups=groups
    )
    return layer.requires_grad_(False)


def expected(layer: BSRConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.conv2d(x, layer.dense(), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.relu(y if residual is None else y + residual)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_images_of_every_shape_and_order_follow_one_another(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(groups)
    monkeypatch.setattr(torch.ops.superblock, "bsr_conv2d", lambda *_: pytest.fail("dispatched"))
    last = torch.channels_last
    for _ in range(2):
        for x in (
            torch.randn(2, 32, 7, 9).to(memory_format=last),
            torch.randn(2, 32, 7, 9),
            torch.randn(2, 32, 9, 7).to(memory_format=last),
            torch.randn(2, 32, 9, 14).to(memory_format=last)[..., ::2],
            torch.randn(1, 32, 1, 1),
        ):
            for residual in (None, torch.randn_like(x), torch.randn(*x.shape).to(memory_format=last)):
                y = layer.convolve(x, "relu", residual)
                torch.testing.assert_close(y, expected(layer, x, residual), rtol=1e-4, atol=1e-5)
                assert y.is_contiguous(memory_format=last)


@torch.no_grad()
def test_what_the_layer_becomes_is_seen() -> None:
    layer, x = layer_of(1), torch.randn(1, 32, 8, 8).to(memory_format=torch.channels_last)
    for change in (
        lambda: None,
        lambda: layer.values.mul_(2),
        lambda: setattr(layer.values, "data", torch.randn_like(layer.values) / 8),
        lambda: setattr(layer, "stride", (2, 2)),
        lambda: setattr(layer, "padding", (2, 0)),
        lambda: setattr(layer, "dilation", (1, 2)),
        lambda: setattr(layer.bias, "data", torch.randn(64)[::2]),
    ):
        change()
        for _ in range(2):
            torch.testing.assert_close(layer.convolve(x, "relu"), expected(layer, x), rtol=1e-4, atol=1e-5)


def test_what_must_see_it_does() -> None:
    layer, x = layer_of(1), torch.randn(1, 32, 8, 8)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), Seen() as seen:
            layer(x)
        assert any("bsr_conv2d" in name for name in seen.names)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@torch.no_grad()
def test_bad_input_is_refused_on_the_short_way_too() -> None:
    layer, x = layer_of(1), torch.zeros(1, 32, 8, 8)
    layer(x)
    with pytest.raises(MatrixError, match=r"x must be \[n, 32, h, w\], got \(1, 31, 8, 8\)"):
        layer(x[:, 1:])
    with pytest.raises(MatrixError, match=r"x must be of torch\.float32 on cpu, got torch\.float64"):
        layer(x.double())
    with pytest.raises(MatrixError, match=r"residual must be \(1, 32, 8, 8\), as the result is, got \(1, 32, 4, 16\)"):
        layer.convolve(x, "none", torch.zeros(1, 32, 4, 16))
    with pytest.raises(MatrixError, match=r"expected \[..., 32\] of torch.float32 on cpu, got .* torch.float64"):
        layer.convolve(x, "none", torch.zeros(1, 32, 8, 8).double())

"""The cheaper GELU of 16-bit outputs, against the exact one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from superblock.ops.triton.epilogue import gelu_for_16_bits


@triton.jit
def gelu_kernel(z_ptr, y_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, gelu_for_16_bits(tl.load(z_ptr + place)))


def test_gelu_is_exact_to_what_16_bits_hold(device: str) -> None:
    z = torch.linspace(-12, 12, 2**14, device=device)
    y = torch.empty_like(z)
    gelu_kernel[(16,)](z, y, 1024)
    want = torch.nn.functional.gelu(z.double())
    assert bool(((y - want).abs() <= 1.6e-5 + 1e-5 * want.abs()).all())
    assert bool(((y - want).abs() <= 2**-12 * want.abs())[z.abs() < 1].all())


def test_gelu_far_out(device: str) -> None:
    z = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf, torch.nan, 0.0, -0.0, -5.0], device=device)
    y = torch.empty_like(z)
    gelu_kernel[(1,)](z, y, 8)
    want = torch.tensor([0.0, 0.0, 1e30, torch.inf, torch.nan, 0.0, 0.0, 0.0])
    torch.testing.assert_close(y.cpu(), want, rtol=1e-5, atol=0, equal_nan=True)

"""The core under AddressSanitizer, UBSan and ThreadSanitizer, and in an emulator of another machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_cases import build, compiler, needs_core

CHECK = Path(__file__).parent / "native/check.c"
X86 = platform.machine() in ("x86_64", "AMD64")

FUZZ = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import torch
from hypothesis import given, settings, strategies as st
from superblock.ops import native
native.find = lambda: Path({library!r})
from native_cases import ISAS, DTYPES, assert_near, random_weight
from superblock.ops import attention, cpu, reference
from torch.nn.functional import scaled_dot_product_attention

eighths = st.integers(1, 9).map(lambda n: 8 * n)
sizes = st.integers(1, 150)

@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(ISAS), st.sampled_from(DTYPES), st.integers(0, 90), sizes, sizes, eighths, eighths, eighths,
       st.booleans(), st.floats(0, 1), st.integers(1, 3))
def fuzz(isa, dtype, tokens, out, in_, height, width, other, packed, density, threads):
    native.select(isa)
    torch.set_num_threads(threads)
    values, *index = random_weight(out, in_, (height, width), dtype, density, packed)
    second, *second_index = random_weight(in_, out, (other, height), dtype, density, packed)
    x, grad, bias = (torch.randn(*shape).to(dtype) for shape in ((tokens, in_), (tokens, out), (out,)))
    y = cpu.linear(x, values, *index, bias, grad, out, in_, "gelu")
    wide = [tensor.double() for tensor in (x, values, bias, grad)]
    assert_near(y, reference.linear(*wide[:2], *index, *wide[2:], out, in_, "gelu"))
    cpu.linear_with_preactivation(x, values, *index, bias, out, in_, "silu")
    cpu.grad_input(grad, values, *index, out, in_)
    cpu.grad_values(grad, x, *index, out, in_, height, width)
    cpu.activation_gradient(grad.repeat(1, 2)[:, 1:1 + out], grad, "gelu")
    chain = (values, *index, bias, out, in_), "gelu", (second, *second_index, None, in_, out)
    cpu.feed_forward(x, *chain)
    y, z = cpu.feed_forward_with_preactivation(x, *chain, x)
    cpu.feed_forward_gradient(y, z, *chain)
    cpu.grad_values(y, z, *second_index, in_, out, other, height, "gelu")
    cpu.bias_gradient(grad.repeat(1, 2)[:, 1:1 + out])
    kernel = 1 + tokens % 3
    images = torch.randn(2, in_, 3 + tokens % 9, 4 + out % 60).to(dtype).to(memory_format=torch.channels_last)
    from superblock.ops.convolution import matrix_of, output_size
    matrix = matrix_of(torch.randn(out, in_, kernel, kernel).to(dtype), (height, width))
    cpu.conv2d(images, matrix.values, matrix.crow_indices, matrix.col_indices, bias, None, (out, in_, kernel, kernel),
               (1 + threads % 2,) * 2, (tokens % 2,) * 2)
    geometry = (1, 1), (tokens % 3,) * 2, (1 + threads % 2,) * 2
    if min(output_size(images.shape[2:], (kernel, kernel), *geometry)) > 0:
        indices, shape = (matrix.crow_indices, matrix.col_indices), (out, in_, kernel, kernel)
        upstream = cpu.conv2d(images, matrix.values, *indices, None, None, shape, *geometry)
        cpu.conv2d_grad_input(upstream, matrix.values, *indices, shape, images.shape[2:], *geometry, 1)
        cpu.conv2d_grad_values(upstream, images, *indices, shape, *geometry, 1, height, width)

@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(ISAS), st.sampled_from(DTYPES), st.integers(1, 3), st.integers(1, 5), st.integers(1, 120),
       st.one_of(st.integers(1, 120), st.integers(500, 700)), eighths, st.integers(1, 3))
def fuzz_attention(isa, dtype, n, heads, queries, keys, features, threads):
    native.select(isa)
    torch.set_num_threads(threads)
    q, k, v = (torch.randn(n, tokens, heads, features).to(dtype).transpose(1, 2) for tokens in (queries, keys, keys))
    want = scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_near(torch.ops.superblock.attention(q, k, v), want)

fuzz()
fuzz_attention()
print("clean")
"""


@needs_core
def test_no_address_or_undefined_behaviour_errors(tmp_path: Path) -> None:
    cc = compiler()
    runtime = subprocess.run([cc, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(runtime.strip()).is_absolute():
        pytest.skip("needs libasan")
    library = tmp_path / "libsuperblock.so"
    build(cc, library, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", x86=X86)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.strip(),
        # Python and torch leak by design; only the core is instrumented, and what it touches is checked.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    code = FUZZ.format(tests=str(Path(__file__).parent), library=str(library))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-4000:]


def test_no_data_races(tmp_path: Path) -> None:
    """Every instruction set shares one scheduler, so the portable one finds its races."""
    cc = compiler()
    runtime = subprocess.run([cc, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(runtime.strip()).is_absolute():
        pytest.skip("needs libtsan")
    program = tmp_path / "check"
    build(cc, program, "-fsanitize=thread", x86=False, main=CHECK)
    # ThreadSanitizer cannot map its shadow where the kernel randomizes addresses widely.
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), str(program), "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_aarch64(tmp_path: Path) -> None:
    """The portable kernels with NEON's 32 registers, in an emulator."""
    cc, emulator = compiler("aarch64-linux-gnu-gcc"), compiler("qemu-aarch64")
    program = tmp_path / "check"
    build(cc, program, x86=False, main=CHECK)
    done = subprocess.run(
        [emulator, "-L", "/usr/aarch64-linux-gnu", str(program), "60"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "portable: 60 rounds agree"), done.stderr

"""Tests of the Triton kernels: on a GPU where there is one, else by Triton's interpreter.

Run by ``tests/test_triton_interpreted.py`` in a process of their own, because Triton decides at import.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def multiply_bfloat16() -> None:
    """The interpreter keeps bfloat16 as bare bits and multiplies those: let it multiply what they mean."""
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if str(handle.dtype.scalar) != "bf16":
            return handle
        bits = torch.from_numpy(handle.data.astype("int16", copy=True))
        return TensorHandle(bits.view(torch.bfloat16).float().numpy(), float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    multiply_bfloat16()

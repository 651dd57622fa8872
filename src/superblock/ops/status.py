"""Which backends can multiply on this machine, and what keeps the others from it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class BackendStatus:
    """One backend: ``detail`` says with what it runs, or why it does not."""

    name: str
    active: bool
    detail: str


def describe() -> list[BackendStatus]:
    """All backends, the fastest first; the reference is always there."""
    return [_cuda(), _cpu(), BackendStatus("reference", True, "plain torch, any device and dtype, where no other does")]


def _cpu() -> BackendStatus:
    from superblock.ops import native

    reason = native.missing()
    if reason is not None:
        return BackendStatus("cpu", False, reason)
    names = native.available()
    return BackendStatus("cpu", True, f"native core, {torch.get_num_threads()} threads, has {', '.join(names)}")


def _cuda() -> BackendStatus:
    if not torch.backends.cuda.is_built():
        return BackendStatus("cuda", False, f"torch {torch.__version__} was built without CUDA: install a CUDA build")
    if not torch.cuda.is_available():
        return BackendStatus("cuda", False, "torch sees no CUDA GPU here")
    if find_spec("triton") is None:
        return BackendStatus("cuda", False, "Triton is missing: pip install triton")
    from superblock.ops import tuning

    detail = f"Triton {version('triton')}, float16, bfloat16, float32, block sides 16, 32, 64, 128"
    return BackendStatus("cuda", True, f"{detail}; {tuning.results().describe()}")

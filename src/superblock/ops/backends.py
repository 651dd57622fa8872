"""Which backend multiplies: decided by device, dtype and block, imported on first use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from superblock.errors import BackendError
from superblock.ops import reference


@lru_cache(maxsize=256)
def select(device_type: str, dtype: torch.dtype, block_height: int, block_width: int) -> ModuleType:
    """The backend of a product; ``reference`` where no faster one takes it."""
    if device_type == "cpu":
        from superblock.ops import cpu

        if cpu.unsupported(dtype, block_height, block_width) is None:
            return cpu
        _warn_of_missing_core()
    elif device_type == "cuda":
        cuda = _cuda()
        if cuda.unsupported(dtype, block_height, block_width) is None:
            return cuda
    return reference


def fused(operation: str, x: torch.Tensor, *values: torch.Tensor) -> Callable[..., Any] | None:
    """The operation of the one backend that takes all of these weights on the CPU, or ``None``: then its steps run."""
    chosen = {select("cpu", x.dtype, *blocks.shape[1:]) for blocks in values}
    return getattr(chosen.pop(), operation, None) if len(chosen) == 1 else None


def _cuda() -> ModuleType:
    try:
        from superblock.ops import cuda
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise BackendError(
            "block-sparse products on a GPU need Triton, which is missing: pip install triton"
        ) from error
    return cuda


@lru_cache(maxsize=1)
def _warn_of_missing_core() -> None:
    from superblock.ops import native

    if (reason := native.missing()) is not None:
        warnings.warn(f"{reason}; until then block-sparse products on the CPU are slow", stacklevel=2)

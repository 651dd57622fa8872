"""Which backend multiplies: decided by device, dtype and block, imported on first use."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from superblock.ops import reference


@lru_cache(maxsize=256)
def select(device_type: str, dtype: torch.dtype, block_height: int, block_width: int) -> ModuleType:
    """The backend of a product; ``reference`` where no faster one takes it."""
    return reference

"""The products of block-sparse matrices: one specification, one backend a device."""

from superblock.ops.library import ACTIVATIONS, bsr_linear

__all__ = ["ACTIVATIONS", "bsr_linear"]

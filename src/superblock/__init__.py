"""SuperBlock: learn which blocks of a network's weights live, and multiply only those."""

from superblock.bsr import BSRMatrix
from superblock.checkpoint import load, save
from superblock.config import SupermaskConfig, TileSparsity
from superblock.convert import to_bsr
from superblock.errors import SuperBlockError
from superblock.masks import Supermask
from superblock.nn import BSRConv2d, BSRLinear, BSRMultiheadAttention
from superblock.ops import bsr_linear
from superblock.surgery import apply_supermask, score_parameters, sparsify_weights

__all__ = [
    "BSRConv2d",
    "BSRLinear",
    "BSRMatrix",
    "BSRMultiheadAttention",
    "SuperBlockError",
    "Supermask",
    "SupermaskConfig",
    "TileSparsity",
    "apply_supermask",
    "bsr_linear",
    "load",
    "save",
    "score_parameters",
    "sparsify_weights",
    "to_bsr",
]

"""Transformer encoders whose blocks run in one call of the native core, in inference on the CPU.

Between two products Python and torch come from the outer caches again, because a product has just swept the inner ones.
So everything is asked and prepared first, and the core then goes through all blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from superblock.errors import BackendError
from superblock.fuse import is_plain_sequence, watched
from superblock.ops import cpu, direct
from superblock.ops.prepared import Chain
from superblock.residual import ResidualBlock, ResidualEncoderBlock

_BLOCKS = (ResidualEncoderBlock, ResidualBlock)


def fuse_encoders(model: nn.Module) -> None:
    """Let every ``nn.Sequential`` of torchvision's or timm's transformer blocks run them in one call, in place.

    Modules, names and state stay as they are; only the container's class changes. Where a hook listens, something
    drops out or a gradient is asked for, blocks are called one after the other.
    """
    for module in model.modules():
        if is_plain_sequence(module) and len(module) and all(type(child) in _BLOCKS for child in module):
            module.__class__ = EncoderSequential


class EncoderSequential(nn.Sequential):
    """A sequence of transformer blocks."""

    def forward(self, input: Tensor) -> Tensor:
        whole = self._at_once(input)
        if whole is not None:
            return whole
        y: Tensor = super().forward(input)
        return y

    def _at_once(self, x: Tensor) -> Tensor | None:
        if not direct.infers_unseen(x) or not x.numel():
            return None
        blocks = []
        try:
            for block in self._modules.values():
                chains = _chains_of(block, x)
                if chains is None:
                    return None
                blocks.append(chains)
            return cpu.encoder(x, blocks) if blocks else None
        except BackendError:  # Another backend takes the products.
            return None


def _chains_of(block: nn.Module, x: Tensor) -> tuple[Chain, Chain] | None:
    if not isinstance(block, _BLOCKS) or type(block) not in _BLOCKS:  # A class derived from one may do more.
        return None
    return None if watched(block) else block.chains(x)

"""Sequences of known blocks that run in one call of the native core, in inference on the CPU.

Between two products Python and torch come from the outer caches again, because a product has just swept the inner ones.
So everything is asked and prepared first, and the core then goes through all blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from superblock.errors import BackendError
from superblock.fuse import is_plain_sequence, watched
from superblock.ops import cpu, direct
from superblock.ops.cpu_conv2d import Turns
from superblock.residual import ResidualBlock, ResidualConvolutions, ResidualEncoderBlock


def fuse_sequences(model: nn.Module) -> None:
    """Let every ``nn.Sequential`` of torchvision's or timm's transformer or ResNet blocks run in one call, in place.

    Modules, names and state stay as they are; only the container's class changes. Where a hook listens, something
    drops out or a gradient is asked for, blocks are called one after the other.
    """
    for module in model.modules():
        if not is_plain_sequence(module) or not len(module):
            continue
        for kind in (EncoderSequential, ConvolutionalSequential):
            if all(type(child) in kind.blocks for child in module):
                module.__class__ = kind


class _OneCall(nn.Sequential):
    blocks: tuple[type[nn.Module], ...]  # Those that it knows; a class derived from one may do more.

    def forward(self, input: Tensor) -> Tensor:
        whole = None
        blocks = list(self._modules.values())
        known = all(type(block) in self.blocks and not watched(block) for block in blocks)
        if blocks and known and direct.infers_unseen(input) and input.numel():
            try:
                whole = self._at_once(input, blocks)
            except BackendError:  # Another backend takes the products.
                whole = None
        if whole is not None:
            return whole
        y: Tensor = super().forward(input)
        return y

    def _at_once(self, x: Tensor, blocks: list[nn.Module]) -> Tensor | None:
        """The result, or ``None`` where blocks must be called."""
        raise NotImplementedError


class EncoderSequential(_OneCall):
    """A sequence of transformer blocks."""

    blocks = (ResidualEncoderBlock, ResidualBlock)

    def _at_once(self, x: Tensor, blocks: list[nn.Module]) -> Tensor | None:
        chains = []
        for block in blocks:
            assert isinstance(block, ResidualEncoderBlock | ResidualBlock)
            both = block.chains(x)
            if both is None:
                return None
            chains.append(both)
        return cpu.encoder(x, chains)


class ConvolutionalSequential(_OneCall):
    """A sequence of ResNet blocks."""

    blocks = (ResidualConvolutions,)

    def _at_once(self, x: Tensor, blocks: list[nn.Module]) -> Tensor | None:
        turns, y = Turns(), x
        for block in blocks if x.dim() == 4 else ():
            assert isinstance(block, ResidualConvolutions)
            deferred = block.defer(y, turns)
            if deferred is None:
                return None
            if y is not x:
                turns.release(y)
            y = deferred
        turns.run()
        return None if y is x else y

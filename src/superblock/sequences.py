"""Sequences of known blocks that run in one call of the native core, in inference on the CPU.

Between two products Python and torch come from the outer caches again, because a product has just swept the inner ones.
So everything is asked and prepared first, and the core then goes through all blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from superblock.errors import BackendError
from superblock.fuse import is_plain_sequence, watched
from superblock.nn import BSRConv2d
from superblock.ops import cpu, direct
from superblock.ops.cpu_conv2d import Turns
from superblock.residual import ResidualBlock, ResidualConvolutions, ResidualEncoderBlock


def fuse_sequences(model: nn.Module) -> None:
    """Let every ``nn.Sequential`` of torchvision's or timm's transformer or ResNet blocks run in one call, in place.

    Modules, names and state stay as they are; only the container's class changes. Where a hook listens, something
    drops out or gradients are on, blocks are called one after the other.
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
        if direct.infers_unseen(input) and input.numel():
            blocks = list(self._modules.values())
            if blocks and all(type(block) in self.blocks and not watched(block) for block in blocks):
                try:
                    whole = self._at_once(input, blocks)
                except BackendError:  # Another backend takes the products.
                    whole = None
        y: Tensor = super().forward(input) if whole is None else whole
        return y

    def _at_once(self, x: Tensor, blocks: list[nn.Module]) -> Tensor | None:
        """The result, or ``None`` where blocks must be called."""
        return None


class EncoderSequential(_OneCall):
    """A sequence of transformer blocks."""

    blocks = (ResidualEncoderBlock, ResidualBlock)

    def _at_once(self, x: Tensor, blocks: list[nn.Module]) -> Tensor | None:
        prepared = []  # With what they read, which lives until all has run: a layer may get other tensors meanwhile.
        for block in blocks:
            assert isinstance(block, ResidualEncoderBlock | ResidualBlock)
            halves = block.chains(x)
            if halves is None:
                return None
            prepared.append(halves)
        return cpu.encoder(x, [halves[:2] for halves in prepared])


class ConvolutionalSequential(_OneCall):
    """A sequence of ResNet blocks."""

    blocks = (ResidualConvolutions,)

    def _at_once(self, x: Tensor, blocks: list[nn.Module]) -> Tensor | None:
        plans = [block.convolutions() for block in blocks if isinstance(block, ResidualConvolutions)]
        if x.dim() != 4 or None in plans:
            return None
        turns, y = Turns(), x
        for plan in plans:
            assert plan is not None
            before, y = y, _defer(*plan, y, turns)
            if before is not x:
                turns.release(before)
        turns.run()
        return y


def _defer(stages: list[tuple[BSRConv2d, str]], shortcut: BSRConv2d | None, x: Tensor, turns: Turns) -> Tensor:
    """What a ResNet block will give."""
    residual = x if shortcut is None else shortcut.defer(x, shortcut.activation, None, turns)
    *inner, (last, activation) = stages
    y = x
    for conv, between in inner:
        before, y = y, conv.defer(y, between, None, turns)
        if before is not x:
            turns.release(before)
    z = last.defer(y, activation, residual, turns)
    for spent in (y, residual):
        if spent is not x:
            turns.release(spent)
    return z

"""Whether the flags of a command and a checkpoint say the same about what is masked."""

from __future__ import annotations

from torch import nn

from superblock.config import SupermaskConfig
from superblock.errors import ConfigError
from superblock.targets import select

KINDS = {"linear": "linear layers", "conv1x1": "1×1 convolutions", "conv": "other convolutions"}


def check_agreement(model: nn.Module, flags: SupermaskConfig, stored: SupermaskConfig, source: str) -> None:
    """Raise :class:`ConfigError` where ``flags`` contradict what ``source`` says of itself.

    Flags that give no sparsity say nothing. Those that do must give the same sparsity and tile for each kind of
    layer, and leave no layer dense that the file masks.

    Args:
        model: dense, of the file's architecture.
        flags: what the user asked for.
        stored: what the file was made with.
        source: the file's name.
    """
    if not flags.active:
        return
    for kind, noun in KINDS.items():
        asked, held = flags.target(kind), stored.target(kind)
        if asked and held is None:
            raise ConfigError(f"the flags give {noun} a sparsity, {source} masks none of them: drop the sparsity flags")
        if asked and held and asked != held:
            raise ConfigError(
                f"the flags give {noun} sparsity {asked.sparsity:g} in tiles of {asked.tile_size}, {source} has "
                f"{held.sparsity:g} in tiles of {held.tile_size}: drop the sparsity flags, the file says what is masked"
            )
    reached = {site.name for site in select(model, flags)}
    dense = [site.name for site in select(model, stored) if flags.target(site.kind) and site.name not in reached]
    if dense:
        raise ConfigError(f"the flags leave {dense[0]} dense, {source} masks it: drop the sparsity flags")

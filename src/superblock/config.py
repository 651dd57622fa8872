"""What to make sparse: frozen, validated on construction, stored in every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal, get_args

from superblock.errors import ConfigError
from superblock.whole import whole

Scope = Literal["all", "mlp"]
Rule = Literal["exact", "original"]
KINDS = ("linear", "conv1x1", "conv")


@dataclass(frozen=True)
class TileSparsity:
    """The share of tiles that are zero, and the side of a square tile in weights."""

    sparsity: float
    tile_size: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real) or not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0, 1), got {self.sparsity!r}: 0.9 keeps a tenth of the tiles")
        tile_size = whole(self.tile_size)
        if tile_size is None or tile_size < 1:
            raise ConfigError(f"tile size must be a whole number of at least 1, got {self.tile_size!r}")
        object.__setattr__(self, "sparsity", float(self.sparsity))  # Of numpy's numbers JSON takes none.
        object.__setattr__(self, "tile_size", tile_size)


@dataclass(frozen=True)
class SupermaskConfig:
    """Which weights of a model get a Supermask, by kind of layer.

    ``linear`` covers every linear layer (attention projections included), ``conv1x1`` the convolutions
    whose kernel is one position, ``conv`` all others; a kind left at ``None`` stays dense. ``scope="mlp"``
    keeps to feed-forward layers. ``include`` and ``exclude`` are shell patterns over layer names
    (``encoder.layers.*.mlp.*``); an empty ``include`` means every name. ``rule`` says how scores become a mask:
    ``exact`` as :class:`superblock.Supermask` does, ``original`` as the SuperBlock of 2024 did, for its checkpoints.
    """

    linear: TileSparsity | None = None
    conv1x1: TileSparsity | None = None
    conv: TileSparsity | None = None
    skip_last_layer: bool = False
    skip_first_transformer: bool = False
    scope: Scope = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        for name, choices in (("scope", get_args(Scope)), ("rule", get_args(Rule))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for kind in KINDS:
            target = getattr(self, kind)
            if target is not None and not isinstance(target, TileSparsity):
                raise ConfigError(f"{kind} must be a TileSparsity(sparsity, tile_size) or None, got {target!r}")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            listed = isinstance(patterns, Iterable) and not isinstance(patterns, str)
            if not listed or not all(isinstance(pattern, str) for pattern in patterns):
                raise ConfigError(f"{name} must be a tuple of patterns, as ('encoder.*',), got {patterns!r}")
            object.__setattr__(self, name, tuple(patterns))

    def target(self, kind: str) -> TileSparsity | None:
        """The target of a kind of layer: ``linear``, ``conv1x1`` or ``conv``."""
        target: TileSparsity | None = getattr(self, kind)
        return target

    @property
    def active(self) -> bool:
        """Whether any kind of layer is to be masked."""
        return any(self.target(kind) for kind in KINDS)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as checkpoints store them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> SupermaskConfig:
        """The inverse of :meth:`to_dict`."""
        targets: dict[str, Any] = {kind: TileSparsity(**plain[kind]) for kind in KINDS if plain.get(kind)}
        return cls(**{**plain, **targets})

"""What to make sparse: frozen, validated on construction, stored in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from superblock.errors import ConfigError

Scope = Literal["all", "mlp"]
Rule = Literal["exact", "original"]


@dataclass(frozen=True)
class TileSparsity:
    """The share of tiles that are zero, and the side of a square tile in weights."""

    sparsity: float
    tile_size: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0, 1), got {self.sparsity}: 0.9 keeps a tenth of the tiles")
        if isinstance(self.tile_size, bool) or int(self.tile_size) != self.tile_size or self.tile_size < 1:
            raise ConfigError(f"tile size must be a whole number of at least 1, got {self.tile_size}")


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
        for name in ("include", "exclude"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def target(self, kind: str) -> TileSparsity | None:
        """The target of a kind of layer: ``linear``, ``conv1x1`` or ``conv``."""
        target: TileSparsity | None = getattr(self, kind)
        return target

    @property
    def active(self) -> bool:
        """Whether any kind of layer is to be masked."""
        return any((self.linear, self.conv1x1, self.conv))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as checkpoints store them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> SupermaskConfig:
        """The inverse of :meth:`to_dict`."""
        targets: dict[str, Any] = {
            kind: TileSparsity(**plain[kind]) for kind in ("linear", "conv1x1", "conv") if plain.get(kind)
        }
        return cls(**{**plain, **targets})

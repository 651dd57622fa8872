"""What was done to a model, layer by layer, as objects and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One masked, folded or converted weight.

    ``tile`` is the tile's (after conversion the block's) extent in every dimension, ``grid`` how many there are,
    ``target`` and ``sparsity`` the wanted and the real share of zero tiles, ``zeros`` and ``parameters`` counts
    of weights, ``note`` what the user should know.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    tile: tuple[int, ...]
    grid: tuple[int, ...]
    target: float | None
    sparsity: float
    zeros: int
    parameters: int
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All layers touched by one call, and the totals that follow from them.

    ``parameters`` counts the whole model's, scores excluded.
    """

    layers: tuple[LayerReport, ...]
    parameters: int

    @property
    def masked_sparsity(self) -> float:
        """Zero weights over all weights of the layers in this report."""
        return self._zeros / max(1, sum(layer.parameters for layer in self.layers))

    @property
    def model_sparsity(self) -> float:
        """Zero weights in dead tiles over all parameters of the model."""
        return self._zeros / max(1, self.parameters)

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks of all layers, each with the layer's name."""
        return tuple(f"{layer.name}: {layer.note}" for layer in self.layers if layer.note)

    @property
    def _zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    def totals(self) -> str:
        """Both sparsities in one line."""
        return (
            f"sparsity of the {len(self.layers)} masked weights {self.masked_sparsity:.2%}, "
            f"of the whole model {self.model_sparsity:.2%} ({self.parameters:,} parameters)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as the commands write them to JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "parameters": self.parameters,
            "masked_sparsity": self.masked_sparsity,
            "model_sparsity": self.model_sparsity,
        }

    def __str__(self) -> str:
        header = ("layer", "kind", "shape", "tile", "grid", "target", "sparsity", "note")
        rows = [
            (
                layer.name,
                layer.kind,
                _times(layer.shape),
                _times(layer.tile),
                _times(layer.grid),
                "" if layer.target is None else f"{layer.target:.2%}",
                f"{layer.sparsity:.2%}",
                layer.note,
            )
            for layer in self.layers
        ]
        return "\n".join([*text_table(header, rows), self.totals()])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], separator: str = "  ") -> list[str]:
    """Lines of left-aligned columns under a ruled header."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [
        separator.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    ]
    return [lines[0], separator.join("-" * width for width in widths), *lines[1:]]


def _times(sides: tuple[int, ...]) -> str:
    return "×".join(str(side) for side in sides)

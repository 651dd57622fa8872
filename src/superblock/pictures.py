"""Pictures of masks and of measurements, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from superblock.files import write_atomically
from superblock.inspection import LayerMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEAD = "#e6e6e6"
LETTERS = 10  # An inch of a title.


def draw_masks(masks: Sequence[LayerMask], folder: str | Path) -> list[Path]:
    """One heat map a weight, ``<folder>/<name>.png``: dead tiles grey, living ones shaded by their score."""
    return [draw_mask(mask, Path(folder) / f"{mask.name or 'weight'}.png") for mask in masks]


def draw_mask(mask: LayerMask, path: str | Path) -> Path:
    """The heat map of one mask; without scores all living tiles have one colour."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    rows, columns = mask.mask.shape
    longest = max(rows, columns)
    width, height = (max(1.2, 6 * side / longest) for side in (columns, rows))
    figure, axes = _figure(width + 1.6, height + 0.9)
    living = mask.mask.numpy()
    shades = np.ones(living.shape) if mask.scores is None else mask.scores.float().numpy()
    palette = colormaps["viridis"].with_extremes(bad=DEAD)
    image = axes.imshow(
        np.ma.masked_where(~living, shades), cmap=palette, interpolation="nearest", aspect="equal", resample=False
    )
    if mask.scores is not None and living.any():
        figure.colorbar(image, ax=axes, label="score", shrink=0.8)
    name = "\n".join(textwrap.wrap(mask.name, int(figure.get_figwidth() * LETTERS)))
    axes.set_title(f"{name}\n{living.mean():.1%} of {rows} × {columns} tiles live", fontsize=9)
    axes.set_xlabel("inputs (tiles)", fontsize=8)
    axes.set_ylabel("outputs (tiles)", fontsize=8)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _write(figure, path)


def draw_accuracy(curves: Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Accuracy over epochs, one line a model: ``{"dense": [91.2, …]}``, in per cent."""
    figure, axes = _figure(6, 4)
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    return _write(figure, path)


def draw_latency(points: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> Path:
    """Latency against sparsity, one line a form: ``{"bsr": [(0.8, 12.5), …]}``, in milliseconds a batch."""
    figure, axes = _figure(6, 4)
    for name, line in points.items():
        ordered = sorted(line)
        axes.plot([sparsity for sparsity, _ in ordered], [ms for _, ms in ordered], marker="o", label=name)
    axes.set_xlabel("sparsity of the masked layers")
    axes.set_ylabel("latency (ms a batch)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return _write(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure that no window system and no global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _write(figure: Figure, path: str | Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    return Path(path)

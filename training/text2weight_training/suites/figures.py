"""Figures on disk: `STEM.png` and `STEM.svg`, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text2weight_training.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure with its panels side by side; `options` go to `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4.2), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(panels[0])


def new_grid(rows: int, columns: int, side: float) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure of pictures: rows of square panels without ticks, `side` inches each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side * columns, side * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    return figure, [list(row) for row in panels]


def plot_interval(axes: Axes, height: float, entry: dict[str, Any], **style: Any) -> None:
    """A measured share as a dot at `height`, in percent, with its interval as a line."""
    value, (low, high) = entry["value"], entry["interval"]
    # A resampled mean of equal values may miss their mean by a rounding error.
    reach = [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]
    axes.errorbar([100 * value], [height], xerr=reach, marker="o", linestyle="none", **style)


def plot_band(
    axes: Axes, places: Sequence[float], entries: Sequence[dict[str, Any]], unit: float, **style: Any
) -> None:
    """A line of measured values over `places`, multiplied by `unit`, with their intervals as a band."""
    (line,) = axes.plot(places, [unit * entry["value"] for entry in entries], **style)
    low, high = zip(*(entry["interval"] for entry in entries), strict=True)
    axes.fill_between(
        places, [unit * x for x in low], [unit * x for x in high], alpha=0.15, linewidth=0, color=line.get_color()
    )


def save_figure(figure: Figure, stem: Path) -> None:
    """Write a figure to `stem`.png and `stem`.svg, each whole or not at all."""
    import matplotlib

    # Without a fixed salt and with a date, equal drawings would differ as files.
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            with atomic_path(stem.with_name(f"{stem.name}.{kind}")) as temporary:
                figure.savefig(temporary, dpi=150, format=kind, metadata=metadata)

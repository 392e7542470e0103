"""The shared style of all figures, and how one is saved and shown."""

import io
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#3b6ea5", "#d9822b", "#4a9a6a", "#c9ced6"
TEXT = "#30343b"
DPI = 150
WIDTH = 8.0  # inches: 1,200 pixels, a README's column at twice its density


class Plot(Figure):
    """A figure that a notebook shows as a picture by itself, without pyplot and without a magic command."""

    def _repr_png_(self) -> tuple[bytes, dict]:
        """(PNG, its size on the page in CSS pixels: 100 to the inch, so that small print stays sharp)."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        width, height = self.get_size_inches()
        return buffer.getvalue(), {"width": round(100 * width), "height": round(100 * height)}


def new_figure(rows: int = 1, columns: int = 1, height: float = 3.4) -> tuple[Figure, np.ndarray]:
    """An empty figure in the shared style and its (rows, columns) axes."""
    figure = Plot(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=TEXT, labelsize=9)
        axis.title.set_color(TEXT)
        axis.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: str | Path) -> Figure:
    """Writes the figure as PNG, whole or not at all, and returns it for display."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return figure

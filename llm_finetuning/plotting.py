"""The shared style of all figures, and how one is saved and shown."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.spines import Spine
from matplotlib.text import Text

from llm_finetuning.files.atomic import writing

BLUE, ORANGE, GREEN, GREY = "#4580bf", "#d9822b", "#4a9a6a", "#c9ced6"
TEXT = "#757e8a"
"""A grey that is read on white and on a dark page alike: figures have no background of their own."""
DPI = 150
WIDTH = 8.0  # inches: 1,200 pixels, a README's column at twice its density


class Plot(Figure):
    """A figure that a notebook shows as a picture by itself, without pyplot and without a magic command."""

    def savefig(self, target: Any, **options: Any) -> None:
        """Writes the figure without a background, its letters and lines in a grey that any page's shows."""
        for artist in self.findobj(lambda artist: isinstance(artist, (Text, Spine))):
            (artist.set_color if isinstance(artist, Text) else artist.set_edgecolor)(TEXT)
        for axis in self.axes:
            axis.tick_params(color=TEXT)
        super().savefig(target, transparent=True, **options)

    def _repr_png_(self) -> tuple[bytes, dict]:
        """Returns the PNG, its size on the page and its alt text.

        The size is in CSS pixels: 100 to the inch, so that small print stays sharp.
        """
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        width, height = self.get_size_inches()
        return buffer.getvalue(), {"width": round(100 * width), "height": round(100 * height), "alt": self.alt_text()}

    def alt_text(self) -> str:
        """Returns what the figure shows, in words: the title of each plot, and what is drawn over what."""
        plots = []
        for axis in self.axes:
            title = "".join(axis.get_title(place) for place in ("left", "center", "right"))
            drawn = " over ".join(filter(None, [axis.get_ylabel(), axis.get_xlabel()]))
            plots.append(": ".join(filter(None, [title, drawn])))
        return " ".join("; ".join(filter(None, [self.get_suptitle(), *plots])).split())


def new_figure(rows: int = 1, columns: int = 1, height: float = 3.4) -> tuple[Figure, np.ndarray]:
    """Returns an empty figure in the shared style and its (rows, columns) axes."""
    figure = Plot(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=TEXT, labelsize=9)
        axis.title.set_color(TEXT)
        axis.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: str | Path) -> Figure:
    """Writes the figure as PNG, atomically, and returns it for display."""
    with writing(Path(path)) as partial:
        figure.savefig(partial, format="png")
    return figure

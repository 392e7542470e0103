"""Figures of the evaluation."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm_finetuning.evaluation.report import HIGHER_IS_BETTER, LOWER_IS_BETTER
from llm_finetuning.evaluation.scoreboard import MEASURES
from llm_finetuning.plotting import BLUE, DPI, GREEN, ORANGE, Plot

BARS = ("loss", "stop_rate", "repetition_rate", "exact_match", "rank_agreement")


def scoreboard_bars(board: dict) -> Figure:
    """Loss, stop rate, repetition rate and, where measured, exact match and agreement with ranks of each column."""
    measures = [name for name in MEASURES if name in BARS and name in next(iter(board.values()))]
    figure = Plot(figsize=(2.4 * len(measures), 3.0), layout="constrained", dpi=DPI)
    colours = [ORANGE, BLUE, GREEN]
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        values = [scores[measure] for scores in board.values()]
        bars = axes.bar(list(board), values, color=colours[: len(values)], width=0.65)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=2)
        axes.set_title(f"{measure.replace('_', ' ')}\n({better(measure)})", fontsize=9)
        axes.set_ylim(0, max(max(values) * 1.15, 0.1) if measure == "loss" else 1.12)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def with_intervals(record: dict[str, dict]) -> Figure:
    """Each figure of an evaluation as a panel: every model's value with its 95% interval.

    record: {model: {figure: {"value", "low", "high", "n"}}}.
    """
    names = list(dict.fromkeys(name for found in record.values() for name in found))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    height = rows * (0.7 + 0.32 * len(record))
    figure = Plot(figsize=(3.2 * columns, height), layout="constrained", dpi=DPI)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, name, {model: found[name] for model, found in record.items() if name in found})
    for axes in panels[len(names) :]:  # what is left of the last row
        axes.set_axis_off()
    return figure


def _panel(axes: Axes, name: str, found: dict[str, dict]) -> None:
    """One figure: a dot for each model, from top to bottom, with a bar from the interval's low to its high end."""
    for place, each in enumerate(found.values()):
        low, high = (each["value"] if each[end] is None else each[end] for end in ("low", "high"))
        colour = (ORANGE, BLUE, GREEN)[place % 3]
        axes.plot([low, high], [-place, -place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([each["value"]], [-place], "o", color=colour, markersize=6)
    axes.set_yticks([-place for place in range(len(found))], list(found))
    axes.set_ylim(0.6 - len(found), 0.6)
    axes.set_title(f"{name.replace('_', ' ')}{f' ({better(name)})' if better(name) else ''}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)  # numbers of five characters run into one another otherwise
    axes.spines[["top", "right"]].set_visible(False)


def better(name: str) -> str:
    """Returns "lower is better", "higher is better", or "" for a figure that is neither."""
    return "lower is better" if name in LOWER_IS_BETTER else "higher is better" if name in HIGHER_IS_BETTER else ""

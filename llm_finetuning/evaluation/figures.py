"""Figures of the evaluation."""

from matplotlib.figure import Figure

from llm_finetuning.plotting import BLUE, DPI, GREEN, ORANGE, Plot


def scoreboard_bars(board: dict) -> Figure:
    """Loss, stop rate, repetition rate and, where measured, exact match and agreement with ranks of each column."""
    shown = ("loss", "stop_rate", "repetition_rate", "exact_match", "rank_agreement")
    measures = [name for name in shown if name in next(iter(board.values()))]
    figure = Plot(figsize=(2.4 * len(measures), 3.0), layout="constrained", dpi=DPI)
    colours = [ORANGE, BLUE, GREEN]
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        values = [scores[measure] for scores in board.values()]
        bars = axes.bar(list(board), values, color=colours[: len(values)], width=0.65)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=2)
        axes.set_title(measure.replace("_", " "))
        axes.set_ylim(0, max(max(values) * 1.15, 0.1) if measure == "loss" else 1.12)
        axes.spines[["top", "right"]].set_visible(False)
    return figure

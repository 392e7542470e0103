"""Draws the figures of the data preparation; each function takes plain data and returns a Figure."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llm_finetuning.plotting import BLUE, DPI, GREEN, GREY, ORANGE, TEXT, WIDTH, Plot, new_figure

MOST_BARS = 12


def funnel(table: pd.DataFrame, title: str) -> Figure:
    """Draws what each step kept (blue) and dropped (orange) as bars; each unit has a panel of its own."""
    units = list(dict.fromkeys(table["unit"]))
    sizes = [int((table["unit"] == unit).sum()) for unit in units]
    figure = Plot(figsize=(WIDTH, 1.2 + 0.34 * sum(sizes) + 0.25 * len(units)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(units), 1, squeeze=False, gridspec_kw={"height_ratios": sizes})
    for axis, unit in zip(panels[:, 0], units, strict=True):
        _funnel_panel(axis, table[table["unit"] == unit], unit)
    handles = [Patch(color=colour, label=name) for name, colour in (("kept", BLUE), ("dropped", ORANGE))]
    figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(title, color=TEXT, fontsize=12, x=0.01, ha="left")
    return figure


def _funnel_panel(axis: Axes, steps: pd.DataFrame, unit: str) -> None:
    places = np.arange(len(steps))
    full = max(int((steps["kept"] + steps["dropped"]).max()), 1)
    axis.barh(places, steps["kept"], color=BLUE, height=0.7)
    axis.barh(places, steps["dropped"], left=steps["kept"], color=ORANGE, height=0.7)
    for place, kept, dropped in zip(places, steps["kept"], steps["dropped"], strict=True):
        label = f"{kept:,}" + (f"  (−{dropped:,})" if dropped else "")
        axis.text(kept + dropped + full * 0.01, place, label, va="center", fontsize=9, color=TEXT)
    axis.set_yticks(places, steps["step"], fontsize=9, color=TEXT)
    axis.set_ylim(len(steps) - 0.5, -0.5)
    axis.set_xlim(0, full * 1.22)
    axis.set_xticks([])
    axis.set_title(f"{unit}s", fontsize=9, loc="right", color=TEXT)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(length=0)


def languages(messages: Mapping[str, int] | None, pairs: Mapping[str, int], title: str) -> Figure:
    """Draws messages of the source and pairs that are left by language; rare languages share a bar."""
    panels = [("pairs in the file", pairs, BLUE)]
    if messages:
        panels.insert(0, ("messages in the source", messages, GREY))
    bars = {name: _with_others(counts) for name, counts, _ in panels}
    rows = max(map(len, bars.values()))
    figure, axes = new_figure(1, len(panels), height=1.1 + 0.24 * rows)
    for axis, (name, _, colour) in zip(axes[0], panels, strict=True):
        _bars(axis, bars[name], rows, colour)
        axis.set_title(name, fontsize=10, loc="left")
    figure.suptitle(title, color=TEXT, fontsize=12, x=0.01, ha="left")
    return figure


def _with_others(counts: Mapping[str, int]) -> dict[str, int]:
    frequent = dict(list(counts.items())[: MOST_BARS - 1])
    rest = sum(counts.values()) - sum(frequent.values())
    others = len(counts) - len(frequent)
    return dict(counts) if others <= 1 else frequent | {f"{others} others": rest}


def _bars(axis: Axes, counts: Mapping[str, int], rows: int, colour: str) -> None:
    """Draws bars from the top, as thick as if there were `rows` of them."""
    places, values = np.arange(len(counts)), list(counts.values())
    axis.barh(places, values, color=colour, height=0.7)
    for place, value in zip(places, values, strict=True):
        axis.text(value + max(values) * 0.015, place, f"{value:,}", va="center", fontsize=9, color=TEXT)
    axis.set_yticks(places, list(counts), fontsize=9)
    axis.set_ylim(rows - 0.5, -0.5)
    axis.set_xlim(0, max(values) * 1.18)
    axis.set_xticks([])
    axis.spines[["bottom"]].set_visible(False)
    axis.tick_params(length=0)


def shape(panels: Mapping[str, Mapping[str, Mapping[str, int]]], title: str) -> Figure:
    """Draws a column chart for each of `panels`: axis label → {series: {value: count}}, series side by side.

    Each series is drawn as shares of its own sum, so that shapes compare; the legend holds the sums.
    """
    figure, axes = new_figure(1, len(panels), height=3.4)
    for axis, (label, series) in zip(axes[0], panels.items(), strict=True):
        width = 0.8 / len(series)
        for place, ((name, counts), colour) in enumerate(zip(series.items(), (GREY, BLUE), strict=False)):
            values = {int(value): count for value, count in counts.items()}
            total = max(sum(values.values()), 1)
            offset = (place - (len(series) - 1) / 2) * width
            shares = [count / total for count in values.values()]
            axis.bar([v + offset for v in values], shares, color=colour, width=width, label=f"{name}: {total:,}")
        axis.set_xlabel(label, fontsize=9, color=TEXT)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axis.set_ylim(0, 1.3 * max(axis.get_ylim()[1] / 1.05, 0.01))
        axis.legend(fontsize=9, frameon=False, loc="upper right")
    figure.suptitle(title, color=TEXT, fontsize=12, x=0.01, ha="left")
    return figure


def token_lengths(lengths: pd.DataFrame, max_seq_length: int, title: str) -> Figure:
    """Draws histograms of the tokens in prompt, history, response and pair, the last with the cut-off line."""
    figure, axes = new_figure(2, 2, height=4.6)
    colours = {"prompt": GREY, "history": GREEN, "response": ORANGE, "total": BLUE}
    for axis, (part, colour) in zip(axes.flat, colours.items(), strict=True):
        values = lengths[part]
        end = max(float(values.quantile(0.99)), 1.0)
        end = max(end, 1.15 * max_seq_length) if part == "total" else end
        axis.hist(values.clip(upper=end), bins=40, range=(0, end), color=colour)
        beyond = int((values > end).sum())
        axis.set_title(f"{part}: mean {values.mean():,.0f}, median {values.median():,.0f}", fontsize=10, loc="left")
        axis.set_xlabel("tokens" + (f" (last bar: {beyond:,} longer ones too)" if beyond else ""), fontsize=9)
        axis.set_ylabel("pairs", fontsize=9, color=TEXT)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _cut_off(axes[1, 1], lengths["total"], max_seq_length)
    figure.suptitle(title, color=TEXT, fontsize=12, x=0.01, ha="left")
    return figure


def _cut_off(axis: Axes, totals: pd.Series, max_seq_length: int) -> None:
    share = float((totals > max_seq_length).mean())
    axis.axvline(max_seq_length, color=TEXT, linestyle="--", linewidth=1.2)
    axis.text(
        max_seq_length,
        axis.get_ylim()[1] * 0.97,
        f"limit {max_seq_length:,} \n{share:.1%} beyond ",
        ha="right",
        va="top",
        fontsize=9,
        color=TEXT,
    )

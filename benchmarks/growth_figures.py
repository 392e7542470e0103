"""How cost grows, one figure for each part: log axes, a line for every family of points and its exponent."""

import statistics

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llm_finetuning.plotting import BLUE, GREEN, ORANGE, TEXT, Figure, new_figure

FILES = {
    "data preparation": "growth_data_preparation.png",
    "training": "growth_training.png",
    "inference": "growth_inference.png",
}
"""First word of a figure's name → the picture of its part, in docs/."""

UNITS = {"s": "seconds"}


def pictures(reports: list[dict]) -> dict[str, Figure]:
    """{file name: figure} of the parts whose growth was measured."""
    found = {}
    for part, name in FILES.items():
        families = [f for report in reports for f in families_of(report) if f["part"].startswith(part)]
        if families:
            found[name] = picture(part, families)
    return found


def families_of(report: dict) -> list[dict]:
    """Families of points: machine, part, what, axis, unit, points (size, median) and their exponent."""
    found: dict[str, dict] = {}
    for entry in report["figures"]:
        if "growth" not in entry:
            continue
        part, _, what = entry["growth"].partition(": ")
        known = {"machine": report["machine"]["name"], "part": part, "what": what, "axis": entry["axis"], "points": []}
        family = found.setdefault(entry["growth"], known)
        if "at" in entry:
            family["unit"] = entry["unit"]
            family["points"].append((entry["at"], entry["median"]))
        else:
            family["exponent"] = entry["median"]
    return list(found.values())


def picture(part: str, families: list[dict]) -> Figure:
    """The points of every family of a part on one pair of log axes, and the power law through them."""
    figure, axes = new_figure(height=3.6)
    axis, machines = axes[0, 0], {family["machine"] for family in families}
    for place, family in enumerate(families):
        sizes, values = zip(*family["points"], strict=True)
        colour = (BLUE, ORANGE, GREEN)[place % 3]
        label = f"{family['what']}: size to the power {family['exponent']:.2f}"
        label += f"\n{family['machine']}" if len(machines) > 1 else ""
        axis.plot(sizes, values, "o", color=colour, ms=6)
        axis.plot(sizes, power_law(sizes, values, family["exponent"]), "-", color=colour, lw=1.2, label=label)
    axis.set(xscale="log", yscale="log", xlabel=families[0]["axis"], ylabel=UNITS[families[0]["unit"]])
    ticks = apart({size for family in families for size, _ in family["points"]})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=9, loc="outside lower left", ncols=2)  # the grid would cross it
    where = f", on {machines.pop()}" if len(machines) == 1 else ""
    figure.suptitle(f"How {part} grows{where}", color=TEXT, fontsize=12, x=0.01, ha="left")
    return figure


def apart(sizes: set[int]) -> list[int]:
    """The sizes in order, without those whose label would run into the one before."""
    ticks: list[int] = []
    for size in sorted(sizes):
        if not ticks or size > 1.5 * ticks[-1]:
            ticks.append(size)
    return ticks


def power_law(sizes: tuple[int, ...], values: tuple[float, ...], exponent: float) -> list[float]:
    """The fitted line at `sizes`: it passes through the geometric mean of the points."""
    middle = statistics.geometric_mean(values) / statistics.geometric_mean(sizes) ** exponent
    return [middle * size**exponent for size in sizes]

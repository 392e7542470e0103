"""Figures of training: the loss as it falls, and before / after / merged side by side."""

import math
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm_finetuning.plotting import BLUE, DPI, GREEN, GREY, ORANGE, Plot, new_figure

if TYPE_CHECKING:
    from llm_finetuning.training.rate_search import RateSearch


def curves(entries: list[dict]) -> Figure:
    """The figure of a run: of its pairs where there are such, else of its loss."""
    return preference_curves(entries) if any("accuracy" in entry for entry in entries) else loss_curve(entries)


def preference_curves(entries: list[dict]) -> Figure:
    """Preference tuning by step: accuracy, log-likelihoods apart, and how far it went from the finetuned model."""
    figure = Plot(figsize=(8, 6), layout="constrained", dpi=DPI)
    accuracy, apart, loss, kl = figure.subplots(2, 2, sharex=True).ravel()
    trained = [entry for entry in entries if "rewards/accuracies" in entry]
    held_out = [entry for entry in entries if "accuracy" in entry]

    def draw(axes: Axes, drawn: list[dict], name: str, label: str, colour: str, style: str = "o-") -> None:
        axes.plot([e["step"] for e in drawn], [e[name] for e in drawn], style, color=colour, lw=1.4, ms=4, label=label)

    draw(accuracy, trained, "rewards/accuracies", "training, against the reference", BLUE, "-")
    draw(accuracy, held_out, "accuracy", "held-out pairs", ORANGE)
    draw(apart, held_out, "chosen_logp", "chosen", GREEN)
    draw(apart, held_out, "rejected_logp", "rejected", ORANGE)
    draw(loss, held_out, "held_out_loss", "held-out responses", ORANGE)
    draw(kl, held_out, "kl", "from the finetuned model", BLUE)
    accuracy.set(title="Accuracy (higher is better)")
    apart.set(title="Log-likelihood, nats per token")
    loss.set(title="Held-out loss, nats per token (lower is better)", xlabel="optimizer step")
    kl.set(title="KL divergence, nats per token", xlabel="optimizer step")
    accuracy.set_ylim(0, 1.05)
    for axes, name in ((loss, "held_out_loss"), (kl, "kl")):
        finite = [entry[name] for entry in held_out if math.isfinite(entry[name])]
        axes.set_ylim(0, 1.2 * max(finite, default=1) or 1)
    for axes in (accuracy, apart, loss, kl):
        axes.title.set_fontsize(9)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def loss_curve(entries: list[dict], title: str = "Loss") -> Figure:
    """Training loss per step, held-out loss at each evaluation, and the learning rate below; from metrics.jsonl."""
    figure = Plot(figsize=(8, 4.5), layout="constrained", dpi=DPI)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    trained = [entry for entry in entries if "loss" in entry]
    held_out = [entry for entry in entries if "held_out_loss" in entry]
    above.plot([e["step"] for e in trained], [e["loss"] for e in trained], color=BLUE, lw=1.2, label="training")
    above.plot(
        [e["step"] for e in held_out],
        [e["held_out_loss"] for e in held_out],
        "o-",
        color=ORANGE,
        lw=1.5,
        ms=5,
        label="held-out answers",
    )
    above.set(title=title, ylabel="nats per token (lower is better)")
    if trained or held_out:
        above.set_ylim(bottom=0)
        above.legend(frameon=False)
    rates = [(e["step"], e["learning_rate"]) for e in trained if "learning_rate" in e]
    below.plot([step for step, _ in rates], [rate for _, rate in rates], color=GREEN, lw=1.2)
    below.set(xlabel="optimizer step", ylabel="learning\nrate")
    below.yaxis.set_major_formatter("{x:g}")  # no factor above the axis
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def loss_by_rate(search: "RateSearch") -> Figure:
    """Held-out loss over the learning rate with 95% intervals; the best rate, and the given one as a line."""
    figure, ((axes,),) = new_figure(height=3.0)
    found = {rate: sample.figure() for rate, sample in search.finite.items()}
    axes.plot(list(found), [each["value"] for each in found.values()], "o-", color=BLUE, lw=1.2, ms=5)
    for rate, each in found.items():
        if each["low"] is not None:
            axes.plot([rate, rate], [each["low"], each["high"]], color=BLUE, lw=1.2)
    best = search.best
    axes.plot([best], [found[best]["value"]], "o", color=ORANGE, ms=9, label=f"best: {best:g}")
    axes.axvline(search.given, color=GREY, zorder=0, label=f"given: {search.given:g}")
    axes.set_xscale("log")
    axes.set_xticks(list(search.losses), [f"{rate:g}" for rate in search.losses])
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel=f"{search.unit} (lower is better)")
    axes.set_title(f"Held-out loss after {search.steps} steps, with 95% intervals", fontsize=10)
    axes.legend(frameon=False)
    return figure

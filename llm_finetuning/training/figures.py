"""Figures of training: the loss as it falls, and before / after / merged side by side."""

from matplotlib.figure import Figure

from llm_finetuning.plotting import BLUE, DPI, GREEN, ORANGE, Plot


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

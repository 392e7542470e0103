"""What preference tuning changes, measured on held-out pairs of a chosen and a rejected response."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from llm_finetuning.evaluation import agreement, intervals, mode, scoreboard
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.evaluation.likelihood import SLICE
from llm_finetuning.files.atomic import read_json
from llm_finetuning.prompts import IGNORE_INDEX, Template
from llm_finetuning.settings import PreferenceTuning

COMPARED = 32
"""Held-out responses on which a model is compared with its reference token by token."""
COMPARABLE = ("accuracy", "margin", "chosen_logp", "rejected_logp")
"""What is known of each pair, so that two models are compared on the same ones."""
WATCHED = (*COMPARABLE, "kl")
"""What an evaluation notes of the pairs."""
GREW = 1.25
"""From which factor on a held-out loss or the length of answers is said to have grown."""


def likelihoods(model: torch.nn.Module, ranked: Sequence[dict], template: Template) -> dict[str, Sample]:
    """Figures of ranked pairs (`agreement.ranked_pairs`), from one forward pass over both responses.

    accuracy: share in which the chosen response has the higher log-likelihood per token, which is the scoreboard's
    rank_agreement. margin: that of the chosen less that of the rejected response, nats per token. chosen_logp,
    rejected_logp: mean log-likelihood of a token.
    """
    found = agreement.losses(model, ranked, template)
    per_token = [value / weight for value, weight in zip(found.values, found.weights, strict=True)]
    ranks = agreement.figures(found)
    return ranks | {
        "accuracy": ranks["rank_agreement"],
        "margin": Sample([b - a for a, b in zip(per_token[::2], per_token[1::2], strict=True)], [1.0] * len(ranked)),
        "chosen_logp": Sample([-value for value in found.values[::2]], found.weights[::2]),
        "rejected_logp": Sample([-value for value in found.values[1::2]], found.weights[1::2]),
    }


def divergence(
    model: torch.nn.Module, as_reference: Callable[[], AbstractContextManager], examples: list[dict]
) -> Sample:
    """KL divergence of the model from its reference at each token of given responses, in nats per token.

    as_reference: a block in which the model is its reference. Of the whole next-token distributions, after the prompt
    and the response so far.
    """
    summed, counts = [], []
    with mode.evaluating(model):
        for example in examples:
            ours = _logits(model, example)
            with as_reference():
                theirs = _logits(model, example)
            summed.append(sum(map(_divergence, ours.split(SLICE), theirs.split(SLICE))))
            counts.append(len(ours))
    return Sample(summed, counts)


def _logits(model: torch.nn.Module, example: dict) -> torch.Tensor:
    """Logits (T, V) at the tokens of an example that are in the loss."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([example["input_ids"]], device=device), use_cache=False).logits[0, :-1]
    return logits[torch.tensor(example["labels"][1:], device=device) != IGNORE_INDEX]


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the distributions of logits (T, V), computed in float32, summed over the tokens."""
    ours, theirs = (logits.float().log_softmax(-1) for logits in (ours, theirs))
    return float((ours.exp() * (ours - theirs)).sum(-1).double().sum())


@mode.within_memory(mode.while_measuring)
def column(
    name: str,
    model: torch.nn.Module,
    held_out: list[dict],
    template: Template,
    settings: PreferenceTuning,
    ranked: Sequence[dict],
    kl: Sample | None = None,
) -> dict:
    """Measures a column of preference_scoreboard.json, `before`, `after` or `merged`; returns the scoreboard.

    The scoreboard's figures, and those of `likelihoods`; `units` holds what was found on each pair, `change` what
    became of it since `before`, which begins a new scoreboard.
    """
    found, path = likelihoods(model, ranked, template), settings.folders.scoreboard
    more = found if kl is None else found | {"kl": kl}
    measured = scoreboard.measure(model, held_out, template, settings, more=more)
    measured["units"] = {figure: asdict(found[figure]) for figure in COMPARABLE}
    if name == "before":
        path.unlink(missing_ok=True)
    else:
        units = read_json(path)["before"]["units"]
        measured["change"] = {n: intervals.difference(Sample(**units[n]), found[n]) for n in COMPARABLE}
    return scoreboard.record(path, **{name: measured})


def published(
    folder: Path,
    held_out: list[dict],
    template: Template,
    settings: PreferenceTuning,
    ranked: Sequence[dict],
    dtype: torch.dtype,
    device: str,
) -> dict:
    """Measures the published folder as read back, its checksums verified first; returns the scoreboard."""
    return column("merged", scoreboard.load_published(folder, dtype, device), held_out, template, settings, ranked)


def changes(board: dict) -> pd.DataFrame:
    """What changed on the same pairs since `before`: each difference with its 95% interval, by a paired bootstrap."""
    found = {column: scores["change"] for column, scores in board.items() if column != "before"}
    return pd.DataFrame(
        {column: {name: intervals.shown(f) for name, f in each.items()} for column, each in found.items()}
    )


def warnings(board: dict) -> list[str]:
    """What of the change is likely not wanted, in sentences."""
    before, now = board["before"], board["after"]
    said = []
    if (fell := before["chosen_logp"] - now["chosen_logp"]) > 0:
        said.append(
            f"The chosen responses have become less probable, by {fell:.3f} nats a token: a smaller learning rate, a"
            " larger beta or loss = 'sigmoid + sft' holds them."
        )
    if now["loss"] > GREW * before["loss"]:
        said.append(
            f"The held-out loss rose from {before['loss']:.3f} to {now['loss']:.3f}: some of what the finetuning taught"
            " is lost. Lower the learning rate, or raise beta."
        )
    if (words := now.get("answer_words", 0)) > GREW * before.get("answer_words", words):
        said.append(
            f"Answers have grown from {before['answer_words']:.0f} to {words:.0f} words on average: ld_alpha below 1 or"
            " loss = 'sigmoid_norm' counts length less."
        )
    return said

"""Agreement with people: of two replies to one prompt, does the model hold the one that they preferred more probable?

It needs no judge, and says how far a model has learned what people prefer (HumanRankEval, arXiv 2405.09186).
"""

import math
from collections.abc import Sequence

import torch

from llm_finetuning import prompts
from llm_finetuning.data import pairs, preferences
from llm_finetuning.evaluation import likelihood
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.prompts import Template

FEWEST = 200
"""Ranked pairs that are measured where there are so many: an interval over fewer says little."""


def ranked_pairs(records: list[dict], template: Template, max_seq_length: int) -> list[dict]:
    """Encodes preference records as {"chosen": example, "rejected": example, "record"}, both with the same history.

    What does not fit in `max_seq_length` tokens even without any history is left out.
    """
    sides = [
        {"prompt": record["prompt"], "history": record.get("history") or [], "response": record[side]}
        for record in records
        for side in preferences.SIDES
    ]
    cut = prompts.truncate_histories(sides, template, max_seq_length)
    made = []
    for record, chosen, rejected in zip(records, cut[::2], cut[1::2], strict=True):
        if chosen.example and rejected.example:
            shorter = min(chosen.pair["history"], rejected.pair["history"], key=len)
            both = [_with_history(side, shorter, template) for side in (chosen, rejected)]
            made.append({"chosen": both[0], "rejected": both[1], "record": record})
    return made


def _with_history(side: prompts.Truncated, history: list[dict], template: Template) -> dict:
    """The example of a side, encoded anew only where it kept more turns than `history`."""
    if side.pair["history"] == history:
        return side.example
    return prompts.encode(side.pair | {"history": history}, template)


def drawn(records: Sequence[dict], template: Template, max_seq_length: int, count: int, seed: int) -> list[dict]:
    """The ranked pairs that fit, at most so many as `sampled` draws."""
    return sampled(ranked_pairs(list(records), template, max_seq_length), count, seed)


def sampled(ranked: list[dict], count: int, seed: int) -> list[dict]:
    """At most `count` of them, or FEWEST where that is more, in the order in which the seed draws them."""
    return pairs.draw(ranked, max(count, FEWEST), seed)


def rank_agreement(model: torch.nn.Module, ranked: Sequence[dict], template: Template) -> dict[str, Sample]:
    """The share of ranked pairs in which the model agrees with people (`figures`); empty without ranked pairs."""
    return figures(losses(model, ranked, template)) if ranked else {}


def losses(model: torch.nn.Module, ranked: Sequence[dict], template: Template) -> Sample:
    """Negative log-likelihood of the responses of ranked pairs (`ranked_pairs`), chosen and rejected in turn."""
    return likelihood.losses(model, [pair[side] for pair in ranked for side in preferences.SIDES], template)


def figures(found: Sample) -> dict[str, Sample]:
    """The share of ranked pairs in which the model agrees with people, from what `losses` gave.

    `rank_agreement` compares the log-likelihood per token, `rank_agreement_whole` that of the whole response, which
    favours short ones: `chosen_longer`, the share in which the preferred reply has more tokens, stands beside them.
    Equal likelihoods count half.
    """
    per_token = [value / weight for value, weight in zip(found.values, found.weights, strict=True)]
    return {
        "rank_agreement": _smaller_first(per_token),
        "rank_agreement_whole": _smaller_first(found.values),
        "chosen_longer": _smaller_first([-weight for weight in found.weights]),
    }


def _smaller_first(values: list[float]) -> Sample:
    """Of values in twos, whether the first of each two is the smaller one: 1, 0, 0.5 where both are equal, or NaN."""
    twos = list(zip(values[::2], values[1::2], strict=True))
    return Sample([math.nan if math.isnan(a + b) else (a < b) + (a == b) / 2 for a, b in twos])

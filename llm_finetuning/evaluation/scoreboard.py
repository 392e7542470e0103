"""Before, after, merged: the same measures on one fixed held-out set.

The held-out set is a list of examples (`prompts.encode`) with the pair beside them: `{"input_ids", "labels", "pair"}`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import torch

from llm_finetuning import models, prompts
from llm_finetuning.data.pairs import draw
from llm_finetuning.evaluation import agreement, intervals, likelihood, mode
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import read_json, write_json
from llm_finetuning.inference.chat import Answer, Chat
from llm_finetuning.inference.generation import END, SamplingParameters
from llm_finetuning.prompts import Template
from llm_finetuning.settings import Finetuning

GRAMS = 4
MEASURES = ("loss", "perplexity", "stop_rate", "repetition_rate", "exact_match", "rank_agreement")
MEASURES += ("margin", "chosen_logp", "rejected_logp", "kl", "answer_words")
"""What the table shows, in this order."""


def held_out_set(pairs: list[dict], template: Template, max_seq_length: int, count: int, seed: int) -> list[dict]:
    """At most `count` pairs that fit, in the order in which the seed draws them. Raises ValueError when none fits."""
    chosen = draw(fitting(pairs, template, max_seq_length), count, seed)
    return [pair.example | {"pair": pair.pair} for pair in chosen]


def fitting(pairs: list[dict], template: Template, max_seq_length: int) -> list[prompts.Truncated]:
    """The pairs that fit, oldest turns cut where they have to be. Raises ValueError when none fits."""
    found = [pair for pair in prompts.truncate_histories(pairs, template, max_seq_length) if pair.example]
    if not found:
        raise ValueError(f"no validation pair fits in max_seq_length = {max_seq_length}: raise it")
    return found


def held_out_loss(model: torch.nn.Module, held_out: list[dict], template: Template) -> float:
    """Mean negative log-likelihood per token in the loss (responses and their EOS), in nats, over all examples."""
    return likelihood.losses(model, held_out, template).value


def answers(model: torch.nn.Module, held_out: list[dict], template: Template, max_new_tokens: int) -> list[Answer]:
    """Greedy answers of a model in memory to the prompts of held-out examples, in their order."""
    asked = [prompts.question(example["pair"]) for example in held_out]
    with mode.evaluating(model):
        return Chat.of(model, template).generate_batch(asked, SamplingParameters(max_new_tokens=max_new_tokens))


@mode.within_memory(mode.while_measuring)
def measure(
    model: torch.nn.Module,
    held_out: list[dict],
    template: Template,
    settings: Finetuning,
    ranked: Sequence[dict] = (),
    more: Mapping[str, Sample] = MappingProxyType({}),
) -> dict:
    """One column of the scoreboard: each figure as a number, their intervals, samples of answers, and what it took.

    loss, perplexity; stop_rate, repetition_rate and maybe exact_match where answers are asked for; rank_agreement
    where there are ranked pairs (`agreement.ranked_pairs`); `more`: figures that were measured elsewhere. `intervals`
    holds {"low", "high", "n"} of each, `own` the answers to the user's own questions, which no figure counts.
    """
    begun, asked = time.perf_counter(), held_out[: settings.eval_answers]
    own = [{"pair": {"prompt": question, "response": ""}} for question in settings.own_questions]
    given = answers(model, asked + own, template, settings.max_new_tokens)
    given, own_answers = given[: len(asked)], given[len(asked) :]
    loss = likelihood.losses(model, held_out, template)
    if not math.isfinite(loss.value):
        print(f"the held-out loss is {loss.value}: the weights are damaged, or overflow in this dtype")
    measured = {"loss": loss} | of_answers(asked, given, settings.judge_exact_match)
    measured |= agreement.rank_agreement(model, ranked, template) | more
    scores = {name: sample.value for name, sample in measured.items()}
    return {
        **scores,
        "perplexity": math.exp(min(loss.value, 700)),
        "intervals": {name: sample.interval() | {"n": len(sample.values)} for name, sample in measured.items()},
        "samples": _samples(asked, given),
        "seconds": time.perf_counter() - begun,
        **({"own": _samples(own, own_answers)} if own else {}),
    }


def _samples(asked: list[dict], given: list[Answer]) -> list[dict]:
    """{"prompt", "reference", "text", "stopped"} of each answer."""
    return [
        {
            "prompt": row["pair"]["prompt"],
            "reference": row["pair"]["response"],
            "text": answer.text,
            "stopped": answer.ended_by == END,
        }
        for row, answer in zip(asked, given, strict=True)
    ]


def of_answers(asked: list[dict], given: list[Answer], judge_exact_match: bool) -> dict[str, Sample]:
    """What is measured on answers, each a figure of its own; empty without answers."""
    if not given:
        return {}
    measured = {
        "stop_rate": Sample([float(answer.ended_by == END) for answer in given]),
        "repetition_rate": Sample([repetition(answer.text) for answer in given], [1.0] * len(given)),
        "answer_words": Sample([len(answer.text.split()) for answer in given], [1.0] * len(given)),
    }
    if judge_exact_match:
        pairs = zip(given, asked, strict=True)
        right = [answer.text.strip() == row["pair"]["response"].strip() for answer, row in pairs]
        measured["exact_match"] = Sample([float(yes) for yes in right])
    return measured


def repetition(text: str) -> float:
    """Share of an answer's word 4-grams that stood in it before (seq-rep-4 of arXiv 1908.04319, over words)."""
    words = text.split()
    grams = [tuple(words[i : i + GRAMS]) for i in range(len(words) - GRAMS + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def before(
    model: torch.nn.Module, held_out: list[dict], template: Template, settings: Finetuning, ranked: Sequence[dict] = ()
) -> dict:
    """Measures the base without its adapters; returns the scoreboard."""
    with model.disable_adapter():
        return record(settings.folders.scoreboard, before=measure(model, held_out, template, settings, ranked))


def after(
    model: torch.nn.Module, held_out: list[dict], template: Template, settings: Finetuning, ranked: Sequence[dict] = ()
) -> dict:
    """Measures the base with its trained adapters; returns the scoreboard."""
    return record(settings.folders.scoreboard, after=measure(model, held_out, template, settings, ranked))


def published(
    folder: Path,
    held_out: list[dict],
    template: Template,
    settings: Finetuning,
    dtype: torch.dtype,
    device: str,
    ranked: Sequence[dict] = (),
) -> dict:
    """Measures the published folder as read back, its checksums verified first; returns the scoreboard."""
    model = load_published(folder, dtype, device)
    return record(settings.folders.scoreboard, merged=measure(model, held_out, template, settings, ranked))


def load_published(folder: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model of a published folder, its checksums verified first."""
    checksums.verify_checksums(folder)
    return models.load_strict(folder, dtype, device)


def figures(board: dict) -> pd.DataFrame:
    """The measures as numbers, before / after / merged across."""
    return pd.DataFrame(board).reindex(MEASURES).dropna(how="all").astype(float).round(4)


def table(board: dict) -> pd.DataFrame:
    """The measures, before / after / merged across, each with its 95% interval and the number it was measured on."""
    shown = figures(board).astype(object)
    for name, scores in board.items():
        shown[name] = [_with_interval(value, scores.get("intervals", {}).get(m)) for m, value in shown[name].items()]
    return shown


def _with_interval(value: float, interval: dict | None) -> str:
    """'0.1234 (0.1101 to 0.1367, n = 60)', without an interval that is not known."""
    if math.isnan(value):
        return ""
    known = interval and interval["low"] is not None
    return intervals.shown({"value": value, **interval}, digits=4) if known else f"{value:.4f}"


def side_by_side(board: dict, count: int = 5) -> pd.DataFrame:
    """The user's own questions and the first `count` prompts, with the reference and each column's answer."""
    asked = [
        *zip(*(scores.get("own", []) for scores in board.values()), strict=False),
        *list(zip(*(scores["samples"] for scores in board.values()), strict=False))[:count],
    ]
    rows = [
        {"prompt": samples[0]["prompt"], "reference": samples[0]["reference"]}
        | dict(zip(board, map(_with_ending, samples), strict=True))
        for samples in asked
        if len({sample["prompt"] for sample in samples}) == 1  # not where the questions were changed in between
    ]
    return pd.DataFrame(rows)


def _with_ending(sample: dict) -> str:
    return sample["text"] + ("" if sample["stopped"] else " … (did not stop)")


def record(path: Path, **columns: dict) -> dict:
    """Adds or replaces columns of scoreboard.json, written atomically; returns all of it in order."""
    board = read_json(path) | columns
    board = {name: board[name] for name in ("before", "after", "merged") if name in board}
    write_json(path, board)
    return board

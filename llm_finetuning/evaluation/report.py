"""What an evaluation says: evaluation.json, the table of figures, and where two models are truly apart."""

import math
from pathlib import Path

import pandas as pd

from llm_finetuning import prompts
from llm_finetuning.evaluation import intervals
from llm_finetuning.evaluation.comparison import Result
from llm_finetuning.files.atomic import write_json
from llm_finetuning.inference.vote_box import Question

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "generic_loss", "other_languages_loss", "repetition_rate")
HIGHER_IS_BETTER = ("stop_rate", "exact_match", "rank_agreement", "rank_agreement_whole", "rules_followed")
NEITHER = ("answer_words", "chosen_longer")
ORDER = (*LOWER_IS_BETTER, *HIGHER_IS_BETTER, *NEITHER)
SHOWN = 8
"""Held-out prompts whose answers are shown with the models' names; on the others people can vote without them."""


def figures(result: Result) -> dict[str, dict]:
    """Each figure of a model as {"value", "low", "high", "n"}, tasks included."""
    found = {name: sample.figure() for name, sample in result.samples.items()}
    if "loss" in found:
        ends = ("value", "low", "high")
        exponents = {end: None if (x := found["loss"][end]) is None else math.exp(min(x, 700)) for end in ends}
        found["perplexity"] = {**exponents, "n": found["loss"]["n"]}
    found |= {name: {key: task[key] for key in ("value", "low", "high", "n")} for name, task in result.tasks.items()}
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def write(results: dict[str, Result], path: Path) -> dict[str, dict]:
    """Writes evaluation.json, {model: {figure: {"value", "low", "high", "n"}}}, atomically; returns it."""
    record = {model: figures(result) for model, result in results.items()}
    write_json(path, record, shared=True)
    return record


def table(record: dict[str, dict]) -> pd.DataFrame:
    """Figures down, models across: '0.123 (0.110 to 0.137, n = 60)'."""
    names = sorted({name for found in record.values() for name in found}, key=_place)
    rows = {name: {model: intervals.shown(found[name]) if name in found else "" for model, found in record.items()}
            for name in names}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def differences(results: dict[str, Result]) -> pd.DataFrame:
    """Each model against the first one on the same units: difference, 95% interval and verdict.

    "better" and "worse" stand only where the interval excludes zero. A figure per token is left out between models
    whose tokens differ: bits_per_byte compares them.
    """
    first = next(iter(results))
    rows = []
    for model, result in results.items():
        for name in sorted(result.samples, key=_place) if model != first else ():
            ours, theirs = result.samples[name], results[first].samples.get(name)
            if theirs is None or len(ours.values) != len(theirs.values) or _other_tokens(name, ours, theirs):
                continue
            found = intervals.difference(theirs, ours)
            rows.append({"model": model, "figure": name, f"difference to {first}": intervals.shown(found),
                         "verdict": verdict(name, found)})  # fmt: skip
    return pd.DataFrame(rows, columns=["model", "figure", f"difference to {first}", "verdict"])


def _other_tokens(name: str, ours: intervals.Sample, theirs: intervals.Sample) -> bool:
    return name in ("loss", "generic_loss", "other_languages_loss") and list(ours.weights) != list(theirs.weights)


def verdict(name: str, found: dict) -> str:
    """Returns "better", "worse", for a figure that is neither "more" or "less", or "no difference shown"."""
    if not intervals.is_apart(found):
        return "no difference shown"
    if name in NEITHER:
        return "more" if found["value"] > 0 else "less"
    return "better" if (found["value"] > 0) == (name not in LOWER_IS_BETTER) else "worse"


def answers(results: dict[str, Result]) -> pd.DataFrame:
    """The first held-out prompts with the reference and each model's answer."""
    told = _together(results)[:SHOWN]
    return pd.DataFrame(
        {"prompt": each[0]["prompt"], "reference": each[0]["reference"]}
        | {model: answer["text"] for model, answer in zip(results, each, strict=True)}
        for each in told
    )


def questions(results: dict[str, Result]) -> list[Question]:
    """The held-out questions whose answers `answers` does not show, each with every model's answer.

    Empty for a single model: there is nothing to vote on.
    """
    return [
        (prompts.question(each[0]), {model: answer["text"] for model, answer in zip(results, each, strict=True)})
        for each in _together(results)[SHOWN:]
        if len(each) > 1
    ]


def _together(results: dict[str, Result]) -> list[tuple[dict, ...]]:
    """To each held-out prompt every model's answer."""
    return list(zip(*(result.answers for result in results.values()), strict=True))

"""What blind votes say: the share in which one model is preferred to another, and preference records for training."""

import argparse
import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import pandas as pd

from llm_finetuning.data import comparisons, preferences
from llm_finetuning.evaluation import intervals
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.inference.votes import CHOICES

WORTH = {"left": 1.0, "right": 0.0}
"""What a choice is worth to the answer on the left; any other is worth half to both."""


def read(path: Path) -> list[dict]:
    """Reads a file of votes; none gives no votes. A line that a killed process left incomplete is no vote.

    Raises ValueError with file and line for a record that is something else.
    """
    votes = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            vote = json.loads(line)
        except ValueError:
            continue
        if not _is_vote(vote):
            raise ValueError(f"{path}, line {number} is no vote: give the file that the page or the notebook writes")
        votes.append(vote)
    return votes


def _is_vote(record: object) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("history"), list):
        return False
    two = [record.get(name) for name in ("models", "answers")]
    if not all(isinstance(each, list) and len(each) == 2 for each in two):
        return False
    texts = [record.get("prompt"), record.get("choice"), *two[0], *two[1]]
    return all(isinstance(text, str) for text in texts) and record["choice"] in CHOICES


def share(votes: list[dict], model: str, other: str) -> dict | None:
    """The share in which `model` is preferred to `other`: {"value", "low", "high", "n"}; None without votes on them.

    n counts questions: several votes on one are averaged, for they say less than votes on several. "tie" and "both
    bad" count half.
    """
    questions: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        if sorted(vote["models"]) == sorted((model, other)):
            left = WORTH.get(vote["choice"], 0.5)
            worth = left if vote["models"][0] == model else 1 - left
            questions[json.dumps([vote["history"], vote["prompt"]])].append(worth)
    return Sample([sum(each) / len(each) for each in questions.values()]).figure() if questions else None


def so_far(path: Path, models: list[str]) -> str:
    """Says how often each model is preferred to those before it, by a file of votes; "" without votes on them."""
    told = [
        f"{model} preferred to {other}: {intervals.shown(found)}" for model, other, found in _shares(read(path), models)
    ]
    return f"{'; '.join(told)}. n counts questions, ties half." if told else ""


def table(votes: list[dict], models: list[str]) -> pd.DataFrame:
    """Each model against those before it: the share with its 95% interval, and verdict."""
    rows = [(model, other, intervals.shown(found), _verdict(found)) for model, other, found in _shares(votes, models)]
    return pd.DataFrame(rows, columns=["model", "against", "preferred", "verdict"])


def _shares(votes: list[dict], models: list[str]) -> list[tuple[str, str, dict]]:
    """(model, one before it, share) of those that were voted on."""
    pairs = [(model, other, share(votes, model, other)) for other, model in combinations(models, 2)]
    return [pair for pair in pairs if pair[2]]


def _verdict(found: dict) -> str:
    """Returns "better" or "worse" where the interval excludes one half, else "no difference shown"."""
    if found["low"] is None or found["low"] <= 0.5 <= found["high"]:
        return "no difference shown"
    return "better" if found["value"] > 0.5 else "worse"


def export(votes: list[dict], path: Path) -> Path | None:
    """Writes the votes for one of two answers as preference records, which the data notebooks read as a source.

    Left out: ties, answers that are alike, and votes in which an answer is empty. Without any there is no file.
    """
    return preferences.write([record for vote in votes if (record := comparisons.of_vote(vote))], path)


def main() -> None:
    """Writes the votes of a file as preference records, and tells the share of each model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("votes", type=Path, help="the file that the page or the notebook writes")
    parser.add_argument("preferences", type=Path, help="where the preference records go")
    given = parser.parse_args()
    if not given.votes.is_file():
        raise SystemExit(f"{given.votes} is not there: give the file that the page or the notebook writes")
    votes = read(given.votes)
    print(export(votes, given.preferences) or f"{given.votes} holds no vote for one of two answers")
    print(so_far(given.votes, list(dict.fromkeys(model for vote in votes for model in vote["models"]))))


if __name__ == "__main__":
    main()

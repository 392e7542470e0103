"""Finds what stands in both the training and the validation file: by tree, by message, by prompt."""

import pandas as pd

from llm_finetuning.data.duplicates import NearSearch, normalise

KINDS = ("tree", "message", "prompt", "near prompt")


def overlaps(pairs: pd.DataFrame, others: pd.DataFrame, threshold: float = 0.0) -> tuple[pd.Series, pd.Series]:
    """Returns for each of `pairs`, and for each of `others`, the first of KINDS by which it stands in both, or null.

    Prompts are compared without their history, but with their system message, after normalisation; `threshold`
    above 0 also finds prompts that are nearly equal ("near prompt", see `duplicates.NearSearch`).
    """
    tables = (pairs, others)
    trees, messages = ([set(table[name].dropna()) for table in tables] for name in ("message_tree_id", "message_id"))
    asked = [_questions(table) for table in tables]
    near = _near(asked[0], asked[1], threshold) if threshold else (set(), set())
    found = []
    for side, table in enumerate(tables):
        other, equal = 1 - side, set(asked[1 - side])
        rows = zip(table["message_tree_id"], table["message_id"], asked[side], strict=True)
        leaks = (
            (tree in trees[other], message in messages[other], question in equal, question in near[side])
            for tree, message, question in rows
        )
        kinds = [next((kind for kind, leak in zip(KINDS, row, strict=True) if leak), None) for row in leaks]
        found.append(pd.Series(kinds, index=table.index, dtype=object))
    return found[0], found[1]


def _questions(pairs: pd.DataFrame) -> list[tuple[str, str]]:
    """Returns the (system message, prompt) of each pair, normalised: what one asks two personas is two questions."""
    histories = pairs["history"] if "history" in pairs.columns else [[]] * len(pairs)
    systems = [turns[0]["content"] if turns and turns[0]["role"] == "system" else "" for turns in histories]
    return list(zip(map(normalise, systems), map(normalise, pairs["prompt"]), strict=True))


def _near(one: list[tuple[str, str]], other: list[tuple[str, str]], threshold: float) -> tuple[set, set]:
    """Returns the questions of each side that are nearly equal to one of the other side."""
    sides = (list(dict.fromkeys(one)), list(dict.fromkeys(other)))
    search = NearSearch(threshold, *([prompt for _, prompt in side] for side in sides))
    questions = [*sides[0], *sides[1]]
    near: tuple[set, set] = (set(), set())
    for place, question in enumerate(sides[0]):
        for match in search.like(place, 1):
            if questions[match][0] == question[0]:
                near[0].add(question)
                near[1].add(questions[match])
    return near


def count(kinds: pd.Series) -> dict[str, int]:
    """Returns {kind: number of pairs} for all KINDS."""
    return {kind: int((kinds == kind).sum()) for kind in KINDS}

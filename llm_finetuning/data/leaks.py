"""Finds what stands in both the training and the validation file: by tree, by message, by prompt."""

import pandas as pd

from llm_finetuning.data.duplicates import NearSearch, normalise

KINDS = ("tree", "message", "prompt", "near prompt")


def overlaps(pairs: pd.DataFrame, others: pd.DataFrame, threshold: float = 0.0) -> pd.Series:
    """Returns (N,) for each of `pairs` the first of KINDS by which it stands in `others` too, or null.

    Prompts are compared alone, without their history, after normalisation; `threshold` above 0 also finds
    those with at least that Jaccard similarity of five-letter shingles ("near prompt").
    """
    trees, messages = set(others["message_tree_id"].dropna()), set(others["message_id"].dropna())
    prompts = dict.fromkeys(map(normalise, others["prompt"]))
    search = NearSearch(threshold) if threshold else None
    if search:
        for prompt in prompts:
            search.add(prompt, prompt)
    kinds, near = [], {}
    columns = (pairs["message_tree_id"], pairs["message_id"], map(normalise, pairs["prompt"]))
    for tree, message, prompt in zip(*columns, strict=True):
        if search and prompt not in near:
            near[prompt] = next(search.like(prompt), None) is not None
        leaks = (tree in trees, message in messages, prompt in prompts, near.get(prompt, False))
        kinds.append(next((kind for kind, leak in zip(KINDS, leaks, strict=True) if leak), None))
    return pd.Series(kinds, index=pairs.index, dtype=object)


def count(kinds: pd.Series) -> dict[str, int]:
    """Returns {kind: number of pairs} for all KINDS."""
    return {kind: int((kinds == kind).sum()) for kind in KINDS}

"""How varied the prompts of a generated data set are."""

import re
from collections import Counter

import numpy as np

from llm_finetuning.data.duplicates import normalise, shingles

MOST_COMPARED = 500
"""Prompts whose nearest neighbour is looked for: memory and time grow with the square of their number."""


def figures(pairs: list[dict], topics: list[str], axes: dict[str, list[str]]) -> dict:
    """Returns topics covered, shares of distinct n-grams, and how near each prompt is to its nearest neighbour.

    topics: (N,) topic of each pair. A share of distinct n-grams is that of all prompts together, 0 to 1. Similarity
    is Jaccard's over five-letter shingles, 0 to 1.
    """
    prompts = [normalise(pair["prompt"]) for pair in pairs]
    nearest = nearest_similarities(prompts)
    return {
        "topics": len(axes["topics"]),
        "topics_covered": len(set(topics)),
        "pairs_per_topic": dict(Counter(topics).most_common()),
        **{f"distinct_{n}_grams": round(distinct(prompts, n), 4) for n in (1, 2, 3)},
        "nearest_neighbour": {
            name: round(float(np.percentile(nearest, percentile)), 4) if len(nearest) else None
            for name, percentile in (("median", 50), ("p95", 95), ("max", 100))
        },
    }


def distinct(texts: list[str], n: int) -> float:
    """Returns the share of all n-grams of words that are different from one another; 0 without any."""
    words = [re.findall(r"\w+", text) for text in texts]
    grams = [tuple(one[start : start + n]) for one in words for start in range(len(one) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def nearest_similarities(texts: list[str]) -> np.ndarray:
    """Returns (N,) the similarity of each text to the nearest other one, of the first MOST_COMPARED texts."""
    parts = shingles(texts[:MOST_COMPARED])
    if len(parts) < 2:
        return np.zeros(0)
    vocabulary = np.unique(np.concatenate(parts))
    present = np.zeros((len(parts), len(vocabulary)), dtype=np.float32)
    for row, part in zip(present, parts, strict=True):
        row[np.searchsorted(vocabulary, part)] = 1
    common, sizes = present @ present.T, present.sum(axis=1)
    similarities = common / (sizes[:, None] + sizes[None] - common)
    np.fill_diagonal(similarities, 0)
    return similarities.max(axis=1)


def sentence(found: dict) -> str:
    """Says the figures in one line each."""
    grams = ", ".join(f"{found[f'distinct_{n}_grams']:.0%} of {n}-grams" for n in (1, 2, 3))
    near = found["nearest_neighbour"]
    lines = [
        f"{found['topics_covered']} of {found['topics']} topics are covered.",
        f"Distinct in the prompts: {grams}.",
    ]
    if near["median"] is not None:
        lines.append(
            f"Similarity of a prompt to its nearest neighbour: median {near['median']:.0%}, 95th percentile"
            f" {near['p95']:.0%}, at most {near['max']:.0%}."
        )
    return "\n".join(lines)

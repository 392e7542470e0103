"""Finds prompts that are equal after normalisation, or nearly equal, within a file and between two."""

import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator

import numpy as np
from datasketch import MinHash, MinHashLSH

SHINGLE = 5
"""Letters in a shingle: short enough for a one-line prompt, and needs no word boundaries (Chinese, Thai)."""
PERMUTATIONS = 128
NUMBER = re.compile(r"\d+")


def normalise(text: str) -> str:
    """Removes what does not tell two prompts apart: letter case, Unicode form, white space, closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .,;:!?…。？！")


def shingles(text: str) -> np.ndarray:
    """Returns (S,) sorted, distinct 32-bit hashes of all runs of SHINGLE letters; a shorter text is one shingle."""
    codes = np.frombuffer(text.ljust(SHINGLE).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE)
    mixed = np.zeros(len(windows), dtype=np.uint64)
    for position in range(SHINGLE):  # wraps around at 2**64 on purpose
        mixed = (mixed + windows[:, position]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sets of shingles, 0 to 1."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


class NearSearch:
    """Finds earlier texts that are at least `threshold` similar: MinHash proposes, exact similarity decides.

    Texts with different numbers in them are never similar: "count to 10" and "count to 100" are two prompts.
    `threshold` is from above 0 to 1. What MinHash does not propose is missed: at the threshold itself a few in
    a hundred, well above it practically none (datasketch weighs the two kinds of error).
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self.texts: dict[Hashable, tuple[np.ndarray, list[str]]] = {}

    def signature(self, parts: np.ndarray) -> MinHash:
        """Returns the MinHash of a set of shingles."""
        minhash = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        minhash.update_batch(parts.tolist())
        return minhash

    def add(self, key: Hashable, text: str) -> None:
        """Adds a text that later ones are compared with."""
        parts = shingles(text)
        self.texts[key] = parts, NUMBER.findall(text)
        self.index.insert(key, self.signature(parts))

    def like(self, text: str) -> Iterator[Hashable]:
        """Yields the keys of the texts that are similar enough."""
        parts = shingles(text)
        for key in self.index.query(self.signature(parts)):
            other, numbers = self.texts[key]
            if similarity(parts, other) >= self.threshold and numbers == NUMBER.findall(text):
                yield key


def _context(pair: dict) -> tuple[str, ...]:
    return tuple(normalise(turn["content"]) for turn in pair["history"])


def first_of_each(pairs: list[dict], prompters: Iterable[Hashable]) -> list[bool]:
    """Returns True for the pairs whose prompt, with its history, stands in no earlier prompter message.

    prompters: (N,) the prompter message of each pair; several replies to one are not duplicates.
    """
    first: dict[tuple, Hashable] = {}
    return [
        first.setdefault((normalise(pair["prompt"]), *_context(pair)), prompter) == prompter
        for pair, prompter in zip(pairs, prompters, strict=True)
    ]


def first_of_near(pairs: list[dict], prompters: Iterable[Hashable], threshold: float) -> list[bool]:
    """Returns what `first_of_each` does, for prompts at least `threshold` similar to one that stays."""
    search = NearSearch(threshold)
    contexts: dict[Hashable, tuple] = {}
    is_first: dict[Hashable, bool] = {}
    for pair, prompter in zip(pairs, prompters, strict=True):
        if prompter in is_first:
            continue
        prompt, context = normalise(pair["prompt"]), _context(pair)
        is_first[prompter] = all(contexts[key] != context for key in search.like(prompt))
        if is_first[prompter]:
            contexts[prompter] = context
            search.add(prompter, prompt)
    return [is_first[prompter] for prompter in prompters]

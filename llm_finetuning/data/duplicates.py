"""Finds prompts that are equal after normalisation, or nearly equal, within a file and between two.

Two prompts are nearly equal where they are similar as a whole and what differs is trivial: punctuation, letter case,
white space, a typing error. Text that two prompts share is no evidence by itself, for prompts made from a template
share most of theirs and ask for different things.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import islice

import numpy as np
from datasketch import MinHashLSH

SHINGLE = 5
"""Letters in a shingle: short enough for a one-line prompt, and needs no word boundaries (Chinese, Thai)."""
PERMUTATIONS = 128
BLOCK = 1 << 14
"""Letters, or shingles, that are hashed at once: their hashes fit into a core's cache."""
NUMBER = re.compile(r"\d+")
WORD = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+|-(?=\d)|[^\w\s.,;:!?…'\"`´‘’“”„«»–—·。，、！？；：-]|_"
)
"""Words and signs that say something: punctuation is left out, and where no blanks are written each letter counts."""
SHORT_WORD = 4
"""Letters of a word whose absence alone makes no other prompt ("many", "then")."""
CROWD = 20
"""Texts of a bucket that the others are compared with, and most texts that share a rare shingle."""
RARE = 8
"""Rare shingles by which a text of an overfull bucket is found."""
TEMPLATE = 2
"""From so many other prompts on that differ in more than trifles, what a prompt shares with them is a template."""


def normalise(text: str) -> str:
    """Removes what does not tell two prompts apart: letter case, Unicode form, white space, closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .,;:!?…。？！")


def shingles(texts: Sequence[str]) -> list[np.ndarray]:
    """Returns for each text (S,) sorted, distinct 32-bit hashes of all runs of SHINGLE letters.

    A shorter text is one shingle.
    """
    found = []
    for block in _blocks([text.ljust(SHINGLE) for text in texts], BLOCK):
        codes = np.frombuffer("".join(block).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
        mixed = np.zeros(len(codes) - SHINGLE + 1, dtype=np.uint64)
        for position in range(SHINGLE):  # wraps around at 2**64 on purpose
            mixed += codes[position : position + len(mixed)]
            mixed *= np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        owner = np.repeat(np.arange(len(block), dtype=np.uint64), [len(text) for text in block])
        keys = (mixed >> np.uint64(32) | owner[: len(mixed)] << np.uint64(32))[
            owner[SHINGLE - 1 :] == owner[: len(mixed)]
        ]
        keys.sort()  # many times as fast as np.unique
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
        ends = np.searchsorted(keys, np.arange(1, len(block), dtype=np.uint64) << np.uint64(32))
        found += np.split(keys.astype(np.uint32), ends)
    return found


def _blocks(items: Sequence, size: int) -> Iterator[Sequence]:
    """Yields the items in runs of at least `size` letters or shingles, all but the last: numpy's calls cost less so."""
    start, length = 0, 0
    for place, item in enumerate(items, 1):
        length += len(item)
        if length >= size or place == len(items):
            yield items[start:place]
            start, length = place, 0


def min_hashes(sets: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Returns (N, number) the least of the hashes of each set, by as many hash functions, in 32 bits."""
    factors, shifts = np.random.default_rng(0).integers(1, 2**63, size=(2, number), dtype=np.uint64)
    found = [np.empty((0, number), dtype=np.uint64)]
    for block in _blocks(sets, BLOCK):
        parts, starts = np.concatenate(block).astype(np.uint64), np.cumsum([0, *map(len, block[:-1])])
        mixed, least = np.empty_like(parts), np.empty((number, len(block)), dtype=np.uint64)
        for place in range(number):
            np.multiply(parts, factors[place] | np.uint64(1), out=mixed)
            mixed += shifts[place]
            np.minimum.reduceat(mixed, starts, out=least[place])
        found.append(least.T >> np.uint64(32))
    return np.concatenate(found)


def _buckets(hashes: np.ndarray, bands: int, labels: Sequence[str]) -> list[list[int]]:
    """Returns the places, in rising order, whose labels and hashes of a band are the same: two or more.

    hashes: (N, bands * rows) in 32 bits; labels: (N,). The buckets come in the order of their first places.
    """
    numbers: dict[str, int] = {}
    labelled = np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.uint64)
    found = []
    for band, columns in enumerate(np.split(hashes.T, bands)):
        keys = labelled
        for column in columns:  # wraps around at 2**64 on purpose
            keys = keys * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
            keys ^= column
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        ends = np.append(starts[1:], len(order))
        several = ends - starts > 1
        for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
            found.append((int(order[start]), band, order[start:end].tolist()))
    return [places for _, _, places in sorted(found)]


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sets of shingles, 0 to 1."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


class Hunk:
    """A place where two word lists differ: `first[start:end]` stands there instead of `words`."""

    def __init__(self, start: int, first: Sequence[str], second: Sequence[str]):
        self.start, self.end = start, start + len(first)
        self.first, self.second = first, second

    def covers(self, other: "Hunk") -> bool:
        """Whether another difference from the same first text lies here, give or take a word."""
        return self.start - 1 <= other.start and other.end <= self.end + 1

    @property
    def is_typo(self) -> bool:
        """Whether both sides are the same words but for blanks or one slip of the finger a word."""
        one, other = "".join(self.first), "".join(self.second)
        if one == other or len(self.first) != len(self.second) and _one_slip(one, other):
            return True
        same_number = len(self.first) == len(self.second)
        return same_number and all(a == b or _one_slip(a, b) for a, b in zip(self.first, self.second, strict=True))

    @property
    def is_small(self) -> bool:
        """Whether it is a typing error, a slip in a short word, or a single short word too many."""
        words = [*self.first, *self.second]
        short = len(words) - bool(self.first and self.second) == 1 and max(map(len, words)) <= SHORT_WORD
        return (
            self.is_typo or short and "".join(words).isalpha() and (not self.first or not self.second or _near(*words))
        )


def _near(one: str, other: str) -> bool:
    """Whether a letter was added, left out or replaced, or two were swapped."""
    left, right = _trim(one, other)
    one, other = one[left : len(one) - right], other[left : len(other) - right]
    return max(len(one), len(other)) <= 1 or len(one) == 2 and one == other[::-1]


def _one_slip(one: str, other: str) -> bool:
    """Whether two words are the same but for one slip; where they are short, any other word is as near."""
    return _near(one, other) and min(len(one), len(other)) >= (3 if sorted(one) == sorted(other) else SHORT_WORD)


def _trim(one: Sequence, other: Sequence) -> tuple[int, int]:
    """Returns how many items two sequences have in common at the start, and then at the end."""
    most, left, right = min(len(one), len(other)), 0, 0
    while left < most and one[left] == other[left]:
        left += 1
    while right < most - left and one[-1 - right] == other[-1 - right]:
        right += 1
    return left, right


def hunks(one: Sequence[str], other: Sequence[str]) -> list[Hunk]:
    """Returns the places where two lists of words differ."""
    left, right = _trim(one, other)
    first, second = one[left : len(one) - right], other[left : len(other) - right]
    if not first or not second or len(first) == len(second) == 1:
        return [Hunk(left, first, second)] if first or second else []
    codes = SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    return [Hunk(left + a, first[a:b], second[c:d]) for tag, a, b, c, d in codes if tag != "equal"]


class NearSearch:
    """Finds the texts that are nearly equal to one: MinHash proposes, similarity and what differs decide.

    Texts with different numbers in them are never near: "count to 10" and "count to 100" are two prompts. What
    MinHash does not propose is missed: at the threshold itself a few in a hundred, well above it practically none
    (datasketch weighs the two kinds of error). Of an overfull bucket, as templates make them, the first CROWD are
    looked at, and those that share a rare shingle, so the time grows with the number of texts.
    """

    def __init__(self, threshold: float, *sides: Iterable[str]):
        """threshold: above 0 to 1. sides: distinct texts, such as those of two files; places count through all."""
        self.threshold = threshold
        self.sides = [list(side) for side in sides]
        self.texts = [text for side in self.sides for text in side]
        self.side_of = [number for number, side in enumerate(self.sides) for _ in side]
        self.words = [WORD.findall(text.replace("'", "").replace("’", "")) for text in self.texts]
        self.shingles = shingles([" ".join(one) or text for one, text in zip(self.words, self.texts, strict=True)])
        self.distinct: dict[int, frozenset[str]] = {}
        """The distinct words of a text that was proposed; few are."""
        self.buckets: list[list[dict[int, list[int]]]] = [[] for _ in self.texts]
        self.last: int | None = None
        self.found: list[list[Hunk] | None] = []
        self.rest: Iterator[list[Hunk] | None] = iter(())
        self._fill_buckets()

    def _fill_buckets(self) -> None:
        lsh = MinHashLSH(threshold=self.threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        numbers = [" ".join(NUMBER.findall(text)) for text in self.texts]
        overfull = self._share(_buckets(min_hashes(self.shingles, lsh.b * lsh.r), lsh.b, numbers))
        counts = np.bincount(np.concatenate([*self.shingles, [0]]) & 0x3FFFFF, minlength=0x400000) if overfull else []
        buckets: dict[Hashable, list[int]] = defaultdict(list)
        for place in sorted(overfull):
            parts = self.shingles[place]
            common = counts[parts & 0x3FFFFF]
            rare = parts[(common > 1) & (common <= CROWD)][:RARE]
            for part in rare.tolist():
                buckets[part, numbers[place]].append(place)
        self._share(buckets.values())

    def _share(self, buckets: Iterable[list[int]]) -> set[int]:
        """Gives each text the buckets that it shares with others; returns those of overfull ones."""
        overfull: set[int] = set()
        for places in buckets:
            if len(places) > 1:
                first = {
                    side: list(islice((place for place in places if self.side_of[place] == side), CROWD))
                    for side in range(len(self.sides))
                }
                for place in places:
                    self.buckets[place].append(first)
                if len(places) > CROWD:
                    overfull.update(places)
        return overfull

    def like(self, place: int, side: int = 0) -> Iterator[int]:
        """Yields the places of the side's other texts that are nearly equal to the one at `place`."""
        for other in self._proposed(place, side):
            if self._only_trifles(place, other) and self._similar(place, other):
                yield other

    def _proposed(self, place: int, side: int) -> list[int]:
        return [other for other in dict.fromkeys(p for b in self.buckets[place] for p in b[side]) if other != place]

    def _similar(self, place: int, other: int) -> bool:
        return similarity(self.shingles[place], self.shingles[other]) >= self.threshold

    def _hunks(self, place: int, other: int) -> list[Hunk] | None:
        """Returns where two texts differ, None where that is in many words."""
        for text in (place, other):
            if text not in self.distinct:
                self.distinct[text] = frozenset(self.words[text])
        first, second = self.distinct[place], self.distinct[other]
        if len(first ^ second) > 4 + min(len(first), len(second)) // 4:
            return None
        return hunks(self.words[place], self.words[other])

    def _only_trifles(self, place: int, other: int) -> bool:
        """Whether what differs is no more than typing errors, or short words where the rest is no template.

        Where other texts differ in these places alone, but in more than trifles, they are the slots of a template.
        """
        found = self._hunks(place, other)
        if found is None or not all(hunk.is_small for hunk in found):
            return False
        typos = all(hunk.is_typo for hunk in found)
        crowd, in_slot = 0, 0.0
        for differences in self._neighbours(place) if found else ():
            small = differences is not None and all(hunk.is_small for hunk in differences)
            crowd += not small
            if differences and all(any(hunk.covers(other) for hunk in found) for other in differences):
                in_slot += 0.5 if small else 1.0
            if in_slot >= TEMPLATE or crowd >= TEMPLATE and not typos:
                return False
        return True

    def _neighbours(self, place: int) -> Iterator[list[Hunk] | None]:
        """Yields what `_find_neighbours` does; what was found for the place asked for last is not looked for again."""
        if self.last != place:
            self.last, self.found, self.rest = place, [], self._find_neighbours(place)
        yield from self.found
        for differences in self.rest:
            self.found.append(differences)
            yield differences

    def _find_neighbours(self, place: int) -> Iterator[list[Hunk] | None]:
        """Yields how those similar texts differ from one that do so in more than typing errors."""
        for side in range(len(self.sides)):
            for other in self._proposed(place, side):
                found = self._hunks(place, other)
                if (found is None or not all(hunk.is_typo for hunk in found)) and self._similar(place, other):
                    yield found


def context(pair: dict, cache: dict[str, str]) -> tuple[str, ...]:
    """Returns the normalised turns before a pair's prompt, its system message among them."""
    turns = [turn["content"] for turn in pair["history"]]
    cache.update((text, normalise(text)) for text in turns if text not in cache)
    return tuple([cache[text] for text in turns])


def like_earlier(pairs: list[dict], prompters: Iterable[Hashable], threshold: float = 0.0) -> list[int | None]:
    """Returns for each pair the place of the first with an equal prompt and history that another message asked.

    None stands for those that are asked for the first time. prompters: (N,) the prompter message of each pair;
    several replies to one are not duplicates. threshold: above 0, prompts that are nearly equal count too.
    """
    cache: dict[str, str] = {}
    prompts = [normalise(pair["prompt"]) for pair in pairs]
    search = NearSearch(threshold, dict.fromkeys(prompts)) if threshold else None
    places = {text: place for place, text in enumerate(dict.fromkeys(prompts))}
    kept: dict[tuple, int] = {}
    found: dict[Hashable, int | None] = {}
    for number, (pair, prompter) in enumerate(zip(pairs, prompters, strict=True)):
        if prompter in found:
            continue
        place, before = places[prompts[number]], context(pair, cache)
        alike = (place, *(search.like(place) if search else ()))
        found[prompter] = next((kept[other, before] for other in alike if (other, before) in kept), None)
        if found[prompter] is None:
            kept[place, before] = number
    return [found[prompter] for prompter in prompters]

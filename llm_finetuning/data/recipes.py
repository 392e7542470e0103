"""Three ways from trees to pairs: joined (the original's), all, and the best reply to each prompt."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import numpy as np

from llm_finetuning.data.duplicates import like_earlier
from llm_finetuning.data.filters import Filters, Forest
from llm_finetuning.data.funnel import UNDECIDED, Funnel
from llm_finetuning.data.pairs import Rows

OF_MESSAGE = ("lang", "message_tree_id", "message_id", "rank")


@dataclass
class Candidates:
    """Pairs that may still be shortened or removed, with what is known of each beyond its record.

    prompters: (N,) the prompter message of each pair, such as its row. qualities: (N,) quality label of the reply,
    or None. turns_lost: (N,) turns that were cut from the history.
    """

    pairs: Sequence[dict]
    prompters: list[Hashable]
    qualities: list[float | None]
    turns_lost: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turns_lost = self.turns_lost or [0] * len(self.pairs)

    def keep(self, kept: list[bool]) -> None:
        """Removes the pairs whose entry in `kept` is False."""
        self.pairs, self.prompters, self.qualities, self.turns_lost = (
            [value for value, keep in zip(values, kept, strict=True) if keep]
            for values in (self.pairs, self.prompters, self.qualities, self.turns_lost)
        )

    def filter(self, funnel: Funnel, name: str, kept: list[bool], cure: str = "", like: list | None = None) -> None:
        """Removes pairs as a step of the funnel; `like` holds the place of an earlier pair for each that goes."""
        before, pairs = set(self.prompters), self.pairs
        gone = (
            _example(pair, None if like is None else pairs[like[place]])
            for place, (pair, stays) in enumerate(zip(pairs, kept, strict=True))
            if not stays
        )
        self.keep(kept)
        funnel.step(name, "pair", len(self.pairs), cure and f"set {cure}", gone)
        funnel.without_reply[name] += len(before) - len(set(self.prompters))

    def truncate(self, funnel: Funnel, filters: Filters) -> None:
        """Cuts the oldest turns of long histories, and removes the pairs that are too long without any."""
        if filters.truncate is None:
            return
        truncated = filters.truncate(self.pairs)
        self.turns_lost = [
            0 if cut is None else len(pair["history"]) - len(cut["history"])
            for pair, cut in zip(self.pairs, truncated, strict=True)
        ]
        name = "short enough in tokens"
        self.filter(funnel, name, [pair is not None for pair in truncated], "drop_too_long = 'no'")
        self.pairs = [pair for pair in truncated if pair is not None]
        lost = self.shortened()
        funnel.notes[name] = (
            f"{lost['pairs']:,} pairs lost their oldest turns, {lost['without_history']:,} of them all turns"
        )

    def shortened(self) -> dict[str, int]:
        """Counts the pairs that lost turns of their history, and those among them that have none left."""
        left = [
            [turn for turn in pair["history"] if turn["role"] != "system"]
            for pair, lost in zip(self.pairs if any(self.turns_lost) else (), self.turns_lost, strict=False)
            if lost
        ]
        return {"pairs": len(left), "without_history": left.count([])}

    def choose_best(self, funnel: Funnel) -> None:
        """Keeps, for each prompter message, the reply of lowest rank, then best quality, then first in order.

        Those that only the order decides against are a step of their own: nobody preferred the one that stays.
        """
        best: dict[Hashable, tuple] = {}
        keys = []
        for place, (pair, prompter) in enumerate(zip(self.pairs, self.prompters, strict=True)):
            rank, quality = pair.get("rank"), self.qualities[place]
            key = (inf if rank is None else rank, inf if quality is None else -quality, place)
            best[prompter] = min(best.get(prompter, key), key)
            keys.append(key)
        chosen = [best[prompter] for prompter in self.prompters]
        preferred = [key[:2] == one[:2] for key, one in zip(keys, chosen, strict=True)]
        firsts = [key == one for key, one, stays in zip(keys, chosen, preferred, strict=True) if stays]
        self.filter(funnel, "preferred to its siblings", preferred)
        if not all(firsts):
            self.filter(funnel, UNDECIDED, firsts, "replies = 'all'")

    def drop_duplicates(self, funnel: Funnel, filters: Filters) -> None:
        """Keeps the first of equal prompts with equal histories; its several replies all stay."""
        if filters.drop_duplicates:
            like = like_earlier(self.pairs, self.prompters)
            self.filter(funnel, "prompt not seen before", [one is None for one in like], "drop_duplicates = 'no'", like)
        if threshold := filters.near_duplicates:
            like = like_earlier(self.pairs, self.prompters, threshold)
            name = f"prompt less than {threshold:.0%} like an earlier one"
            self.filter(funnel, name, [one is None for one in like], "near_duplicates = 0", like)


def _example(pair: dict, like: dict | None) -> dict:
    return {"prompt": pair["prompt"], "response": pair["response"]} | ({"like": like["prompt"]} if like else {})


def prompters_of(pairs: list[dict]) -> list[Hashable]:
    """Returns for each ready-made pair what stands for its prompter message: its prompt and its whole history.

    A history is told by the number of its last turn among all ways to a turn. One that goes on from that of the pair
    before, as in a chat, is not read again from its start.
    """
    numbers: dict[tuple, int] = {}
    before: list[dict] = []
    number, found = 0, []
    for pair in pairs:
        history = pair["history"]
        goes_on = history[: len(before)] == before
        number = number if goes_on else 0
        for turn in history[len(before) if goes_on else 0 :]:
            number = numbers.setdefault((number, turn["role"], turn["content"]), len(numbers) + 1)
        found.append((pair["prompt"], number))
        before = history
    return found


def drop_repeated(candidates: Candidates, funnel: Funnel) -> None:
    """Keeps the first of ready-made pairs that are equal in prompt, history and response."""
    first: dict[tuple, int] = {}
    keys = ((pair["response"], one) for pair, one in zip(candidates.pairs, candidates.prompters, strict=True))
    places = [first.setdefault(key, place) for place, key in enumerate(keys)]
    kept = [place == one for place, one in enumerate(places)]
    candidates.filter(funnel, "pair not seen before", kept, "drop_duplicates = 'no'", places)


def joined(forest: Forest, funnel: Funnel) -> Candidates:
    """Makes the original's rows: one for each prompter message, with its replies' texts joined by one space.

    prompt = the tree's first text, directly followed by the message's own when that is another one. Rows with
    an empty response are dropped. lang, message_id and rank are those of the prompter message.
    """
    rows, replies, bounds = replies_by_prompter(forest)
    said = forest["text"][replies].tolist()
    responses = [" ".join(said[start:end]) for start, end in pairwise(bounds.tolist())]
    funnel.step("one for each prompter message", "pair", int((forest.alive & ~forest.is_reply).sum()))
    if "" in responses:
        rows = rows[[response != "" for response in responses]]
        responses = list(filter(None, responses))
    roots = np.maximum.accumulate(np.where(forest.parents < 0, np.arange(len(forest.parents)), 0))[rows]
    asked = zip(*(forest["text"][of].tolist() for of in (roots, rows)), (roots == rows).tolist(), strict=True)
    columns = {
        "prompt": [own if is_first else first + own for first, own, is_first in asked],
        "response": responses,
        "history": [[] for _ in responses],
        **{name: forest[name][rows] for name in OF_MESSAGE},
    }
    funnel.step("with a response", "pair", len(rows))
    return Candidates(Rows(columns), rows.tolist(), [None] * len(rows))


def replies_by_prompter(forest: Forest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (rows of the P prompter messages that have replies left, rows of the replies, P + 1 bounds of each's)."""
    replies = forest.replies()
    replies = replies[np.argsort(forest.parents[replies], kind="stable")]
    parents = forest.parents[replies]
    starts = np.flatnonzero(np.diff(parents, prepend=-1))
    return parents[starts], replies, np.append(starts, len(replies))


def siblings_of_ranks(forest: Forest) -> Candidates:
    """Makes a pair, as `each_reply` does, of every reply to a prompt whose replies have several ranks."""
    _, replies, bounds = replies_by_prompter(forest)
    ranks = forest.numbers("rank")[replies]
    several = np.fmin.reduceat(ranks, bounds[:-1]) < np.fmax.reduceat(ranks, bounds[:-1])
    return each_reply(forest, Funnel(), np.sort(replies[np.repeat(several, np.diff(bounds))]))


def each_reply(forest: Forest, funnel: Funnel, rows: np.ndarray | None = None) -> Candidates:
    """Makes a pair of every reply that is left, with its true history; lang, message_id and rank are the reply's.

    rows: (R,) some of those replies, in order.
    """
    rows = forest.replies() if rows is None else rows
    parents = forest.parents[rows].tolist()
    funnel.step("replies, and prompts that have one", "message", len(rows) + len(set(parents)))
    candidates = Candidates(pairs_of_replies(forest, rows), parents, forest["quality"][rows].tolist())
    funnel.step("one for each reply", "pair", len(rows))
    candidates.filter(funnel, "with a response", [pair["response"] != "" for pair in candidates.pairs])
    return candidates


def pairs_of_replies(forest: Forest, rows: np.ndarray) -> list[dict]:
    """Returns the pair record of each of the replies (R,), with its true history."""
    parents = forest.parents[rows]
    columns = {
        "prompt": forest["text"][parents],
        "response": forest["text"][rows],
        "history": histories(forest, parents),
        **{name: forest[name][rows] for name in OF_MESSAGE},
    }
    return list(Rows(columns))


def histories(forest: Forest, prompters: np.ndarray) -> list[list[dict]]:
    """Returns the turns before each of the prompter messages (P,), first to last; of equal ones it is one list.

    Each is built on that of the prompter message before it, which stands before it in the forest, and which has no
    pair of its own where its replies were all filtered out.
    """
    parents, texts = forest.parents, forest["text"]
    needed, rows = np.zeros(len(parents), dtype=bool), prompters
    while len(rows):
        needed[rows] = True
        replies = parents[rows]
        rows = parents[replies[replies >= 0]]
        rows = rows[~needed[rows]]
    built: dict[int, list[dict]] = {row: [] for row in np.flatnonzero(needed & (parents < 0)).tolist()}
    rows = np.flatnonzero(needed & (parents >= 0))
    before = parents[parents[rows]]
    said = (texts[of].tolist() for of in (before, parents[rows]))
    for row, earlier, question, answer in zip(rows.tolist(), before.tolist(), *said, strict=True):
        turns = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        built[row] = [*built[earlier], *turns]
    return [built[row] for row in prompters.tolist()]


RECIPES = {"best": each_reply, "all": each_reply, "joined": joined}

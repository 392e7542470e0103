"""Three ways from trees to pairs: joined (the original's), all, and the best reply to each prompt."""

from dataclasses import dataclass
from math import inf

from llm_finetuning.data.duplicates import first_of_each, first_of_near
from llm_finetuning.data.filters import Filters, Forest
from llm_finetuning.data.funnel import Funnel
from llm_finetuning.data.pairs import COLUMNS


@dataclass
class Candidates:
    """Pairs that may still be shortened or removed, with what is known of each beyond its record.

    prompters: (N,) row of the prompter message of each pair. qualities: (N,) quality label of the reply, or None.
    """

    pairs: list[dict]
    prompters: list[int]
    qualities: list[float | None]

    def keep(self, kept: list[bool]) -> None:
        """Removes the pairs whose entry in `kept` is False."""
        self.pairs, self.prompters, self.qualities = (
            [value for value, keep in zip(values, kept, strict=True) if keep]
            for values in (self.pairs, self.prompters, self.qualities)
        )

    def truncate(self, funnel: Funnel, filters: Filters) -> None:
        """Cuts the oldest turns of long histories, and removes the pairs that are too long without any."""
        if filters.truncate is not None:
            truncated = filters.truncate(self.pairs)
            self.keep([pair is not None for pair in truncated])
            self.pairs = [pair for pair in truncated if pair is not None]
            funnel.step("short enough in tokens", "pair", len(self.pairs))

    def choose_best(self, funnel: Funnel) -> None:
        """Keeps, for each prompter message, the reply of lowest rank, then best quality, then first in order."""
        best: dict[int, tuple] = {}
        for place, (pair, prompter) in enumerate(zip(self.pairs, self.prompters, strict=True)):
            rank, quality = pair["rank"], self.qualities[place]
            key = (inf if rank is None else rank, inf if quality is None else -quality, place)
            best[prompter] = min(best.get(prompter, key), key)
        places = {key[-1] for key in best.values()}
        self.keep([place in places for place in range(len(self.pairs))])
        funnel.step("preferred to its siblings", "pair", len(self.pairs))

    def drop_duplicates(self, funnel: Funnel, filters: Filters) -> None:
        """Keeps the first of equal prompts with equal histories; its several replies all stay."""
        if filters.drop_duplicates:
            self.keep(first_of_each(self.pairs, self.prompters))
            funnel.step("prompt not seen before", "pair", len(self.pairs))
        if threshold := filters.near_duplicates:
            self.keep(first_of_near(self.pairs, self.prompters, threshold))
            funnel.step(f"prompt less than {threshold:.0%} like an earlier one", "pair", len(self.pairs))


def joined(forest: Forest, funnel: Funnel) -> Candidates:
    """Makes the original's rows: one for each prompter message, with its replies' texts joined by one space.

    prompt = the tree's first text, directly followed by the message's own when that is another one. Rows with
    an empty response are dropped. lang, message_id and rank are those of the prompter message.
    """
    texts, parents, roles = forest["text"], forest.parents, forest["role"]
    trees, ids, langs, ranks = (forest[name] for name in ("message_tree_id", "message_id", "lang", "rank"))
    rows = [row for row, alive in enumerate(forest.alive) if alive]
    replies: dict[int, list[str]] = {}
    for row in rows:
        if roles[row] == "assistant":
            replies.setdefault(parents[row], []).append(texts[row])
    prompters = [row for row in rows if roles[row] == "prompter"]
    funnel.step("one for each prompter message", "pair", len(prompters))
    pairs, with_response, first = [], [], ""
    for row in prompters:
        root = parents[row] < 0
        first = texts[row] if root else first
        response = " ".join(replies.get(row, ()))
        if response:
            prompt = first if root else first + texts[row]
            values = (prompt, response, [], langs[row], trees[row], ids[row], ranks[row])
            pairs.append(dict(zip(COLUMNS, values, strict=True)))
            with_response.append(row)
    funnel.step("with a response", "pair", len(pairs))
    return Candidates(pairs, with_response, [None] * len(pairs))


def each_reply(forest: Forest, funnel: Funnel) -> Candidates:
    """Makes a pair of every reply that is left, with its true history; lang, message_id and rank are the reply's."""
    texts, parents, roles, quality = forest["text"], forest.parents, forest["role"], forest["quality"]
    trees, ids, langs, ranks = (forest[name] for name in ("message_tree_id", "message_id", "lang", "rank"))
    rows = [row for row, alive in enumerate(forest.alive) if alive and roles[row] == "assistant"]
    prompters = {parents[row] for row in rows}
    funnel.step("replies, and prompts that have one", "message", len(rows) + len(prompters))
    histories: dict[int, list[dict]] = {}
    pairs = [
        {
            "prompt": texts[parents[row]],
            "response": texts[row],
            "history": _history(parents[row], forest, histories),
            "lang": langs[row],
            "message_tree_id": trees[row],
            "message_id": ids[row],
            "rank": ranks[row],
        }
        for row in rows
    ]
    candidates = Candidates(pairs, [parents[row] for row in rows], [quality[row] for row in rows])
    funnel.step("one for each reply", "pair", len(pairs))
    candidates.keep([pair["response"] != "" for pair in pairs])
    funnel.step("with a response", "pair", len(candidates.pairs))
    return candidates


def _history(row: int, forest: Forest, histories: dict[int, list[dict]]) -> list[dict]:
    """Returns the turns before a prompter message, first to last, built on those of the prompter message before it.

    `histories` holds those already built. A message stands after its ancestors in the forest, but an ancestor
    whose replies were all filtered out has no pair of its own, so the way up may be more than one step.
    """
    path = []
    while row not in histories and forest.parents[row] >= 0:
        path.append(row)
        row = forest.parents[forest.parents[row]]
    history = histories.setdefault(row, [])
    for row in reversed(path):
        reply = forest.parents[row]
        history = [
            *history,
            {"role": "user", "content": forest["text"][forest.parents[reply]]},
            {"role": "assistant", "content": forest["text"][reply]},
        ]
        histories[row] = history
    return history


RECIPES = {"best": each_reply, "all": each_reply, "joined": joined}

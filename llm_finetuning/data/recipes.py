"""Three ways from trees to pairs: joined (the original's), all, and the best reply to each prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import pandas as pd

from llm_finetuning.data.duplicates import first_of_each, first_of_near
from llm_finetuning.data.filters import Forest
from llm_finetuning.data.funnel import Funnel

PAIR_COLUMNS = ("prompt", "response", "history", "lang", "message_tree_id", "message_id", "rank")


@dataclass
class Candidates:
    """Pairs on their way; `asked` and `qualities` belong to them one by one.

    asked: row of the prompter message that each pair answers. qualities: label of the reply, or None.
    """

    pairs: list[dict]
    asked: list[int]
    qualities: list[float | None]

    def keep(self, kept: list[bool]) -> None:
        self.pairs, self.asked, self.qualities = (
            [value for value, keep in zip(values, kept, strict=True) if keep]
            for values in (self.pairs, self.asked, self.qualities)
        )

    def fit(self, funnel: Funnel, fit: Callable[[list[dict]], list[dict | None]] | None) -> None:
        """Cuts the oldest turns of long histories, and leaves out what is too long without any."""
        if fit is not None:
            fitted = fit(self.pairs)
            self.keep([pair is not None for pair in fitted])
            self.pairs = [pair for pair in fitted if pair is not None]
            funnel.step("short enough in tokens", "pair", len(self.pairs))

    def choose_best(self, funnel: Funnel) -> None:
        """To each prompter message the reply of lowest rank, then best quality, then first in order."""
        best: dict[int, tuple] = {}
        for place, (pair, asked) in enumerate(zip(self.pairs, self.asked, strict=True)):
            rank, quality = pair["rank"], self.qualities[place]
            key = (inf if rank is None else rank, inf if quality is None else -quality, place)
            best[asked] = min(best.get(asked, key), key)
        chosen = {key[-1] for key in best.values()}
        self.keep([place in chosen for place in range(len(self.pairs))])
        funnel.step("preferred to its siblings", "pair", len(self.pairs))

    def drop_duplicates(self, funnel: Funnel, exact: bool, threshold: float | None) -> None:
        """Of equal prompts with equal histories keeps the first; its several replies all stay."""
        if exact:
            self.keep(first_of_each(self.pairs, self.asked))
            funnel.step("prompt not seen before", "pair", len(self.pairs))
        if threshold:
            self.keep(first_of_near(self.pairs, self.asked, threshold))
            funnel.step(f"prompt less than {threshold:.0%} like an earlier one", "pair", len(self.pairs))

    def frame(self) -> pd.DataFrame:
        """One row a pair, the columns of the pair record."""
        columns = {name: [pair[name] for pair in self.pairs] for name in PAIR_COLUMNS}
        return pd.DataFrame(columns, dtype=object).astype({"rank": "Int64"})


def joined(forest: Forest, funnel: Funnel) -> Candidates:
    """The original's rows: one a prompter message, its replies' texts joined by one space.

    prompt = the tree's first text, directly followed by the message's own when that is another one. Rows with
    an empty response are dropped. lang, message_id and rank are those of the prompter message.
    """
    texts, above, roles = forest["text"], forest.above, forest["role"]
    trees, ids, langs, ranks = (forest[name] for name in ("message_tree_id", "message_id", "lang", "rank"))
    rows = [row for row, alive in enumerate(forest.alive) if alive]
    answers: dict[int, list[str]] = {}
    for row in rows:
        if roles[row] == "assistant":
            answers.setdefault(above[row], []).append(texts[row])
    asked = [row for row in rows if roles[row] == "prompter"]
    funnel.step("one for each prompter message", "pair", len(asked))
    pairs, answered, first = [], [], ""
    for row in asked:
        root = above[row] < 0
        first = texts[row] if root else first
        response = " ".join(answers.get(row, ()))
        if response:
            prompt = first if root else first + texts[row]
            known = (prompt, response, [], langs[row], trees[row], ids[row], ranks[row])
            pairs.append(dict(zip(PAIR_COLUMNS, known, strict=True)))
            answered.append(row)
    funnel.step("with a response", "pair", len(pairs))
    return Candidates(pairs, answered, [None] * len(pairs))


def each_reply(forest: Forest, funnel: Funnel) -> Candidates:
    """Every reply that is left once, with its true history; lang, message_id and rank are the reply's."""
    texts, above, roles, quality = forest["text"], forest.above, forest["role"], forest["quality"]
    trees, ids, langs, ranks = (forest[name] for name in ("message_tree_id", "message_id", "lang", "rank"))
    rows = [row for row, alive in enumerate(forest.alive) if alive and roles[row] == "assistant"]
    answered = {above[row] for row in rows}
    funnel.step("replies, and prompts that have one", "message", len(rows) + len(answered))
    histories: dict[int, list[dict]] = {}
    pairs = [
        {
            "prompt": texts[above[row]],
            "response": texts[row],
            "history": _history(above[row], forest, histories),
            "lang": langs[row],
            "message_tree_id": trees[row],
            "message_id": ids[row],
            "rank": ranks[row],
        }
        for row in rows
    ]
    candidates = Candidates(pairs, [above[row] for row in rows], [quality[row] for row in rows])
    funnel.step("one for each reply", "pair", len(pairs))
    candidates.keep([pair["response"] != "" for pair in pairs])
    funnel.step("with a response", "pair", len(candidates.pairs))
    return candidates


def _history(row: int, forest: Forest, histories: dict[int, list[dict]]) -> list[dict]:
    """The turns before a prompter message, first to last; built on that of the prompter message before it.

    `histories` holds those already built. A message stands after its ancestors in the forest, but an ancestor
    whose replies were all filtered out has no pair of its own, so the way up may be more than one step.
    """
    path = []
    while row not in histories and forest.above[row] >= 0:
        path.append(row)
        row = forest.above[forest.above[row]]
    history = histories.setdefault(row, [])
    for row in reversed(path):
        reply = forest.above[row]
        history = [
            *history,
            {"role": "user", "content": forest["text"][forest.above[reply]]},
            {"role": "assistant", "content": forest["text"][reply]},
        ]
        histories[row] = history
    return history


RECIPES = {"best": each_reply, "all": each_reply, "joined": joined}

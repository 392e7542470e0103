"""Message trees in memory, and the filters that remove messages before a reply is chosen among siblings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llm_finetuning.data.forest import arrange
from llm_finetuning.data.funnel import Funnel
from llm_finetuning.data.pairs import objects

REQUIRED = ("message_tree_id", "message_id", "parent_id", "role", "text")


@dataclass(frozen=True)
class Filters:
    """The filters of a data preparation, each off by default.

    `tree_states` removes whole trees; `languages`, `drop_deleted` and `drop_unreviewed` remove a message with
    everything below it. Labels, length and `drop_synthetic` remove replies alone, before one is chosen among
    siblings, so that the next best takes the place. A message without the value that a filter reads passes it.
    """

    languages: Sequence[str] | None = None
    """Codes of the languages to keep; None or empty keeps all."""
    tree_states: Sequence[str] | None = None
    """States of the trees to keep, such as "ready_for_export"; None or empty keeps all."""
    drop_deleted: bool = False
    """Removes deleted messages."""
    drop_unreviewed: bool = False
    """Removes messages that were rejected in review (review_result false)."""
    drop_synthetic: bool = False
    """Removes replies that a model wrote."""
    min_quality: float | None = None
    """Lowest quality label of a reply, 0 to 1."""
    max_toxicity: float | None = None
    """Highest toxicity label of a reply, 0 to 1."""
    max_detoxify: float | None = None
    """Highest toxicity of a reply by the detoxify model, 0 to 1."""
    min_response_chars: int = 0
    """Shortest reply in characters, white space around it not counted."""
    truncate: Callable[[list[dict]], list[dict | None]] | None = None
    """Shortens candidate pairs to the longest allowed length; None stands for a pair that stays too long."""
    drop_duplicates: bool = False
    """Of equal prompts with equal histories keeps the first, with all its replies."""
    near_duplicates: float | None = None
    """Jaccard similarity of five-letter shingles from which on two prompts count as equal, 0 to 1."""


@dataclass
class Forest:
    """Messages as columns in depth-first order: each stands after its parent and before its later siblings.

    order: the rows of `messages` in depth-first order. columns: those read so far. parents: (N,) row of the parent,
    -1 at a root. is_reply: (N,) whether an assistant wrote it. alive: (N,) False for what a filter removed.
    """

    messages: pd.DataFrame
    order: Sequence[int]
    columns: dict[str, np.ndarray]
    parents: np.ndarray
    is_reply: np.ndarray
    alive: np.ndarray

    @classmethod
    def of(cls, messages: pd.DataFrame) -> "Forest":
        """Builds the forest; raises ValueError when a column is missing, a text is null, or rows are no forest."""
        missing = [name for name in REQUIRED if name not in messages.columns]
        if missing:
            raise ValueError(f"The messages lack the columns {', '.join(missing)}. Read them with read_messages.")
        columns = {name: objects(messages[name]) for name in REQUIRED}
        tree_ids, ids, parents, roles, texts = columns.values()

        def complain(row: int, problem: str) -> None:
            raise ValueError(f"message {ids[row]} (row {row}): {problem}.")

        texts = texts.tolist()
        if None in texts:
            complain(texts.index(None), "text is null")
        order, above = arrange(tree_ids, ids.tolist(), parents.tolist(), roles, complain)
        if not isinstance(order, range):
            columns = {name: values[order] for name, values in columns.items()}
            places = np.full(len(order) + 1, -1)
            places[order] = np.arange(len(order))
            above = places[above[order]]
        is_reply = columns["role"] == "assistant"
        return cls(messages, order, columns, above, is_reply, np.ones(len(order), dtype=bool))

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns (N,) the values of a column in depth-first order, None where there is none."""
        if name not in self.columns:
            exists = name in self.messages.columns
            values = objects(self.messages[name]) if exists else np.full(len(self.parents), None)
            self.columns[name] = values if isinstance(self.order, range) else values[self.order]
        return self.columns[name]

    def numbers(self, name: str) -> np.ndarray:
        """Returns (N,) the numbers of a column in depth-first order, NaN where there is none."""
        if name not in self.messages.columns:
            return np.full(len(self.parents), np.nan)
        values = self.messages[name].to_numpy(dtype=float, na_value=np.nan)
        return values if isinstance(self.order, range) else values[self.order]

    def count(self) -> int:
        """Returns the number of messages that no filter has removed."""
        return int(self.alive.sum())

    def replies(self) -> np.ndarray:
        """Returns the rows of the replies that no filter has removed."""
        return np.flatnonzero(self.alive & self.is_reply)

    def answered(self) -> np.ndarray:
        """Returns (N,) whether a message has a reply that no filter has removed."""
        found = np.zeros(len(self.alive), dtype=bool)
        found[self.parents[self.replies()]] = True
        return found

    def drop_branches(self, keep: Sequence[bool]) -> None:
        """Removes the messages that are not kept and everything below them."""
        gone = np.append(~(self.alive & np.array(keep, dtype=bool)), False)
        up = np.append(self.parents, -1)  # of each message an ancestor twice as far away with every round
        while (up >= 0).any():
            gone |= gone[up]
            up = up[up]
        self.alive = ~gone[:-1]

    def drop_replies(self, keep: Sequence[bool]) -> None:
        """Removes replies from the choice among siblings; what was said after them keeps its true history."""
        self.alive &= np.array(keep, dtype=bool) | ~self.is_reply


def count_trees(forest: Forest, funnel: Funnel, attrs: dict, filters: Filters) -> None:
    """Counts the source's trees, the broken ones, those of the split and of the wanted states; then their messages."""
    roots = np.flatnonzero(forest.parents < 0)
    broken = len({problem["tree"] or f"line {problem['line']}" for problem in attrs.get("skipped", [])})
    sound = attrs.get("trees", len(roots))
    funnel.step("trees in the source", "tree", sound + broken)
    if broken:
        funnel.step("sound (broken ones are named in the report)", "tree", sound)
    if attrs.get("split") or len(roots) != sound:
        funnel.step(f"in the {attrs['split']} split" if attrs.get("split") else "given", "tree", len(roots))
    funnel.without_reply["no reply in the source"] = int((~forest.is_reply & ~forest.answered()).sum())
    if states := filters.tree_states:
        wanted = [state is None or state in states for state in forest["tree_state"]]
        name = f"tree state {', '.join(states)}"
        before = _drop(forest, funnel, name, (forest.parents >= 0) | np.array(wanted, dtype=bool))
        gone = ({"text": forest["text"][row]} for row in roots if before[row] and not forest.alive[row])
        funnel.step(name, "tree", int(forest.alive[roots].sum()), "set tree_states = ''", gone)
    funnel.step("messages of these trees", "message", forest.count())


def _drop(forest: Forest, funnel: Funnel, name: str, keep: Sequence[bool], replies_alone: bool = False) -> np.ndarray:
    """Removes what is not kept, counts the prompts that lose their last reply; returns who was alive before."""
    before, answered = forest.alive.copy(), forest.answered().sum()
    (forest.drop_replies if replies_alone else forest.drop_branches)(keep)
    funnel.without_reply[name] = int(answered - forest.answered().sum())
    return before


def _filter(
    forest: Forest, funnel: Funnel, name: str, keep: Sequence[bool], cure: str, replies_alone: bool = False
) -> None:
    """Applies a filter on messages as a step of the funnel."""
    before = _drop(forest, funnel, name, keep, replies_alone)
    gone = ({"text": forest["text"][row]} for row in np.flatnonzero(before & ~forest.alive))
    funnel.step(name, "message", forest.count(), f"set {cure}", gone)


def main_subtag(lang: str) -> str:
    """Returns the language of a code in small letters, without its region or script: "pt-BR" → "pt"."""
    return lang.replace("_", "-").split("-")[0].strip().casefold()


def speaks(lang: str | None, languages: Sequence[str]) -> bool:
    """Whether a language code is one of `languages`, by main subtag; an unknown one passes."""
    return lang is None or main_subtag(lang) in map(main_subtag, languages)


def drop_messages(forest: Forest, funnel: Funnel, filters: Filters) -> None:
    """Applies the filters on any message; what hangs below a removed one has lost its context and goes too."""
    if filters.drop_deleted:
        kept = [deleted is not True for deleted in forest["deleted"]]
        _filter(forest, funnel, "not deleted", kept, "drop_deleted = 'no'")
    if filters.drop_unreviewed:
        kept = [reviewed is not False for reviewed in forest["review_result"]]
        _filter(forest, funnel, "reviewed", kept, "drop_unreviewed = 'no'")
    if languages := filters.languages:
        kept = {lang: speaks(lang, languages) for lang in set(forest["lang"])}
        name = f"language {', '.join(languages)}"
        _filter(forest, funnel, name, list(map(kept.get, forest["lang"])), "languages = ''")


def drop_replies(forest: Forest, funnel: Funnel, filters: Filters) -> None:
    """Applies the filters on replies alone, before one is chosen among siblings."""
    if filters.drop_synthetic:
        kept = [synthetic is not True for synthetic in forest["synthetic"]]
        _filter(forest, funnel, "reply written by a person", kept, "drop_synthetic = 'no'", True)
    if (floor := filters.min_quality) is not None:
        kept = ~(forest.numbers("quality") < floor)
        _filter(forest, funnel, f"reply's quality at least {floor:g}", kept, "min_quality = 0", True)
    for name, ceiling in (("toxicity", filters.max_toxicity), ("detoxify", filters.max_detoxify)):
        if ceiling is not None:
            kept = ~(forest.numbers(name) > ceiling)
            _filter(forest, funnel, f"reply's {name} at most {ceiling:g}", kept, f"max_{name} = 1", True)
    if shortest := filters.min_response_chars:
        kept = [len(text.strip()) >= shortest for text in forest["text"]]
        name = f"reply of at least {shortest} characters"
        _filter(forest, funnel, name, kept, "min_response_chars = 0", True)

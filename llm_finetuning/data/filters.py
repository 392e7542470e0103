"""Message trees in memory, and the filters that take messages away before replies are chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from llm_finetuning.data.forest import arrange
from llm_finetuning.data.funnel import Funnel

REQUIRED = ("message_tree_id", "message_id", "parent_id", "role", "text")


@dataclass
class Forest:
    """Messages as columns in depth-first order: each stands after its parent and before its later siblings.

    order: the rows of `messages` in depth-first order, None if they stand so already. columns: those asked
    for so far. above: row of the parent, -1 at a root. alive: False for what a filter took away.
    """

    messages: pd.DataFrame
    order: list[int] | None
    columns: dict[str, list]
    above: list[int]
    alive: list[bool]

    @classmethod
    def of(cls, messages: pd.DataFrame) -> "Forest":
        """Raises ValueError when a column is missing, a text is null, or the rows are no forest."""
        missing = [name for name in REQUIRED if name not in messages.columns]
        if missing:
            raise ValueError(f"The messages lack the columns {', '.join(missing)}. Read them with read_messages.")
        columns = {name: as_list(messages[name]) for name in REQUIRED}

        def complain(row: int, problem: str) -> None:
            raise ValueError(f"message {columns['message_id'][row]} (row {row}): {problem}.")

        if None in columns["text"]:
            complain(columns["text"].index(None), "text is null")
        order = arrange(*[columns[name] for name in REQUIRED[:4]], complain)
        if order == list(range(len(order))):
            order = None
        else:
            columns = {name: [values[row] for row in order] for name, values in columns.items()}
        rows = dict(zip(columns["message_id"], range(len(messages)), strict=True))
        above = [rows.get(parent, -1) for parent in columns["parent_id"]]
        return cls(messages, order, columns, above, [True] * len(messages))

    def __getitem__(self, name: str) -> list:
        """The values of a column in depth-first order, None where there is none."""
        if name not in self.columns:
            known = name in self.messages.columns
            values = as_list(self.messages[name]) if known else [None] * len(self.above)
            self.columns[name] = values if self.order is None else [values[row] for row in self.order]
        return self.columns[name]

    def count(self) -> int:
        return sum(self.alive)

    def drop_branches(self, keep: list[bool]) -> None:
        """Takes away the messages that are not kept and everything below them."""
        alive = self.alive
        for row, above in enumerate(self.above):
            alive[row] = alive[row] and keep[row] and (above < 0 or alive[above])

    def drop_replies(self, keep: list[bool]) -> None:
        """Takes replies out of the choice; what was said after them keeps its true history."""
        self.alive = [
            alive and (kept or role == "prompter")
            for alive, kept, role in zip(self.alive, keep, self["role"], strict=True)
        ]


def as_list(column: pd.Series) -> list:
    """The values as Python objects, None for every kind of missing value."""
    return column.astype(object).where(column.notna(), None).tolist() if column.hasnans else column.tolist()


def count_trees(forest: Forest, funnel: Funnel, attrs: dict, tree_states: Sequence[str] | None) -> None:
    """Trees of the source, broken ones, the split, the tree states; then the messages that these leave."""
    roots = [row for row, above in enumerate(forest.above) if above < 0]
    broken = len({problem["tree"] or f"line {problem['line']}" for problem in attrs.get("skipped", [])})
    sound = attrs.get("trees", len(roots))
    funnel.step("trees in the source", "tree", sound + broken)
    if broken:
        funnel.step("sound (broken ones are named in the report)", "tree", sound)
    if attrs.get("split") or len(roots) != sound:
        funnel.step(f"in the {attrs['split']} split" if attrs.get("split") else "given", "tree", len(roots))
    if tree_states:
        states = forest["tree_state"]
        forest.drop_branches(
            [forest.above[row] >= 0 or state is None or state in tree_states for row, state in enumerate(states)]
        )
        funnel.step(f"tree state {', '.join(tree_states)}", "tree", sum(forest.alive[row] for row in roots))
    funnel.step("messages of these trees", "message", forest.count())


def drop_messages(
    forest: Forest,
    funnel: Funnel,
    languages: Sequence[str] | None,
    drop_deleted: bool,
    drop_unreviewed: bool,
) -> None:
    """Filters on any message; what hangs below a dropped one has lost its context and goes too."""
    if drop_deleted:
        forest.drop_branches([deleted is not True for deleted in forest["deleted"]])
        funnel.step("not deleted", "message", forest.count())
    if drop_unreviewed:
        forest.drop_branches([reviewed is not False for reviewed in forest["review_result"]])
        funnel.step("reviewed", "message", forest.count())
    if languages:
        forest.drop_branches([lang is None or lang in languages for lang in forest["lang"]])
        funnel.step(f"language {', '.join(languages)}", "message", forest.count())


def drop_replies(
    forest: Forest,
    funnel: Funnel,
    drop_synthetic: bool,
    min_quality: float | None,
    max_toxicity: float | None,
    max_detoxify: float | None,
    min_response_chars: int,
) -> None:
    """Filters on replies alone, before one is chosen among siblings."""
    if drop_synthetic:
        forest.drop_replies([synthetic is not True for synthetic in forest["synthetic"]])
        funnel.step("reply written by a person", "message", forest.count())
    if min_quality is not None:
        forest.drop_replies([value is None or value >= min_quality for value in forest["quality"]])
        funnel.step(f"reply's quality at least {min_quality:g}", "message", forest.count())
    for name, ceiling in (("toxicity", max_toxicity), ("detoxify", max_detoxify)):
        if ceiling is not None:
            forest.drop_replies([value is None or value <= ceiling for value in forest[name]])
            funnel.step(f"reply's {name} at most {ceiling:g}", "message", forest.count())
    if min_response_chars:
        forest.drop_replies([len(text.strip()) >= min_response_chars for text in forest["text"]])
        funnel.step(f"reply of at least {min_response_chars} characters", "message", forest.count())

"""Open-Assistant conversation trees: read from any export, and flattened into prompt/response pairs."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from llm_finetuning.data import preferences
from llm_finetuning.data.filters import Filters, Forest, count_trees, drop_messages, drop_replies
from llm_finetuning.data.forest import arrange
from llm_finetuning.data.funnel import Funnel
from llm_finetuning.data.message_files import columns_of_file
from llm_finetuning.data.messages import FIELDS
from llm_finetuning.data.pairs import Rows, to_frame
from llm_finetuning.data.reading import Problems, without_collector
from llm_finetuning.data.recipes import RECIPES, Candidates, siblings_of_ranks
from llm_finetuning.data.sources import Located, Splits, locate
from llm_finetuning.data.splits import in_split

SPLITS = ("train", "validation")
DTYPES = {"rank": "Int64"}
DTYPES |= dict.fromkeys(("deleted", "review_result", "synthetic"), "boolean")
DTYPES |= dict.fromkeys(("quality", "toxicity", "detoxify"), "float64")


@dataclass(frozen=True)
class Flattened:
    """The result of `flatten`: `pairs`, one row for each pair record, and `funnel` with the count of every loss.

    funnel: step, unit (tree, message, preference pair or pair), kept, dropped; kept + dropped = kept of that unit's
    step before; attrs as in `Funnel`. preferences: preference records. shortened: how many of the pairs lost turns of
    their history ("pairs"), and how many of those all turns ("without_history").
    """

    pairs: pd.DataFrame
    funnel: pd.DataFrame
    preferences: list[dict] = field(default_factory=list)
    shortened: dict[str, int] = field(default_factory=dict)


@without_collector()
def read_messages(
    source: str | Path | Located,
    split: str | None = None,
    on_error: str = "raise",
    validation_share: float = 0.1,
    revision: str = "main",
    splits: Splits = ("", ""),
) -> pd.DataFrame:
    """Reads the messages of an OASST export, one row each: trees by first appearance, each in depth-first order.

    source: "sample", a dataset id on the Hub, a file or folder of nested trees or flat messages in any form that
    `records` reads, or what `locate` found of one. split: None = everything (of the sample, whose splits overlap on
    purpose, what is trained on), "train" or "validation"; a source without splits is split by tree,
    `validation_share` of the trees (by a hash of the id) being validation. splits: what the source calls its own.
    Columns: FIELDS; quality, toxicity and detoxify are averages from 0 to 1, null where there are none.
    attrs: source, revision or sha256, split, trees (in the source, before the split), skipped.
    Raises FileNotFoundError for a missing path, ValueError with file and line for bad input; with
    on_error="skip" a bad tree is left out and named in attrs["skipped"] instead.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f'split = {split!r}: "train", "validation" or None')
    found = locate(source, split, revision, splits)
    problems, lines = Problems(str(found.files[0]), on_error), []
    columns: list[list] = [[] for _ in FIELDS]
    with found.hashing():
        for path in found.files:
            problems.source = str(path)
            for numbers, batch in columns_of_file(path, problems):
                lines += numbers
                for column, values in zip(columns, batch, strict=True):
                    column += values
    order = _order_of_sound_trees(columns, lines, problems)
    if not order:
        first = problems.found[0] if problems.found else {"line": 0, "problem": "no message"}
        raise ValueError(f"{found.source}: no sound tree; line {first['line']}: {first['problem']}. Write it again.")
    tree_ids = columns[0]
    trees = len({tree_ids[row] for row in order})
    if split and not found.origin["split_in_source"]:
        wanted = in_split((tree_ids[row] for row in order), split, validation_share)
        order = [row for row in order if tree_ids[row] in wanted]
    messages = _to_frame(columns, order)
    messages.attrs = found.origin | {"split": split, "trees": trees, "skipped": problems.found}
    return messages


def _to_frame(columns: list[list], order: Sequence[int]) -> pd.DataFrame:
    """Puts rows into a table; texts stay Python objects, because pandas' text types would copy them."""
    series, order = {}, np.array(order)
    for name, values in zip(FIELDS, columns, strict=True):
        dtype = DTYPES.get(name, object)
        series[name] = pd.Series(pd.array(values, dtype=dtype).take(order), dtype=dtype)
    return pd.DataFrame(series, copy=False)  # one block of all would be another copy


def _order_of_sound_trees(columns: list[list], lines: list[int], problems: Problems) -> Sequence[int]:
    """Returns the rows in depth-first order, without the trees in which a problem was found."""
    bad = {problem["tree"] for problem in problems.found}
    tree_ids, ids, parents, roles, *_ = columns

    def complain(row: int, problem: str) -> None:
        if tree_ids[row] not in bad:  # one entry a tree
            problems.add(lines[row], tree_ids[row], problem)
            bad.add(tree_ids[row])

    order, _ = arrange(tree_ids, ids, parents, roles, complain)
    return [row for row in order if tree_ids[row] not in bad] if bad else order


@without_collector()
def flatten(
    messages: pd.DataFrame,
    replies: str = "best",
    languages: Sequence[str] | None = None,
    *,
    filters: Filters | None = None,
    preference_pairs: str = "best-worst",
    **single: object,
) -> Flattened:
    """Makes prompt/response pairs of messages, and counts what each step leaves out.

    replies: "best" = to each prompter message its most preferred reply (rank, then quality, then order; one
    without a rank only where no sibling is ranked), with the true history; "all" = every reply once; "joined"
    = the original's rows: first prompt + own prompt without a separator, all replies joined by a space.
    preference_pairs: which ranked siblings become preferences, see `preferences.of_siblings`.
    filters: all of them as one object, none by default. languages, single: single fields of `Filters` by name,
    which replace those of `filters`. Raises TypeError for a field that `Filters` does not have, ValueError for an
    unknown recipe, missing columns, or rows that are no forest.
    """
    if replies not in RECIPES:
        raise ValueError(f"replies = {replies!r}: one of {', '.join(RECIPES)}")
    filters = filters or Filters()
    filters = replace(filters, languages=languages or filters.languages, **single)
    forest, funnel = Forest.of(messages), Funnel()
    count_trees(forest, funnel, messages.attrs, filters)
    drop_messages(forest, funnel, filters)
    drop_replies(forest, funnel, filters)
    candidates = RECIPES[replies](forest, funnel)
    ranked = _preferences(forest, filters, preference_pairs) if replies == "joined" else None
    return finish(candidates, replies, filters, funnel, preference_pairs, ranked)


def _preferences(forest: Forest, filters: Filters, preference_pairs: str) -> tuple[list[dict], list[Hashable]]:
    """Returns what `preferences.of_siblings` does, of single replies where the recipe joins them."""
    if filters.truncate is None:
        return preferences.of_forest(forest, preference_pairs)
    siblings = siblings_of_ranks(forest)
    siblings.truncate(Funnel(), filters)
    return preferences.of_siblings(siblings.pairs, siblings.prompters, preference_pairs)


def finish(
    candidates: Candidates,
    replies: str,
    filters: Filters,
    funnel: Funnel,
    preference_pairs: str,
    ranked: tuple[list[dict], list[Hashable]] | None = None,
) -> Flattened:
    """Cuts, chooses and filters candidates; preferences come from them before one is chosen, or are `ranked`."""
    candidates.truncate(funnel, filters)
    funnel.replies_left = Counter(Counter(candidates.prompters).values())
    records, owners = ranked or preferences.of_siblings(candidates.pairs, candidates.prompters, preference_pairs)
    liked = [] if isinstance(candidates.pairs, Rows) else [pair.pop("liked", True) for pair in candidates.pairs]
    if not all(liked):
        candidates.filter(funnel, "response that people liked", liked)
    if replies == "best":
        candidates.choose_best(funnel)
    candidates.drop_duplicates(funnel, filters)
    left = set(candidates.prompters)
    kept = [record for record, owner in zip(records, owners, strict=True) if owner in left]
    if records:
        funnel.step(f"siblings of different rank ({preference_pairs})", preferences.UNIT, len(records))
        funnel.step("prompt among the pairs", preferences.UNIT, len(kept))
    return Flattened(to_frame(candidates.pairs), funnel.frame(), kept, candidates.shortened())

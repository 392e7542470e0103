"""Open-Assistant conversation trees: read from any export, and flattened into prompt/response pairs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from llm_finetuning import sample
from llm_finetuning.data.filters import Forest, count_trees, drop_messages, drop_replies
from llm_finetuning.data.forest import arrange
from llm_finetuning.data.funnel import Funnel
from llm_finetuning.data.messages import FIELDS, rows_of_file
from llm_finetuning.data.parquet import is_parquet, rows_of_parquet
from llm_finetuning.data.reading import Problems, existing_file, in_validation, sha256
from llm_finetuning.data.recipes import RECIPES

SPLITS = ("train", "validation")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = {"rank": "Int64"}
DTYPES |= dict.fromkeys(("deleted", "review_result", "synthetic"), "boolean")
DTYPES |= dict.fromkeys(("quality", "toxicity", "detoxify"), "float64")
FILE_SUFFIXES = (".jsonl", ".json", ".gz", ".parquet", ".csv", ".txt")


@dataclass(frozen=True)
class Flattened:
    """What flattening gave: `pairs`, one row a pair record, and `funnel` with the count of every loss.

    funnel: step, unit (tree, message or pair), kept, dropped; kept + dropped = kept of the step before in
    that unit.
    """

    pairs: pd.DataFrame
    funnel: pd.DataFrame


def read_messages(
    source: str | Path,
    split: str | None = None,
    on_error: str = "raise",
    validation_share: float = 0.1,
    revision: str = "main",
) -> pd.DataFrame:
    """The messages of an OASST export, one row each, trees by first appearance, each in depth-first order.

    source: "sample", a dataset id on the Hub, or a file: JSON lines (also gzipped) of nested trees or flat
    messages, or parquet. split: None = everything, "train" or "validation"; a source without splits is split
    by tree, `validation_share` of the trees (by a hash of the id) being validation.
    Columns: FIELDS; quality, toxicity and detoxify are averages from 0 to 1, null where there are none.
    attrs: source, revision or sha256, split, trees (in the source, before the split), skipped.
    Raises FileNotFoundError for a missing path, ValueError with file and line for bad input; with
    on_error="skip" a bad tree is left out and named in attrs["skipped"] instead.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f'split = {split!r}: "train", "validation" or None')
    files, origin = locate(source, split, revision)
    problems = Problems(str(files[0]), on_error)
    lines, rows = [], []
    for path in files:
        problems.source = str(path)
        for line, row in rows_of_parquet(path, problems) if is_parquet(path) else rows_of_file(path, problems):
            lines.append(line)
            rows.append(row)
    order = _arranged(rows, lines, problems)
    if not order:
        first = problems.found[0] if problems.found else {"line": 0, "problem": "no message"}
        raise ValueError(f"{source}: no sound tree; line {first['line']}: {first['problem']}. Write it again.")
    trees = len({rows[row][0] for row in order})
    if split and not origin["split_in_source"]:
        order = [row for row in order if in_validation(rows[row][0], validation_share) == (split == "validation")]
    messages = _to_frame([rows[row] for row in order])
    messages.attrs = origin | {"split": split, "trees": trees, "skipped": problems.found}
    return messages


def _to_frame(rows: list[tuple]) -> pd.DataFrame:
    """Messages as a table; texts stay Python objects, as pandas' text types would copy them."""
    columns = zip(FIELDS, zip(*rows, strict=True) if rows else [()] * len(FIELDS), strict=True)
    return pd.DataFrame({name: pd.Series(values, dtype=DTYPES.get(name, object)) for name, values in columns})


def locate(source: str | Path, split: str | None, revision: str = "main") -> tuple[list[Path], dict]:
    """(files, {"source", "revision" or "sha256", "split_in_source"}); hub datasets are fetched."""
    if source == "sample":
        source = sample.TREES
    elif not Path(source).exists() and _looks_like_hub_id(str(source)):
        return _fetch(str(source), split, revision)
    path = existing_file(source)
    return [path], {"source": path.name, "sha256": sha256(path), "split_in_source": False}


def _looks_like_hub_id(source: str) -> bool:
    return HUB_ID.fullmatch(source) is not None and not source.endswith(FILE_SUFFIXES)


def _fetch(dataset: str, split: str | None, revision: str) -> tuple[list[Path], dict]:
    """The dataset's parquet files from the Hub, or from its cache when there is no network."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(dataset, repo_type="dataset", revision=revision, allow_patterns="*.parquet"))
    files = sorted(folder.rglob("*.parquet"))
    names = {path.name.split("-")[0] for path in files}
    if not files:
        raise ValueError(f"{dataset} has no parquet files at revision {revision}. Download a file of it and name that.")
    if split and len(names) > 1 and split not in names:
        raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(sorted(names))}.")
    origin = {"source": dataset, "revision": folder.name, "split_in_source": len(names) > 1}
    if split and len(names) > 1:
        files = [path for path in files if path.name.split("-")[0] == split]
    return files, origin


def _arranged(rows: list[tuple], lines: list[int], problems: Problems) -> list[int]:
    """Depth-first order of the rows, without the trees in which a problem was found."""
    if not rows:
        return []
    bad = {problem["tree"] for problem in problems.found}
    tree_ids, ids, parents, roles, *_ = zip(*rows, strict=True)

    def complain(row: int, problem: str) -> None:
        if tree_ids[row] not in bad:  # one entry a tree
            problems.add(lines[row], tree_ids[row], problem)
            bad.add(tree_ids[row])

    order = arrange(tree_ids, ids, parents, roles, complain)
    return [row for row in order if tree_ids[row] not in bad] if bad else order


def flatten(
    messages: pd.DataFrame,
    replies: str = "best",
    languages: Sequence[str] | None = None,
    tree_states: Sequence[str] | None = None,
    drop_deleted: bool = False,
    drop_unreviewed: bool = False,
    drop_synthetic: bool = False,
    min_quality: float | None = None,
    max_toxicity: float | None = None,
    max_detoxify: float | None = None,
    min_response_chars: int = 0,
    drop_duplicates: bool = False,
    near_duplicates: float | None = None,
    fit: Callable[[list[dict]], list[dict | None]] | None = None,
) -> Flattened:
    """Prompt/response pairs from messages, and what each step left out. Every filter is off by default.

    replies: "best" = to each prompter message its most preferred reply (rank, then quality, then order; one
    without a rank only where no sibling is ranked), with the true history; "all" = every reply once; "joined"
    = the original's rows: first prompt + own prompt without a separator, all replies joined by a space.
    languages, tree_states: the ones that are kept, and what has none. drop_deleted,
    drop_unreviewed (review_result false) and languages take away whole branches, the others replies only, all
    before the choice: the next best reply takes the place. min_quality, max_toxicity (labels), max_detoxify:
    0 to 1, unlabelled replies are kept. min_response_chars: in characters. drop_duplicates, near_duplicates
    (Jaccard similarity of five-letter shingles from which on two prompts are the same): of prompts with the
    same history, the first stays. fit: the pairs cut to their longest allowed length, None = too long.
    Raises ValueError for an unknown recipe, missing columns, or rows that are no forest.
    """
    if replies not in RECIPES:
        raise ValueError(f"replies = {replies!r}: one of {', '.join(RECIPES)}")
    forest, funnel = Forest.of(messages), Funnel()
    count_trees(forest, funnel, messages.attrs, tree_states)
    drop_messages(forest, funnel, languages, drop_deleted, drop_unreviewed)
    drop_replies(forest, funnel, drop_synthetic, min_quality, max_toxicity, max_detoxify, min_response_chars)
    candidates = RECIPES[replies](forest, funnel)
    candidates.fit(funnel, fit)
    if replies == "best":
        candidates.choose_best(funnel)
    candidates.drop_duplicates(funnel, drop_duplicates, near_duplicates)
    return Flattened(candidates.frame(), funnel.frame())

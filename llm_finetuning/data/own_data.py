"""Reads a user's own pairs and chats in any known shape, and filters them; tells them from trees by their content."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from llm_finetuning.data import preferences
from llm_finetuning.data.duplicates import normalise
from llm_finetuning.data.filters import Filters, speaks
from llm_finetuning.data.funnel import Funnel
from llm_finetuning.data.oasst import Flattened, finish
from llm_finetuning.data.pairs import check, to_frame, to_records
from llm_finetuning.data.reading import Problems, without_collector
from llm_finetuning.data.recipes import Candidates, drop_repeated, prompters_of
from llm_finetuning.data.record_pairs import NO_SHAPE, Reader
from llm_finetuning.data.records import records
from llm_finetuning.data.shapes import USUAL, Columns, recognise
from llm_finetuning.data.sources import Located, Splits, locate
from llm_finetuning.data.splits import in_split
from llm_finetuning.data.turns import Unusable

CURE = 'Correct the file, or read it with on_error="skip", which uses what can be used and counts the rest.'


def is_pairs_file(path: str | Path, columns: Columns = USUAL) -> bool:
    """Whether a file holds pairs or chats, and not trees or messages: by its first sound record."""
    first = next((record for _, record in records(Path(path), Problems(str(path), "skip"))), {})
    root = first.get("prompt") if type(first.get("prompt")) is dict else {}
    is_tree = bool({"message_id", "role", "text", "replies"} & root.keys())
    return not is_tree and (
        recognise(first, columns) is not None or not {"message_id", "message_tree_id"} & first.keys()
    )


@without_collector()
def read_pairs(
    source: str | Path | Located,
    split: str | None = None,
    on_error: str = "raise",
    validation_share: float = 0.1,
    revision: str = "main",
    splits: Splits = ("", ""),
    columns: Columns = USUAL,
) -> pd.DataFrame:
    """Reads the pairs of a user's own file, folder or dataset, and splits them as trees are split.

    A chat gives one pair for each assistant turn that follows a user turn, with the turns before as history
    (its system message first). Pairs without a message_tree_id get one made from the first user turn, so that
    conversations that start alike stay on one side of the split. A pair of preferences has a column `rejected` too.
    attrs: what `locate` says of the source, split, read (pairs before the split), skipped (with their reasons),
    shapes, not_used, reasons (see `Reader`).
    """
    found = locate(source, split, revision, splits)
    problems, reader = Problems(str(found.files[0]), on_error, cure=CURE), Reader(columns)
    with found.hashing():
        every = (pair for path in found.files for pair in _pairs(path, problems, reader))
        pairs = [pair | {"message_tree_id": tree_of(pair)} for pair in every]
    read = len(pairs)
    if read == 0:
        why = ", ".join(+reader.reasons) or "no record with a response in the loss"
        first = problems.found[0] if problems.found else {"line": 1, "problem": why}
        where = f"{problems.unit} {first['line']}"
        raise ValueError(f"{found.source}: no pairs; {where}: {first['problem']}. Correct the file.")
    if split and not found.origin["split_in_source"]:
        wanted = in_split((pair["message_tree_id"] for pair in pairs), split, validation_share)
        pairs = [pair for pair in pairs if pair["message_tree_id"] in wanted]
    frame = to_frame(pairs)
    reasons = reader.reasons + Counter(entry.get("reason", "broken records") for entry in problems.found)
    frame.attrs = found.origin | {"split": split, "read": read, "skipped": problems.found, "reasons": dict(reasons)}
    frame.attrs |= {
        "form": problems.form,
        "shapes": dict(reader.shapes),
        "not_used": dict(reader.not_used.most_common()),
    }
    return frame


def reading_sentences(source: pd.DataFrame) -> str:
    """Says what was read, as what, and what of it was not used and why; one sentence a line."""
    attrs = source.attrs
    lines = [f"{len(source):,} rows from {attrs['source']}, {len(attrs['skipped']):,} problems"]
    for what, key in (("configuration", "configuration"), ("split", "split_name")):
        read, others = attrs.get(key), attrs.get(f"other_{what}s")
        said = [f"the source's {what} {read}"] * bool(read) + [f"not read: {', '.join(others or ())}"] * bool(others)
        lines += ["; ".join(said)] * bool(said)
    for shape, number in attrs.get("shapes", {}).items():
        lines.append(f"{number:,} records of the shape {shape}, read as {attrs['form']}")
    lines += [f"column {name} is not used ({number:,} times)" for name, number in attrs.get("not_used", {}).items()]
    return "\n".join(lines + [f"{reason}: {number:,}" for reason, number in attrs.get("reasons", {}).items()])


def ready_preferences(pairs: pd.DataFrame) -> list[dict]:
    """Returns the preference record of each pair that has a rejected response."""
    kept = ("prompt", "history", "lang", "message_tree_id")
    return [
        {name: pair[name] for name in kept if name in pair} | {"chosen": pair["response"], "rejected": pair["rejected"]}
        for pair in to_records(pairs)
        if "rejected" in pair
    ]


def tree_of(pair: dict) -> str:
    """Returns the pair's message_tree_id, or one for all that start with the same system message and user turn."""
    if pair.get("message_tree_id"):
        return pair["message_tree_id"]
    turns = pair.get("history") or []
    persona = "".join(turn["content"] for turn in turns[:1] if turn["role"] == "system")
    first = next((turn["content"] for turn in turns if turn["role"] == "user"), pair["prompt"])
    start = persona + normalise(first)
    return "own-" + hashlib.sha256(start.encode("utf-8")).hexdigest()[:16]


def _pairs(path: Path, problems: Problems, reader: Reader) -> Iterator[dict]:
    problems.source = str(path)
    for line, record in records(path, problems):
        try:
            pairs, faults = reader.pairs(record)
        except Unusable as fault:
            pairs, faults = [], [fault]
        for fault in faults:
            if fault.reason == NO_SHAPE and not reader.shapes:  # leaving the record out would leave out all
                problems.add(line, None, f"read as {problems.form}, but {fault}", cure="", reason=fault.reason)
            else:
                problems.add(line, None, str(fault), reason=fault.reason)
        for pair in pairs:
            try:
                check(pair)
            except ValueError as error:
                problems.add(line, None, str(error), reason="values that cannot be used")
                continue
            yield pair


def flatten_pairs(
    pairs: pd.DataFrame,
    filters: Filters | None = None,
    replies: str = "all",
    preference_pairs: str = "best-worst",
    ready: Sequence[dict] = (),
    **single: object,
) -> Flattened:
    """Applies those filters of `oasst.flatten` that suit ready-made pairs, in the same order, and counts the losses.

    Responses to one prompt with one history are siblings: "best" takes the one of best rank, "all" all. ready:
    preference records beside those of the column `rejected`; all go through the same filters.
    filters, single: as for `oasst.flatten`; what concerns trees, reviews, labels and who wrote a reply is ignored.
    """
    filters, funnel = replace(filters or Filters(), **single), Funnel()
    ready = [*ready, *ready_preferences(pairs)]
    rows = to_records(pairs.drop(columns="rejected", errors="ignore"))
    skipped = len(pairs.attrs["skipped"])
    funnel.step("lines and pairs in the source", "pair", pairs.attrs["read"] + skipped)
    if skipped:
        funnel.step("sound (broken lines are named in the report)", "pair", pairs.attrs["read"])
    if pairs.attrs["split"]:
        funnel.step(f"in the {pairs.attrs['split']} split", "pair", len(rows))
    candidates = Candidates(rows, prompters_of(rows), [None] * len(rows))
    if languages := filters.languages:
        kept = [speaks(pair.get("lang"), languages) for pair in candidates.pairs]
        candidates.filter(funnel, f"language {', '.join(languages)}", kept, "languages = ''")
    if shortest := filters.min_response_chars:
        kept = [len(pair["response"].strip()) >= shortest for pair in candidates.pairs]
        name = f"response of at least {shortest} characters"
        candidates.filter(funnel, name, kept, "min_response_chars = 0")
    if filters.drop_duplicates:
        drop_repeated(candidates, funnel)
    filtered = preferences.filter_ready(list(ready), filters, funnel) if ready else []
    flat = finish(candidates, replies, filters, funnel, preference_pairs)
    return replace(flat, preferences=[*filtered, *flat.preferences])

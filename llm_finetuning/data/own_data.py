"""Reads a user's own pairs: JSON lines with prompt and response, chats with `messages`, or CSV."""

import csv
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from llm_finetuning.data.duplicates import normalise
from llm_finetuning.data.filters import Filters
from llm_finetuning.data.funnel import Funnel
from llm_finetuning.data.oasst import Flattened
from llm_finetuning.data.pairs import check, check_turns, to_frame, to_records
from llm_finetuning.data.parquet import is_parquet
from llm_finetuning.data.reading import Problems, existing_file, in_validation, parse, raw_lines, records
from llm_finetuning.data.recipes import Candidates
from llm_finetuning.files.checksums import hash_file

LONGEST_FIELD = 2**31 - 1
CSV_COLUMNS = ("prompt", "response", "lang", "message_tree_id", "message_id")


def is_pairs_file(path: str | Path) -> bool:
    """Whether a file holds pairs, not OASST messages: CSV, or its first line has a prompt or `messages`."""
    path = existing_file(path)
    if is_parquet(path):
        return False
    if path.suffix == ".csv":
        return True
    _, line = next(raw_lines(path), (0, b"{}"))
    try:
        record = parse(line)
    except ValueError:
        return False  # the reader of messages says what is wrong with the line
    return type(record.get("prompt")) is str or "response" in record or type(record.get("messages")) is list


def read_pairs(
    path: str | Path, split: str | None = None, on_error: str = "raise", validation_share: float = 0.1
) -> pd.DataFrame:
    """Reads the pairs of a user's own file, and splits them as trees are split.

    A chat gives one pair for each assistant turn that follows a user turn, with the turns before as history
    (its system message first). Pairs without a message_tree_id get one made from the first user turn, so that
    conversations that start alike stay on one side of the split.
    attrs: source, sha256, split, read (pairs before the split), skipped.
    """
    path = existing_file(path)
    problems = Problems(str(path), on_error)
    pairs = [pair | {"message_tree_id": tree_of(pair)} for pair in _pairs(path, problems)]
    read = len(pairs)
    if read == 0:
        first = problems.found[0] if problems.found else {"line": 1, "problem": "no record"}
        raise ValueError(f"{path}: no pairs; line {first['line']}: {first['problem']}. Write it again.")
    if split:
        pairs = [p for p in pairs if in_validation(p["message_tree_id"], validation_share) == (split == "validation")]
    frame = to_frame(pairs)
    frame.attrs = {"source": path.name, "sha256": hash_file(path), "split": split}
    frame.attrs |= {"read": read, "skipped": problems.found}
    return frame


def tree_of(pair: dict) -> str:
    """Returns the pair's message_tree_id, or one shared by all conversations with the same first user turn."""
    if pair.get("message_tree_id"):
        return pair["message_tree_id"]
    user_turns = [turn["content"] for turn in pair.get("history") or [] if turn["role"] == "user"]
    return "own-" + hashlib.sha256(normalise([*user_turns, pair["prompt"]][0]).encode("utf-8")).hexdigest()[:16]


def _pairs(path: Path, problems: Problems) -> Iterator[dict]:
    for line, record in _csv_records(path, problems) if path.suffix == ".csv" else records(path, problems):
        try:
            pairs = pairs_of_chat(record) if "messages" in record else [record]
            for pair in pairs:
                check(pair)
        except ValueError as error:
            problems.add(line, None, str(error))
            continue
        yield from pairs


def pairs_of_chat(record: dict) -> list[dict]:
    """Makes a pair of each assistant turn, with the record's other keys; raises ValueError unless roles alternate."""
    turns = record["messages"]
    check_turns(turns, "messages")
    roles = [turn["role"] for turn in turns]
    start = 1 if roles[:1] == ["system"] else 0
    alternating = list(itertools.islice(itertools.cycle(("user", "assistant")), len(turns) - start))
    if roles[start:] != alternating or "assistant" not in roles:
        raise ValueError(f"the turns are {', '.join(roles) or 'none'}; expected user and assistant in turn")
    others = {name: value for name, value in record.items() if name != "messages"}
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    return [
        others | {"prompt": turns[at - 1]["content"], "response": turns[at]["content"], "history": turns[: at - 1]}
        for at in range(start + 1, len(turns), 2)
    ]


def _csv_records(path: Path, problems: Problems) -> Iterator[tuple[int, dict]]:
    """Yields (line on which the record ends, record by the header's names); prompt and response are needed."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            missing = {"prompt", "response"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{path}, line 1: no column {', '.join(sorted(missing))}. Name the columns there.")
            for record in reader:
                if None in record or None in record.values():
                    problems.add(reader.line_num, None, f"expected {len(reader.fieldnames)} values")
                    continue
                yield reader.line_num, {name: record[name] for name in CSV_COLUMNS if record.get(name)}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from error
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: not valid CSV ({error}). Correct it there.") from error


def flatten_pairs(pairs: pd.DataFrame, filters: Filters | None = None, **single: object) -> Flattened:
    """Applies those filters of `oasst.flatten` that suit ready-made pairs, in the same order, and counts the losses.

    filters, single: as for `oasst.flatten`; what concerns trees, reviews, labels and who wrote a reply is ignored.
    """
    filters, funnel, rows = replace(filters or Filters(), **single), Funnel(), to_records(pairs)
    skipped = len(pairs.attrs["skipped"])
    funnel.step("lines and pairs in the source", "pair", pairs.attrs["read"] + skipped)
    if skipped:
        funnel.step("sound (broken lines are named in the report)", "pair", pairs.attrs["read"])
    if pairs.attrs["split"]:
        funnel.step(f"in the {pairs.attrs['split']} split", "pair", len(rows))
    candidates = Candidates(rows, list(range(len(rows))), [None] * len(rows))
    if languages := filters.languages:
        candidates.keep([pair.get("lang") is None or pair["lang"] in languages for pair in candidates.pairs])
        funnel.step(f"language {', '.join(languages)}", "pair", len(candidates.pairs))
    if shortest := filters.min_response_chars:
        candidates.keep([len(pair["response"].strip()) >= shortest for pair in candidates.pairs])
        funnel.step(f"response of at least {shortest} characters", "pair", len(candidates.pairs))
    candidates.truncate(funnel, filters)
    candidates.drop_duplicates(funnel, filters)
    return Flattened(to_frame(candidates.pairs), funnel.frame())

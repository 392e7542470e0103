"""The pair record (prompt, response and what is known about them), read from JSON lines and written to them."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype

from llm_finetuning.data.reading import Problems, existing_file, is_text
from llm_finetuning.data.records import records
from llm_finetuning.files.atomic import write_json_lines

COLUMNS = ("prompt", "response", "history", "lang", "message_tree_id", "message_id", "rank")
Item = TypeVar("Item")
TURN_ROLES = ("system", "user", "assistant")


def read_jsonl(path: str | Path) -> pd.DataFrame:
    """Reads the pairs of a JSON-lines file (also gzipped), one row each, with the columns of the pair record.

    Only `prompt` and `response` are needed; a missing history is [], anything else that is missing is null.
    Columns beyond the pair record are kept. Raises FileNotFoundError, or ValueError with file and line.
    """
    return to_frame(checked(existing_file(path), check))


def checked(path: Path, is_sound: Callable[[dict], None]) -> list[dict]:
    """Returns the records of a file. Raises ValueError with its line for each that `is_sound` raises for."""
    problems = Problems(str(path), cure="Correct the file, or write it again with the data preparation.")
    found = []
    for line, record in records(path, problems):
        try:
            is_sound(record)
        except ValueError as error:
            problems.add(line, None, str(error))
        found.append(record)
    return found


def check(record: dict) -> None:
    """Raises ValueError with the reason if a dictionary is not a pair record."""
    for name in ("prompt", "response"):
        if not is_text(record.get(name)):
            raise ValueError(f"{name} is {_value_of(record, name)}, expected a text")
    if record["response"] == "":
        raise ValueError("the response is empty")
    check_turns(record.get("history") or [], "history")
    for name in ("lang", "message_tree_id", "message_id"):
        if record.get(name) is not None and not is_text(record[name]):
            raise ValueError(f"{name} is {_value_of(record, name)}, expected a text or null")
    rank = record.get("rank")
    if rank is not None and (type(rank) is not int or abs(rank) > 1e9):
        raise ValueError(f"rank is {_value_of(record, 'rank')}, expected a whole number or null")


def check_turns(turns: Any, name: str) -> None:
    """Raises ValueError unless `turns` is a list of {"role": system, user or assistant, "content": text}."""
    if type(turns) is not list:
        raise ValueError(f"{name} is {type(turns).__name__}, expected a list of turns")
    for number, turn in enumerate(turns, 1):
        if type(turn) is not dict or turn.get("role") not in TURN_ROLES or not is_text(turn.get("content")):
            raise ValueError(f"turn {number} of {name} lacks a role ({', '.join(TURN_ROLES)}) or a text as content")


def _value_of(record: dict, name: str) -> str:
    return "missing" if name not in record else f"{record[name]!r:.60}"


@dataclass(frozen=True)
class Rows(Sequence[dict]):
    """Pair records that are made of their columns when they are asked for."""

    columns: dict[str, Sequence]

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    def __getitem__(self, place: int) -> dict:
        return {name: values[place] for name, values in self.columns.items()}

    def __iter__(self) -> Iterator[dict]:
        return map(dict, map(zip, repeat(tuple(self.columns)), zip(*self.columns.values(), strict=True)))


def to_frame(pairs: Sequence[dict]) -> pd.DataFrame:
    """Puts pair records into a table; `history` is a list in every row, `rank` a nullable integer."""
    if isinstance(pairs, Rows):
        columns = pairs.columns
    else:
        names = dict.fromkeys((*COLUMNS, *chain.from_iterable(pairs)))
        columns = {name: [pair.get(name) for pair in pairs] for name in names}
        columns["history"] = [history or [] for history in columns["history"]]
    types = {"rank": "Int64"}
    series = {name: pd.Series(column, dtype=types.get(name, object)) for name, column in columns.items()}
    return pd.DataFrame(series, copy=False)


def read_prepared(path: Path, part: str) -> list[dict]:
    """Returns the pair records of a file that a data preparation notebook wrote; part: "Training" or "Validation".

    Raises FileNotFoundError that names the notebook, and what `read_jsonl` raises.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} not found: run "Data Prep/OpenAssistant Finetuning {part} Data Prep.ipynb" first, with the'
            " same drive_folder (and a validation_share above 0), or set drive_folder to where its results are"
        )
    return to_records(read_jsonl(path))


def draw(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Returns at most `count` of the items, in the order in which the seed draws them."""
    return random.Random(seed).sample(items, min(count, len(items)))


def to_records(pairs: pd.DataFrame) -> list[dict]:
    """Returns the rows of a table of pairs as pair records, without what is null."""
    columns = {name: objects(pairs[name]).tolist() for name in pairs.columns}
    return [
        {name: value for name, value in zip(columns, values, strict=True) if value is not None}
        for values in zip(*columns.values(), strict=True)
    ]


def objects(column: pd.Series) -> np.ndarray:
    """Returns (N,) the values as Python objects, None for every kind of missing value."""
    values = column.to_numpy(dtype=object)
    return values if infer_dtype(values, skipna=False) == "string" else np.where(column.isna(), None, values)


def write_jsonl(pairs: pd.DataFrame | Iterable[dict], path: str | Path) -> Path:
    """Writes pair records as JSON lines in UTF-8, atomically; returns the path.

    Raises ValueError when there is no pair, or one without prompt or response.
    """
    path = Path(path)
    rows = to_records(pairs) if isinstance(pairs, pd.DataFrame) else list(pairs)
    if not rows:
        raise ValueError(f"no pair to write to {path.name}. Loosen the filters, or check the source and its split.")
    for number, row in enumerate(rows, 1):
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"pair {number} for {path.name}: {error}") from error
    return write_json_lines(path, rows)

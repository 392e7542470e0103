"""Reads messages from parquet files, as OASST is stored on the Hub."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm_finetuning.data.messages import flat_row
from llm_finetuning.data.reading import Problems

USED_LABELS = ("quality", "toxicity")
REQUIRED = ("message_tree_id", "message_id", "role", "text")
OPTIONAL = ("parent_id", "lang", "rank", "tree_state", "deleted", "review_result", "synthetic", "labels", "detoxify")


def is_parquet(path: Path) -> bool:
    """Whether a file is parquet, by its content: it starts with the four bytes PAR1."""
    with Path(path).open("rb") as stream:
        return stream.read(4) == b"PAR1"


def open_parquet(path: Path) -> tuple[pq.ParquetFile, list[str]]:
    """Returns (the file, the names of its columns); raises ValueError if it is cut off or damaged."""
    try:
        file = pq.ParquetFile(path)
        return file, file.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a complete parquet file ({error}). Download or copy it again.") from error


def rows_of_parquet(path: Path, problems: Problems) -> Iterator[tuple[int, tuple]]:
    """Yields (row number from 1, values of FIELDS) of every message; reads in batches to hold little of it twice."""
    problems.unit = "row"
    file, names = open_parquet(path)
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its columns: {', '.join(names)}")
    wanted = [name for name in (*REQUIRED, *OPTIONAL) if name in names]
    number = 0
    try:
        for batch in file.iter_batches(batch_size=8192, columns=wanted):
            for message in _messages(batch):
                number += 1
                try:
                    row = flat_row(message)
                except ValueError as error:
                    problems.add(number, message["message_tree_id"], str(error))
                    continue
                yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, after row {number}: damaged ({error}). Download or copy it again.") from error


def _messages(batch: pa.RecordBatch) -> Iterator[dict]:
    """Yields the batch's messages as dictionaries, with only those labels that are used."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    lists = {name: column.to_pylist() for name, column in columns.items() if name != "labels"}
    if "labels" in columns:
        lists["labels"] = _labels(columns["labels"])
    return (dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True))


def _labels(column: pa.Array) -> list:
    """Returns the labels of each message; of the Hub's struct of parallel lists only those that are used."""
    if not pa.types.is_struct(column.type):
        return column.to_pylist()
    columns = [_label_column(column, name) for name in USED_LABELS]
    return [dict(zip(USED_LABELS, values, strict=True)) for values in zip(*columns, strict=True)]


def _label_column(labels: pa.StructArray, name: str) -> list[float | None]:
    """Returns (N,) values of one label of struct<name: list, value: list, count: list>, None where it is missing."""
    names, values = pc.struct_field(labels, "name"), pc.struct_field(labels, "value")
    is_label = pc.equal(pc.list_flatten(names), name)
    rows = pc.list_parent_indices(names).filter(is_label)
    column = [None] * len(labels)
    for row, value in zip(rows.to_pylist(), pc.list_flatten(values).filter(is_label).to_pylist(), strict=True):
        column[row] = value
    return column

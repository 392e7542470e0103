"""Reads the messages of a file, flat or nested, in any form; columns, as OASST is stored on the Hub, batch by batch."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from llm_finetuning.data.columnar import is_columnar, named_damage, open_columns
from llm_finetuning.data.messages import flat_row, tree_rows
from llm_finetuning.data.reading import Problems
from llm_finetuning.data.records import records

USED_LABELS = ("quality", "toxicity")
REQUIRED = ("message_tree_id", "message_id", "role", "text")
OPTIONAL = ("parent_id", "lang", "rank", "tree_state", "deleted", "review_result", "synthetic", "labels", "detoxify")


def rows_of_file(path: Path, problems: Problems) -> Iterator[tuple[int, tuple]]:
    """Yields (line, values of FIELDS) of every message of a file, whose records are flat messages or nested trees."""
    if is_columnar(path) and "prompt" not in open_columns(path)[0]:
        yield from rows_of_columns(path, problems)
        return
    for line, record in records(path, problems):
        tree = record.get("message_tree_id")
        try:
            rows = tree_rows(record) if type(record.get("prompt")) is dict else [flat_row(record)]
        except ValueError as error:
            problems.add(line, tree if type(tree) is str else None, str(error))
            continue
        for row in rows:
            yield line, row


def rows_of_columns(path: Path, problems: Problems) -> Iterator[tuple[int, tuple]]:
    """Yields (row number from 1, values of FIELDS) of every message; reads in batches to hold little of it twice."""
    problems.unit = "row"
    names, batches = open_columns(path)
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its columns: {', '.join(names)}")
    wanted = [name for name in (*REQUIRED, *OPTIONAL) if name in names]
    done = [0]
    with named_damage(path, done):
        for batch in batches(wanted):
            for message in _messages(batch):
                done[0] += 1
                try:
                    row = flat_row(message)
                except ValueError as error:
                    problems.add(done[0], message["message_tree_id"], str(error))
                    continue
                yield done[0], row


def _messages(batch: pa.RecordBatch) -> Iterator[dict]:
    """Yields the batch's messages as dictionaries, with only those labels that are used."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    lists = {name: column.to_pylist() for name, column in columns.items() if name != "labels"}
    if "labels" in columns:
        lists["labels"] = _labels(columns["labels"])
    return (dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True))


def _labels(column: pa.Array) -> list:
    """Returns the labels of each message; of the Hub's struct of parallel lists only those that are used."""
    if not pa.types.is_struct(column.type) or column.type.get_field_index("name") < 0:
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

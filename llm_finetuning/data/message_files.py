"""Reads the messages of a file, flat or nested, in any form; columns, as OASST is stored on the Hub, batch by batch."""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from llm_finetuning.data.columnar import named_damage, open_columns
from llm_finetuning.data.containers import form_of
from llm_finetuning.data.message_lines import sound_blocks
from llm_finetuning.data.messages import USED_LABELS, columns_of, from_table, messages_of
from llm_finetuning.data.reading import Problems
from llm_finetuning.data.records import UNITS, records

BATCH = 16
REQUIRED = ("message_tree_id", "message_id", "role", "text")
OPTIONAL = ("parent_id", "lang", "rank", "tree_state", "deleted", "review_result", "synthetic", "labels", "detoxify")


def columns_of_file(path: Path, problems: Problems) -> Iterator[tuple[Sequence[int], list[list]]]:
    """Yields (line of each message, columns of FIELDS) of a file of flat messages or nested trees, batch by batch."""
    before, last, form = len(problems.found), 0, form_of(path)
    if form == "JSON lines":
        problems.unit, problems.form = "line", "JSON lines"
        last = yield from sound_blocks(path)
        if last is None:
            return
    in_columns = form in UNITS and "prompt" not in open_columns(path)[0]
    for batch in _batches(_rows(path, problems) if in_columns else records(path, problems, last)):
        try:
            lines, messages = zip(*batch, strict=True)
            if any("prompt" in record for record in messages):
                found = [(line, message) for line, record in batch for message in messages_of(record)]
                lines, messages = zip(*found, strict=True)
            yield lines, columns_of(messages)
        except ValueError:
            yield from _one_by_one(batch, problems)
    problems.found[before:] = sorted(problems.found[before:], key=itemgetter("line"))


def _batches(found: Iterator[tuple[int, dict]]) -> Iterator[list[tuple[int, dict]]]:
    """Yields lists of at most BATCH; what was read before an error comes before it."""
    batch: list[tuple[int, dict]] = []
    try:
        for entry in found:
            batch.append(entry)
            if len(batch) == BATCH:
                yield batch
                batch = []
    except ValueError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _one_by_one(batch: list[tuple[int, dict]], problems: Problems) -> Iterator[tuple[list[int], list[list]]]:
    """Yields what `columns_of_file` does, message by message, without the records in which a problem is found."""
    for line, record in batch:
        try:
            found = [columns_of([from_table(message)]) for message in messages_of(record)]
        except ValueError as error:
            tree = record.get("message_tree_id")
            problems.add(line, tree if type(tree) is str else None, str(error))
            continue
        for columns in found:
            yield [line], columns


def _rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict]]:
    """Yields (row number from 1, message) of columns; reads in batches to hold little of it twice."""
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
                yield done[0], message


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

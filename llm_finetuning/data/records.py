"""The records of a data file, whatever it is: JSON lines, a JSON document, CSV, parquet, arrow or a saved dataset."""

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from llm_finetuning.data import columnar
from llm_finetuning.data.containers import CHUNK, form_of, lines, named_damage, open_text
from llm_finetuning.data.reading import TREE_ID, Problems, all_of, as_object, check_surrogates, excerpt, parse
from llm_finetuning.data.shapes import recognise
from llm_finetuning.data.turns import is_turn

SPACE = re.compile(r"\s*")
JSON5 = {
    "a comment": r".?(//|/\*|#)",
    "a comma before a closing bracket": r".?,\s*[}\]]",
    "a name or text without double quotes": r".?('|[A-Za-z_$][\w$]*\s*:|(True|False|None)\b)",
}
"""What other notations allow → the text from the last letter that JSON could read."""
SAVE = "Save it as JSON lines or CSV."
LONGEST_FIELD = 2**31 - 1
DELIMITERS = ",;\t|"
SEPARATOR = re.compile(r'"?sep=(.)"?\r?\n')
"""The line that Excel writes, and reads, before a header."""
DIALOGUE = "Human:\nAssistant:"
"""A value for any column that may hold a chat."""
MARKDOWN = re.compile(r"\s*.*\|.*\n+[\s|]*:?---*:?[\s|:-]*\n")
"""The header of a table in Markdown, and the line under it."""
UNITS = {"parquet": "row", "arrow": "row"}
VIEWER = {"row_idx", "row", "truncated_cells"}
"""Keys of a row as the Hub's dataset viewer gives it."""


def records(path: Path, problems: Problems, after: int = 0) -> Iterator[tuple[int, dict]]:
    """Yields (line or number, record) of a file; what is no record is added to `problems`.

    after: of JSON lines, the last line that has been read already.
    Raises ValueError when the file holds nothing, is damaged, or is of no form that is known.
    """
    form = form_of(path)
    problems.unit, problems.form = UNITS.get(form, "line"), form
    if form == "CSV":
        return csv_records(path, problems)
    if form in UNITS:
        return _rows(path)
    if after:
        return _json_lines(path, problems, after)
    return _unwrapped(_json_lines(path, problems) if form == "JSON lines" else _documents(path, problems), problems)


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    done = [0]
    _, batches = columnar.open_columns(path)
    with columnar.named_damage(path, done):
        for row in chain.from_iterable(batch.to_pylist() for batch in batches()):
            done[0] += 1
            yield done[0], row


def _json_lines(path: Path, problems: Problems, after: int = 0) -> Iterator[tuple[int, dict]]:
    for number, line in lines(path, after):
        try:
            record = parse(line)
        except ValueError as error:
            tree = TREE_ID.search(line)
            problem = f"{error}{_of_json5(error.__cause__)}"
            problems.add(number, tree[1].decode(errors="replace") if tree else None, problem)
            continue
        yield number, record


def _unwrapped(found: Iterator[tuple[int, dict]], problems: Problems) -> Iterator[tuple[int, dict]]:
    """Yields the records; of a single object with one list of records in it, such as {"data": […]}, those."""
    first, second = next(found, None), next(found, None)
    inner = wrapped(first[1]) if first and second is None and not problems.found else None
    if inner is None:
        yield from chain(filter(None, (first, second)), found)
        return
    problems.unit = "record"
    for number, record in enumerate(inner, 1):
        try:
            yield number, as_object(_of_viewer(record))
        except ValueError as error:
            problems.add(number, None, str(error))


def wrapped(record: dict) -> list | None:
    """Returns the records that an object holds under one of its keys; None if it is a record itself."""
    values = list(record.values())
    if len(values) > 1 and all_of(dict, values) and len({tuple(value) for value in values}) == 1 and values[0]:
        return None if is_turn(values[0]) else _of_pandas(record)
    if recognise(record) or "message_id" in record:
        return None
    names, rows = record.get("columns"), record.get("data")
    if type(names) is type(rows) is list and all_of(str, names) and all_of(list, rows):  # pandas, orient="split"
        return [dict(zip(names, row, strict=False)) for row in rows]
    rows = record.get("rows")
    if type(rows) is list and rows and all(type(row) is dict and type(row.get("row")) is dict for row in rows):
        return rows
    lists = [value for value in values if type(value) is list and value and type(value[0]) in (dict, list)]
    return lists[0] if len(lists) == 1 and not is_turn(lists[0][0]) else None


def _of_pandas(record: dict[str, dict]) -> list[dict]:
    """Returns the rows of a table as pandas writes it: by column and row, or orient="index", by row and column."""
    if recognise(next(iter(record.values()))):
        return list(record.values())
    return [
        dict(zip(record, row, strict=True))
        for row in zip(*(column.values() for column in record.values()), strict=True)
    ]


def _of_viewer(record: Any) -> Any:
    """Returns the record in a row as the Hub's dataset viewer gives it; raises ValueError where texts of it are cut."""
    if type(record) is not dict or type(record.get("row")) is not dict or not record.keys() <= VIEWER:
        return record
    if cut := record.get("truncated_cells"):
        raise ValueError(f"the dataset viewer cut off {excerpt(cut)}; name the dataset itself, or its parquet files")
    return record["row"]


def _documents(path: Path, problems: Problems) -> Iterator[tuple[int, dict]]:
    """Yields (line, record) of a JSON array, or of objects that stand one after the other, over any number of lines."""
    with named_damage(path, [0]), open_text(path) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from error
    if "\n" not in text and text.startswith("["):
        problems.unit = "record"
    for number, (line, part, value) in enumerate(_json_values(text, path), 1):
        place = number if problems.unit == "record" else line
        try:
            if isinstance(value, ValueError):
                raise value
            if "\\ud" in part or "\\uD" in part:
                check_surrogates(value)
            record = as_object(value)
        except ValueError as error:
            tree = TREE_ID.search(part.encode())
            problems.add(place, tree[1].decode() if tree else None, str(error))
            continue
        yield place, record


def _json_values(text: str, path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yields (line, its text, value) of each JSON value; one that is broken comes as a ValueError.

    After that the reading goes on at the next line that begins as the first value's did. Raises ValueError where all
    is one line.
    """
    in_array, decode = text.lstrip().startswith("["), json.JSONDecoder().raw_decode
    start = SPACE.match(text).end()
    at = SPACE.match(text, start + in_array).end()
    if in_array and _is_chat(text, at):
        in_array, at = False, start
    indent = text[text.rfind("\n", 0, at) + 1 : at]
    mark, line = "\n" + indent * indent.isspace() + text[at : at + 1], text.count("\n", 0, at) + 1
    last = len(text) - 1 if in_array and text.endswith("]") else len(text)
    while at < last:
        try:
            value, end = decode(text, at)
            end = _next_value(text, end, in_array)
        except (ValueError, RecursionError) as error:
            value, end = ValueError(_what_is_wrong(error)), text.find(mark, at + 1)
            if end < 0 and at > 0 and "\n" not in text:
                raise ValueError(f"{path}: {value}. It is one line, so nothing can be left out: correct it.") from error
            end = last if end < 0 else end + len(mark) - 1
        yield line, text[at:end], value
        line, at = line + text.count("\n", at, end), end
    if in_array and (at > last or last == len(text)):
        yield line, "", ValueError("the array has no end: the file is cut off")


def _is_chat(text: str, at: int) -> bool:
    """Whether an array's first element is a turn, so that the array is one conversation."""
    try:
        return is_turn(json.JSONDecoder().raw_decode(text, at)[0])
    except (ValueError, RecursionError):
        return False


def _next_value(text: str, end: int, in_array: bool) -> int:
    """Returns where the next value begins; in an array a comma or its closing bracket has to follow the last one."""
    end = SPACE.match(text, end).end()
    if in_array and text[end : end + 1] == ",":
        return SPACE.match(text, end + 1).end()
    if in_array and end < len(text) and text[end] != "]":
        raise json.JSONDecodeError("Expecting ',' or ]", text, end)
    return end


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, line {error.lineno}, column {error.colno}){_of_json5(error)}"
    return "nested too deeply to be read; export it flat" if isinstance(error, RecursionError) else str(error)


def _of_json5(error: BaseException | None) -> str:
    """Names what JSON5 or Python allow where a text is broken for JSON, and the cure; "" for anything else."""
    if not isinstance(error, json.JSONDecodeError):
        return ""
    before, rest = error.doc[max(0, error.pos - 80) : error.pos].rstrip(), error.doc[error.pos : error.pos + 80]
    found = next((kind for kind, how in JSON5.items() if re.match(how, before[-1:] + rest.lstrip(), re.DOTALL)), "")
    return f": {found}, which JSON does not allow; convert it to JSON" if found else ""


def csv_records(path: Path, problems: Problems) -> Iterator[tuple[int, dict]]:
    """Yields (line on which the record ends, record by the header's names) of a CSV; empty cells are left out."""
    csv.field_size_limit(LONGEST_FIELD)
    done = [0]
    try:
        header, delimiter, skipped = _csv_header(path)
        with named_damage(path, done), io.TextIOWrapper(open_text(path), encoding="utf-8", newline="") as stream:
            for _ in range(skipped):
                stream.readline()
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            rows = filter(any, reader)  # blank lines, and those of delimiters alone, hold nothing
            next(rows)  # the header
            done[0] = skipped + reader.line_num
            for cells in rows:
                done[0] = skipped + reader.line_num
                if len(cells) < len(header) or any(cells[len(header) :]):
                    problems.add(done[0], None, f"expected {len(header)} values, found {len(cells)}")
                    continue
                yield done[0], {name: cell for name, cell in zip(header, cells, strict=False) if cell}
    except UnicodeDecodeError as error:
        cure = "Save the file as UTF-8 (in Excel: CSV UTF-8)."
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}). {cure}") from error
    except csv.Error as error:
        if done[0] == 0:
            raise ValueError(f"{path} is neither JSON nor a CSV with a header ({error}). {SAVE}") from error
        raise ValueError(f"{path}, after line {done[0]}: not valid CSV ({error}). Correct it there.") from error


def _first_row(head: str, delimiter: str) -> list[str]:
    """Returns the cells of the first row that holds something; [] where quotes do not fit this delimiter."""
    try:
        return next(filter(any, csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, strict=True)), [])
    except csv.Error:
        return []


def _csv_header(path: Path) -> tuple[list[str], str, int]:
    """Returns (column names, delimiter, lines before the header): what parts the header most, or what `sep=;` names."""
    with io.TextIOWrapper(open_text(path), encoding="utf-8", newline="") as stream:
        head = stream.read(CHUNK)
    if MARKDOWN.match(head[:4096].lstrip()):
        raise ValueError(f"{path} is a table in Markdown. {SAVE}")
    named = SEPARATOR.match(head)
    head = head[named.end() :] if named else head
    headers = {delimiter: _first_row(head, delimiter) for delimiter in ([named[1]] if named else DELIMITERS)}
    delimiter = max(headers, key=lambda delimiter: len(headers[delimiter]))
    header = [name.strip() or f"column {number}" for number, name in enumerate(headers[delimiter], 1)]
    if len(header) < 2 and not recognise(dict.fromkeys(header, DIALOGUE)):  # a column of chats stands alone
        raise ValueError(f"{path} is neither JSON nor a CSV with a header; it begins with {excerpt(head[:80])}. {SAVE}")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{path}, line 1: two columns are named {', '.join(twice)}. Rename one.")
    return header, delimiter, 1 if named else 0

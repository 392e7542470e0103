"""Mutates records of every shape in files of every form, and reads them: `make fuzz`, or the number as an argument.

A mutated record may give pairs or be left out. What must not happen: another error than ValueError with the file's
name, an untouched record that is lost or changed, a mutated record that is dropped without being counted.
"""

import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mutations import VALUES, places
from own_files import COMPRESSIONS, FLAT, SHAPES, csv_text, write_columns

from llm_finetuning.data import own_data
from llm_finetuning.data.oasst import read_messages
from llm_finetuning.data.pairs import to_records

RECORDS = 400
"""Records of one file; half of them are mutated."""
CODES = {f"{hash((n, n)) % 10**12:012}": n for n in range(RECORDS)}
"""A code of twelve digits in each text of a record: no mutation makes one of another."""
MARKS = {n: f"§{code}§" for code, n in CODES.items()}
NUMBER = re.compile(r"§(\d{12})§")
FIXED = {"role", "from", "speaker", "type", "history", "winner", "Rating"}
VALUES = [*VALUES, "text", ["a", "b"], {"role": "user"}, [{"role": "assistant", "content": "text"}], 0.5, False]
TEXT_FORMS = ("json_lines", "pretty_array", "pretty_objects", "array_of_lines")
COLUMN_FORMS = ("parquet", "arrow file", "arrow stream")


def message(n: int, name: str, role: str, **more: object) -> dict:
    ids = {"message_tree_id": f"tree {MARKS[n]}", "message_id": f"{name} {MARKS[n]}"}
    return ids | {"role": role, "text": f"text {name}", "lang": "en", "labels": {"quality": {"value": 0.5}}} | more


def tree(n: int) -> dict:
    replies = [message(n, "b", "assistant", rank=0, replies=[]), message(n, "c", "assistant", rank=1)]
    return {"message_tree_id": f"tree {MARKS[n]}", "prompt": message(n, "a", "prompter", replies=replies)}


def messages(n: int) -> list[dict]:
    return [message(n, "a", "prompter"), message(n, "b", "assistant", parent_id=f"a {MARKS[n]}", deleted=False)]


def numbered(value: object, n: int) -> object:
    """The value with a number in each of its texts."""
    if isinstance(value, dict):
        return {
            name: part if name in FIXED and isinstance(part, str) else numbered(part, n) for name, part in value.items()
        }
    if isinstance(value, list):
        return [numbered(part, n) for part in value]
    return f"{value} {MARKS[n]}" if isinstance(value, str) and value else value


def records_of(shape: str) -> list[tuple[int, dict]]:
    """(number, record) of a file; a tree of flat messages is two records of one number."""
    if shape in ("trees", "messages of trees"):
        make = (lambda n: [tree(n)]) if shape == "trees" else messages
        return [(n, record) for n in range(RECORDS) for record in make(n)]
    templates = SHAPES[shape][0]
    return [(n, numbered(templates[n % len(templates)], n)) for n in range(RECORDS)]


def mutated(record: dict, chance: random.Random) -> object:
    """The record with another value, a missing, an extra or a renamed key, or something else in its place."""
    record = json.loads(json.dumps(record))
    holder, key = chance.choice(places(record))
    kind = chance.choice(("value", "value", "missing", "extra", "renamed", "repeated", "whole"))
    if kind == "whole":
        return chance.choice(VALUES)
    if kind == "missing" or kind == "renamed":
        value = holder.pop(key)
        if kind == "renamed" and isinstance(holder, dict):
            holder[chance.choice((key.upper(), f" {key}", f"{key}s", "prompt", "content"))] = value
    elif kind == "extra" and isinstance(holder, dict):
        holder[chance.choice(("extra", "rank", "system", "history", "weight", "lang", "messages"))] = chance.choice(
            VALUES
        )
    elif kind == "repeated" and isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[key] = chance.choice(VALUES)
    return record


def mutated_text(text: str, chance: random.Random, letters: str) -> str:
    """The text with one to three letters changed, left out or put in; line breaks stay."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(text))
        if text[at] not in '\r\n"' or '"' in letters and text[at] == '"':
            text = text[:at] + chance.choice(("", *letters)) + text[at + chance.randint(0, 1) :]
            text = text or " "
    return text


def text_file(records: list, touched: set[int], form: str, chance: random.Random) -> str:
    """JSON of a form in which records stay apart, with mutations of the records and of their letters."""
    indent = 1 if form.startswith("pretty") else None
    parts = []
    for n, record in records:
        by_letters = n in touched and chance.random() < 0.5
        record = mutated(record, chance) if n in touched and not by_letters else record
        text = json.dumps(record, ensure_ascii=n in touched, indent=indent)
        parts.append(mutated_text(text, chance, '"{}[]:,\\ x0é\t') if by_letters else text)
    if form == "pretty_array":
        return "[\n " + ",\n ".join(part.replace("\n", "\n ") for part in parts) + "\n]"
    return "[" + ",\n".join(parts) + "\n]" if form == "array_of_lines" else "\n".join(parts) + "\n"


def csv_file(records: list, touched: set[int], chance: random.Random) -> str:
    """A table with cells, their number and their letters mutated, but not its quotes, which decide where rows end."""
    header, *_ = csv_text([record for _, record in records], ";", "\n").split("\n", 1)
    rows = [header + "\n"]
    names = list(dict.fromkeys(name for _, record in records for name in record))
    for n, record in records:
        row = csv_text([dict.fromkeys(names, "") | record], ";", "\n").split("\n", 1)[1]
        if n in touched:
            other = {name: str(chance.choice(VALUES)) for name in chance.sample(names, 1)}
            other = csv_text([dict.fromkeys(names, "") | record | other], ";", "\n").split("\n", 1)[1]
            row = chance.choice((other, mutated_text(row, chance, "x;,0 é"), ";" + row, row.lstrip("Q ")))
        rows.append(row.replace("\ud800", "?"))
    return "".join(rows)


def write(path: Path, shape: str, touched: set[int], chance: random.Random) -> str:
    """Writes a file of a shape with mutated records in any form; returns the form."""
    records = records_of(shape)
    form = chance.choice((*TEXT_FORMS, *TEXT_FORMS, *COLUMN_FORMS, *["csv"] * (2 * (shape in FLAT))))
    if form in COLUMN_FORMS:  # of one type a column: values go missing, and columns come
        rows = [record | {chance.choice(list(record)): None} if n in touched else record for n, record in records]
        write_columns([row | {"extra": 1} if chance.random() < 0.1 else row for row in rows], form, path)
        return form
    content = csv_file(records, touched, chance) if form == "csv" else text_file(records, touched, form, chance)
    content = content.encode(chance.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")))
    packed = chance.choice(("", "", "gz", "bz2", "xz", "zip"))
    path.write_bytes(COMPRESSIONS[packed](content) if packed else content)
    return form


def read(path: Path, shape: str, on_error: str) -> tuple[dict[int, list], int]:
    """(number of a record → what it gave, problems that were counted)."""
    if shape in ("trees", "messages of trees"):
        frame = read_messages(path, on_error=on_error)
        rows = [(row["message_tree_id"], row) for row in frame.astype(object).to_dict("records")]
    else:
        frame = own_data.read_pairs(path, on_error=on_error)
        rows = [(row["response"], row) for row in to_records(frame)]
    found: dict[int, list] = {}
    for name, row in rows:
        if (number := NUMBER.search(name)) and number[1] in CODES:
            found.setdefault(CODES[number[1]], []).append(repr(row))
    return found, len(frame.attrs["skipped"])


def check_file(path: Path, shape: str, chance: random.Random, whole: dict[int, list]) -> Counter:
    """Writes one mutated file, reads it in both ways, and returns the counts; AssertionError says what went wrong."""
    touched = set(chance.sample(range(1, RECORDS), RECORDS // 2))
    form = write(path, shape, touched, chance)
    counts = Counter({"files": 1, "mutated records": len(touched), f"files of the form {form}": 1})
    try:
        found, problems = read(path, shape, "skip")
    except ValueError as error:
        assert path.name in str(error), error
        return counts + Counter({f"files refused ({form})": 1})
    different = [n for n in set(whole) - touched if found.get(n) != whole[n]]
    assert not different, f"{shape}, {form}: record {different[0]} is lost or changed: {found.get(different[0])}"
    gave_nothing = [n for n in touched if n not in found]
    assert form in COLUMN_FORMS or problems > 0 or not gave_nothing, (
        f"{shape}, {form}: {gave_nothing} left out in silence"
    )
    if problems:
        try:
            read(path, shape, "raise")
        except ValueError as error:
            assert path.name in str(error), error
        else:
            raise AssertionError(f"{shape}, {form}: problems in silence")
    kept = sum(n in found for n in touched)
    return counts + Counter(
        {"mutated records that gave pairs or messages": kept, "problems that were counted": problems}
    )


def run(records: int, folder: Path, seed: int = 0) -> Counter:
    """Mutates at least so many records, in files of every shape and form; returns the counts."""
    chance, counts = random.Random(seed), Counter()
    shapes = [*SHAPES, "trees", "messages of trees"]
    whole = {}
    for number, shape in enumerate(shapes):
        path = folder / f"whole{number}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for _, record in records_of(shape)), encoding="utf-8")
        whole[shape] = read(path, shape, "raise")[0]
        assert len(whole[shape]) == RECORDS, shape
    while counts["mutated records"] < records:
        shape = shapes[counts["files"] % len(shapes)]
        counts += check_file(folder / "fuzzed.data", shape, chance, whole[shape])
    return counts


if __name__ == "__main__":
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        for name, number in sorted(run(int(sys.argv[1]), Path(temporary), seed=int(began)).items()):
            print(f"{number:>12,} {name}")
    print(f"{time.monotonic() - began:>12,.0f} seconds: every error clear, no untouched record lost or changed")

"""What every reader needs: one JSON object of a line, checks of its values, and problems named with file and line."""

import ast
import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

decode = msgspec.json.Decoder().decode
TREE_ID = re.compile(rb'"message_tree_id"\s*:\s*"([^"\\]+)"')
"""Finds the tree of a line that is not valid JSON."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Keeps Python's cyclic garbage collector off: it would walk millions of new objects, none of them garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Found(list):
    """A list that its copies share: pandas copies a table's attrs in depth with every step."""

    def __deepcopy__(self, memo: dict) -> "Found":
        return self


@dataclass
class Problems:
    """The problems of a source: the first one stops the reading ("raise"), or all are collected ("skip")."""

    source: str
    on_error: str = "raise"
    unit: str = "line"
    form: str = ""
    """What the source was read as, such as JSON lines; known once its first record is read."""
    cure: str = 'Correct the file, or read it with on_error="skip", which leaves that tree out and counts it.'
    """What to do, said after each problem that stops the reading."""
    found: list[dict] = field(default_factory=Found)

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error = {self.on_error!r}: "raise" or "skip"')

    def add(self, line: int | None, tree: str | None, problem: str, cure: str | None = None, **more: str) -> None:
        """Raises ValueError with file, line and cure, or collects {"line", "tree", "problem"} with `more`."""
        if self.on_error == "raise":
            place = self.source if line is None else f"{self.source}, {self.unit} {line}"
            raise ValueError(f"{place}: {problem}. {self.cure if cure is None else cure}".rstrip())
        self.found.append({"line": line, "tree": tree, "problem": problem} | more)


def existing_file(path: str | Path) -> Path:
    """Returns the path of a file that is not empty; raises FileNotFoundError or ValueError for any other."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name one file in it.")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} not found. Name an existing file, or a dataset id such as OpenAssistant/oasst1."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Download or write it again.")
    return path


def parse(line: bytes) -> dict:
    """Parses a line as a JSON object, or a list of turns as one with `messages`; raises ValueError with the reason.

    msgspec takes a third of json's time and gives equal values; what it refuses (NaN too) goes to the reader that
    accepts it or says why not.
    """
    try:
        record = decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _parse_carefully(line)
    return record if type(record) is dict else as_object(record)


def _parse_carefully(line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line). Save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        if line.rstrip().endswith(b"},"):
            return _parse_carefully(line.rstrip()[:-1])  # a line of a JSON array that lost its brackets
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError:
        raise ValueError("nested too deeply to be read; export it as flat messages") from None
    if b"\\ud" in line or b"\\uD" in line:
        check_surrogates(record)
    return as_object(record)


def check_surrogates(record: Any) -> None:
    """Raises ValueError if a text of a JSON value could not be written as UTF-8."""
    if not is_text(json.dumps(record, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) without the other half")


def as_object(record: Any) -> dict:
    """Returns a JSON object as it is, a list of turns as one with `messages`; raises ValueError for anything else."""
    if type(record) is list and record and (all_of(dict, record) or all_of(str, record)):
        return {"messages": record}
    if type(record) is not dict:
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def all_of(kind: type, values: list) -> bool:
    """Whether all values are of this very type."""
    return all(type(value) is kind for value in values)


def excerpt(value: Any) -> str:
    """Returns the value's repr in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def is_text(value: Any) -> bool:
    """Whether the value is a str that can be written as UTF-8 (a lone surrogate from a \\ud800 escape cannot)."""
    if type(value) is not str:
        return False
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


TOKEN = re.compile(
    r"(?P<text>[bu]?(?:'[^'\\]*(?:\\.[^'\\]*)*'|\"[^\"\\]*(?:\\.[^\"\\]*)*\"))|\.\.\.|<[^<>]*>|[-+\w.]+|\S", re.DOTALL
)
"""A text, numpy's mark for what it left out, an object of which only a name is written, a number or name, a letter."""
OPENS, CLOSES, BETWEEN_VALUES = "[{(", ")}]", ",:="
NAMES = {"nan": None, "NaT": None, "True_": True, "False_": False}


def literal(value: Any) -> Any:
    """Returns what a text of JSON, or of Python as pandas writes a list into a CSV, stands for; or else the value."""
    for read in (json.loads, _of_python) if type(value) is str else ():
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def _of_python(text: str) -> Any:
    """Evaluates a literal of Python in which numpy's arrays may stand; raises ValueError or SyntaxError for others."""
    if not text.lstrip().startswith(tuple(OPENS)):
        return ast.literal_eval(text)
    return ast.literal_eval(_Plain().visit(ast.parse(_with_commas(text), mode="eval")))


def _with_commas(text: str) -> str:
    """Puts the commas between values that numpy leaves out in the text of an array; without them texts are joined."""
    parts, last = [], OPENS
    for found in TOKEN.finditer(text):
        token = "None" if found[0].startswith("<") else found[0]
        if token in ("...", "'", '"'):
            raise ValueError("values are left out, or a text has no end")
        is_call = token == "(" and (last[-1].isalnum() or last[-1] == "_")
        follows = token[0] in CLOSES + BETWEEN_VALUES or last[-1] in OPENS + BETWEEN_VALUES
        if not is_call and not follows:
            parts.append(",")
        parts.append(token)
        last = "''" if found["text"] else token
    return "".join(parts)


class _Plain(ast.NodeTransformer):
    """Replaces a call of one argument, as array([…], dtype=object) or np.float64(1.0), by it, and any other by None."""

    def visit_Call(self, call: ast.Call) -> ast.expr:
        return self.visit(call.args[0]) if len(call.args) == 1 else ast.Constant(None)

    def visit_Name(self, name: ast.Name) -> ast.expr:
        return ast.Constant(NAMES[name.id]) if name.id in NAMES else name

    def visit_Attribute(self, name: ast.Attribute) -> ast.expr:
        return ast.Constant(NAMES[name.attr]) if name.attr in NAMES else name


def as_number(value: Any) -> Any:
    """Returns the number that a text, or a float without a fraction, stands for; anything else as it is."""
    try:
        number = float(value) if type(value) in (str, float) else value
        return int(number) if number == int(number) else number
    except (TypeError, ValueError, OverflowError):
        return value

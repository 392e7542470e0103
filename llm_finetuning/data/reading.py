"""Reads a data file's lines as JSON objects; each problem on the way is named with its file and line."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TREE_ID = re.compile(rb'"message_tree_id"\s*:\s*"([^"\\]+)"')
"""Finds the tree of a line that is not valid JSON."""
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Problems:
    """The problems of a source: the first one stops the reading ("raise"), or all are collected ("skip")."""

    source: str
    on_error: str = "raise"
    unit: str = "line"
    cure: str = 'Correct the file, or read it with on_error="skip", which leaves that tree out and counts it.'
    found: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error = {self.on_error!r}: "raise" or "skip"')

    def add(self, line: int | None, tree: str | None, problem: str) -> None:
        """Raises ValueError with file, line and cure, or collects {"line", "tree", "problem"}."""
        if self.on_error == "raise":
            place = self.source if line is None else f"{self.source}, {self.unit} {line}"
            raise ValueError(f"{place}: {problem}. {self.cure}")
        self.found.append({"line": line, "tree": tree, "problem": problem})


def existing_file(path: str | Path) -> Path:
    """Returns the path of a file that is not empty; raises FileNotFoundError or ValueError for any other."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name one file in it (.jsonl, .jsonl.gz, .parquet or .csv).")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} not found. Name an existing file, or a dataset id such as OpenAssistant/oasst1."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Download or write it again.")
    return path


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of a plain or gzipped file, without blank lines."""
    with path.open("rb") as stream:
        opener = gzip.open if stream.read(2) == GZIP_MAGIC else open
    number = 0
    try:
        with opener(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}, after line {number}: the gzip file is cut off or damaged ({error}). Download or copy it again."
        ) from error


def parse(line: bytes) -> dict:
    """Parses a line as a JSON object; raises ValueError with the reason if it is not one."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line). Save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError:
        raise ValueError("nested too deeply to be read; export it as flat messages") from None
    if (b"\\ud" in line or b"\\uD" in line) and not is_text(json.dumps(record, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) without the other half")
    if type(record) is not dict:
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def records(path: Path, problems: Problems) -> Iterator[tuple[int, dict]]:
    """Yields (line number, JSON object) of each line; a line that is not one is added to `problems`.

    Raises ValueError when the file holds no line at all or its compression is damaged.
    """
    number = 0
    for number, line in raw_lines(path):
        try:
            record = parse(line)
        except ValueError as error:
            tree = TREE_ID.search(line)
            problems.add(number, tree[1].decode(errors="replace") if tree else None, str(error))
            continue
        yield number, record
    if number == 0:
        raise ValueError(f"{path} has no lines. Download or write it again.")


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


def in_validation(tree: str, validation_share: float) -> bool:
    """Whether a tree of a source without splits is validation: by a hash of its id, always the same."""
    return int(hashlib.sha256(tree.encode("utf-8")).hexdigest()[:8], 16) < validation_share * 2**32

"""Lines of a data file as JSON objects, and the problems found on the way, each with file and line."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TREE_ID = re.compile(rb'"message_tree_id"\s*:\s*"([^"\\]+)"')
"""Finds out to which tree a line belongs that is not valid JSON."""
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Problems:
    """What is wrong with a source: the first problem stops the reading, or all are collected ("skip")."""

    source: str
    on_error: str = "raise"
    unit: str = "line"
    found: list[dict] = field(default_factory=list)

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error = {self.on_error!r}: "raise" or "skip"')

    def add(self, line: int | None, tree: str | None, problem: str) -> None:
        """Raises ValueError with file, line and cure, or notes {"line", "tree", "problem"}."""
        if self.on_error == "raise":
            place = self.source if line is None else f"{self.source}, {self.unit} {line}"
            cure = 'Correct the file, or read it with on_error="skip", which leaves that tree out and counts it.'
            raise ValueError(f"{place}: {problem}. {cure}")
        self.found.append({"line": line, "tree": tree, "problem": problem})


def existing_file(path: str | Path) -> Path:
    """The path, if it is a file with something in it; FileNotFoundError or ValueError otherwise."""
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
    """(line number from 1, line) of a plain or gzipped file, blank lines left out."""
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
    """The JSON object of a line; ValueError with the reason when it is none."""
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
    """(line number, JSON object) of each line; a line that is none goes to `problems`.

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


def is_text(value) -> bool:
    """True for a str that can be written as UTF-8 (a lone surrogate from a \\ud800 escape cannot)."""
    if type(value) is not str:
        return False
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def sha256(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def in_validation(tree: str, validation_share: float) -> bool:
    """Whether a tree of a source without splits is validation: by a hash of its id, always the same."""
    return int(hashlib.sha256(tree.encode("utf-8")).hexdigest()[:8], 16) < validation_share * 2**32

"""Files and folders that are written atomically: under their final name they are complete, or not there.

What is being written lies beside it under a hidden name that ends in `.partial`.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from llm_finetuning.files import drive

encode = msgspec.json.Encoder().encode
BUFFER = 1 << 20
"""Bytes that are written at once."""


def partial_name(path: Path) -> Path:
    """The hidden neighbour under which `path` is written: `a/b.json` → `a/.b.json.partial`."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def writing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields the path to write a file to; it gets the name `path` when the block ends well, and else goes.

    shared: several processes may write the same file at once, each under a name of its own.
    """
    partial = partial_name(path.with_name(f"{path.name}.{os.getpid()}") if shared else path)
    try:
        drive.make_parent(path)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno == errno.ENOTCONN and drive.on_drive(path):
            raise drive.lost(path) from error
        raise
    finally:
        if os.path.isfile(partial):
            partial.unlink()


def write_text(path: Path, text: str) -> Path:
    """Writes a UTF-8 file atomically, newlines as they are; returns its path. Raises what `write_bytes` raises."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, shared: bool = False) -> Path:
    """Writes a file atomically; returns its path. shared: as in `writing`.

    Raises OSError that names the file when the folder cannot be made or written, or the disk is full.
    """
    return _write(path, [content], shared)


def _write(path: Path, parts: Iterable[bytes], shared: bool = False) -> Path:
    try:
        with writing(path, shared) as partial, partial.open("wb", BUFFER) as stream:
            stream.writelines(parts)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise
        cure = "Free some space, or set drive_folder to a folder that can be written."
        raise OSError(error.errno, f"{path} could not be written ({error.strerror}). {cure}") from error
    return path


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file; {} where there is none, or Drive has not uploaded it to its end."""
    return json.loads(path.read_text(encoding="utf-8") or "{}") if path.exists() else {}


def write_json(path: Path, value: object, indent: int = 1, shared: bool = False) -> Path:
    """Writes `value` as JSON atomically; returns the path. shared, and what it raises: as `write_bytes`."""
    return write_bytes(path, (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode(), shared)


def write_json_lines(path: Path, records: Iterable[dict]) -> Path:
    """Writes each record as a line of JSON in UTF-8, atomically; returns the path. Raises what `write_bytes` raises."""
    return _write(path, (encode(record) + b"\n" for record in records))


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it takes the place of `folder` when the block ends well, and else goes."""
    partial = partial_name(folder)
    drive.check_mounted(folder)
    drive.remove(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, folder)
    finally:
        drive.remove(partial, ignore_errors=True)


def replace_folder(partial: Path, final: Path) -> None:
    """Gives a complete folder its final name; what stood there before is removed."""
    if final.exists():
        remove_folder(final)
    os.replace(partial, final)


def remove_folder(folder: Path) -> None:
    """Removes a folder. Its name goes first, so a removal that is cut off leaves nothing half there under it."""
    going = partial_name(folder.with_name(f"{folder.name}.removed"))
    drive.remove(going, ignore_errors=True)
    os.replace(folder, going)
    drive.remove(going, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Removes what killed processes left behind in `folder`. Call it while nothing is being written there."""
    for partial in folder.glob(".*.partial"):
        drive.remove(partial, ignore_errors=True)

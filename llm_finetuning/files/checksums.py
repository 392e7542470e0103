"""SHA256SUMS: what a finished folder holds, in the format that `sha256sum -c SHA256SUMS` reads."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llm_finetuning.files.atomic import write_text

NAME, CARD = "SHA256SUMS", "README.md"
COMMAND = f"sha256sum -c {NAME}"
READ_BY_TRANSFORMERS = {".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".py"}
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(folder: str | Path) -> Path:
    """Writes `SHA256SUMS` atomically: a line for each file below `folder`, in sorted order; returns its path."""
    folder = _existing(folder)
    names = [name for name in files_below(folder) if name != NAME]
    _check_names(folder, names)
    return write_listed(folder, hash_files(folder, names))


def _check_names(folder: Path, names: list[str]) -> None:
    """Raises ValueError where there are none, or some that the list or another system cannot hold."""
    if not names:
        raise ValueError(f"{folder} holds no files, so there is nothing to write {NAME} for.")
    odd = [name for name in names if "\n" in name or "\\" in name]
    if odd:
        raise ValueError(f"{NAME} cannot name {odd[0]!r} in {folder}. Rename the file: no line break, no backslash.")
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(unicodedata.normalize("NFC", name.casefold()), name)
        if other != name:
            raise ValueError(
                f"{folder} holds {other!r} and {name!r}, one file on Windows and macOS. Rename one of them."
            )


def write_listed(folder: Path, hashes: dict[str, str]) -> Path:
    """Writes `SHA256SUMS` atomically: a line for each file, in sorted order; returns its path."""
    return write_text(folder / NAME, "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)))


def verify_checksums(folder: str | Path, contents: bool = True) -> dict[str, str]:
    """Compares every file that `SHA256SUMS` lists with its hash; returns {name: SHA-256 in hex}.

    A model card (CARD) that was edited is the folder's own: only that it is there is asked.
    contents: False compares the names alone, and reads no file.
    Raises FileNotFoundError when the folder or its SHA256SUMS is missing, ValueError naming every file that
    is damaged, missing, or not listed although transformers would read it.
    """
    folder = _existing(folder)
    listed = read_checksums(folder)
    present = set(files_below(folder))
    problems = [f"{name} is missing" for name in listed if name not in present]
    hashed = [name for name in listed if name in present and name != CARD] if contents else []
    for name, sha256 in hash_files(folder, hashed).items():
        if sha256 != listed[name]:
            size = (folder / name).stat().st_size
            what = f"is damaged ({size:,} bytes, another SHA-256)" if size else "is empty (0 bytes)"
            problems.append(f"{name} {what}")
    unlisted = sorted(name for name in present - set(listed) if Path(name).suffix in READ_BY_TRANSFORMERS)
    problems += [f"{name} is not listed in {NAME}" for name in unlisted if not is_hidden(name)]
    if problems:
        raise ValueError(
            f"{folder} is not the folder that was published:\n  " + "\n  ".join(problems) + "\n"
            "Copy or download it again; on Google Drive wait until the upload has finished. "
            "If it is damaged where it was published, publish it again from the finetuning notebook."
        )
    return listed


def is_complete(folder: str | Path) -> bool:
    """Whether every file of `folder` is what its `SHA256SUMS` lists."""
    try:
        verify_checksums(folder)
    except (ValueError, FileNotFoundError):
        return False
    return True


def read_checksums(folder: str | Path) -> dict[str, str]:
    """Returns {file name: SHA-256 in hex} as `SHA256SUMS` of `folder` lists them; nothing is compared."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so {Path(folder).name} was not published whole. "
            "Run the finetuning notebook to its end, or copy the folder again."
        )
    listed = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{path}, line {number} is not '<SHA-256>  <file>': {line[:80]!r}. Copy the folder again.")
        listed[match[2]] = match[1]
    if not listed:
        raise ValueError(f"{path} is empty. Copy the folder again; on Google Drive wait for the upload to finish.")
    return listed


def digest(folder: Path) -> str:
    """Returns one SHA-256 of what `SHA256SUMS` of `folder` lists besides the model card, which may be edited.

    Raises what `read_checksums` raises.
    """
    listed = {name: sha256 for name, sha256 in read_checksums(folder).items() if name != CARD}
    return hashlib.sha256(str(listed).encode()).hexdigest()


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """Returns the SHA-256 of each file, in the order of `names`."""
    return dict(zip(names, _hashes(folder / name for name in names), strict=True))


def hash_together(paths: Iterable[Path]) -> str:
    """Returns one SHA-256 of the contents of several files, in their order."""
    return hashlib.sha256("".join(_hashes(paths)).encode()).hexdigest()


def _hashes(paths: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file; hashlib releases the GIL, so threads pay off."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_file, paths))


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file in hex; memory holds a piece of it at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Returns the sorted names of all files below `folder`, relative to it, with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_dir():
        return folder
    aside = folder.parent / f".{folder.name}.previous"
    cure = (
        f"Publishing was stopped while it put the new version in its place; the last good one "
        f"lies in {aside}. "
        "Run the publishing cell of the finetuning notebook again, or rename that folder back."
        if aside.is_dir()
        else "Run the finetuning notebook first, or correct the path."
    )
    raise FileNotFoundError(f"{folder} is not there. {cure}")


def is_hidden(name: str) -> bool:
    """Whether the file or a folder above it starts with a dot."""
    return any(part.startswith(".") for part in Path(name).parts)

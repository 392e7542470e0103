"""SHA256SUMS: what a finished folder holds, in the format that `sha256sum -c SHA256SUMS` reads."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "SHA256SUMS"
COMMAND = f"sha256sum -c {NAME}"
READ_BY_TRANSFORMERS = {".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".py"}
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(folder: str | Path) -> Path:
    """Write `SHA256SUMS`: a line for each file below `folder`, in sorted order, all of them or no file."""
    folder = _existing(folder)
    names = [name for name in files_below(folder) if name != NAME]
    if not names:
        raise ValueError(f"{folder} holds no files, so there is nothing to write {NAME} for.")
    odd = [name for name in names if "\n" in name or "\\" in name]
    if odd:
        raise ValueError(f"{NAME} cannot name {odd[0]!r} in {folder}. Rename the file: no line break, no backslash.")
    hashes = hash_files(folder, names)
    temporary = folder / f".{NAME}.partial"
    temporary.write_text("".join(f"{hashes[name]}  {name}\n" for name in names), encoding="utf-8")
    os.replace(temporary, folder / NAME)
    return folder / NAME


def verify_checksums(folder: str | Path) -> dict[str, str]:
    """Read every file that `SHA256SUMS` lists and compare; returns {name: SHA-256 in hex}.

    Raises FileNotFoundError when the folder or its SHA256SUMS is missing, ValueError naming every file that
    is damaged, missing, or not listed although transformers would read it.
    """
    folder = _existing(folder)
    sums = read_checksums(folder)
    here = set(files_below(folder))
    problems = [f"{name} is missing" for name in sums if name not in here]
    hashes = hash_files(folder, [name for name in sums if name in here])
    for name, found in hashes.items():
        if found != sums[name]:
            size = (folder / name).stat().st_size
            what = f"is damaged ({size:,} bytes, another SHA-256)" if size else "is empty (0 bytes)"
            problems.append(f"{name} {what}")
    unlisted = sorted(name for name in here - set(sums) if Path(name).suffix in READ_BY_TRANSFORMERS)
    problems += [f"{name} is not listed in {NAME}" for name in unlisted if not is_hidden(name)]
    if problems:
        raise ValueError(
            f"{folder} is not the folder that was published:\n  " + "\n  ".join(problems) + "\n"
            "Copy or download it again; on Google Drive wait until the upload has finished. "
            "If it is damaged where it was published, publish it again from the finetuning notebook."
        )
    return sums


def read_checksums(folder: str | Path) -> dict[str, str]:
    """{file name: SHA-256 in hex} as `SHA256SUMS` of `folder` lists them, nothing compared."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so {Path(folder).name} was not published whole. "
            "Run the finetuning notebook to its end, or copy the folder again."
        )
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{path}, line {number} is not '<SHA-256>  <file>': {line[:80]!r}. Copy the folder again.")
        sums[match[2]] = match[1]
    if not sums:
        raise ValueError(f"{path} is empty. Copy the folder again; on Google Drive wait for the upload to finish.")
    return sums


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of each file, in the order of `names`; hashlib lets go of the GIL, so threads pay."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name), names), strict=True))


def hash_file(path: Path) -> str:
    """SHA-256 of one file in hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it with forward slashes, sorted."""
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

"""Which notebooks of a run are finished, and with what inputs: notebooks/finished.json.

An input is what decides a notebook's result: its parameters, its code, the package, and the files it reads.
The file is only ever replaced whole.
"""

import hashlib
import json
import os
from pathlib import Path

import nbformat

PACKAGE = Path(__file__).parents[1]
RUNNER = {"runner", "colab.py", "__main__.py"}
"""Modules that run the notebooks and take no part in what they compute."""


def inputs(notebook: Path, parameters: dict, folder: Path, reads: tuple[str, ...]) -> dict[str, str]:
    """What the notebook's result depends on: kind of input → SHA-256.

    `folder` is the output folder, `reads` are glob patterns in it. Where it is on the disk does not count.
    """
    own = {name: value for name, value in parameters.items() if value != str(folder.resolve())}
    code = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    named = [Path(v) for v in own.values() if isinstance(v, str) and v and Path(v).exists()]
    read = [path for pattern in reads for path in sorted(folder.glob(pattern))]
    return {
        "parameters": _sha(json.dumps(own, sort_keys=True)),
        "notebook": _sha(json.dumps(code)),
        "package": _sha("".join(_file(path) for path in _package_files())),
        "input files": _sha("".join(_content(path) for path in named + read)),
    }


def changed(name: str, now: dict[str, str], folder: Path) -> list[str] | None:
    """The kinds of input that differ from when the notebook finished; [] = none, None = it never finished."""
    before = _load(folder).get(name)
    return None if before is None else [kind for kind in now if now[kind] != before.get(kind)]


def remember(name: str, now: dict[str, str], folder: Path) -> None:
    """Notes that the notebook finished with these inputs."""
    _store(_load(folder) | {name: now}, folder)


def forget(name: str, folder: Path) -> None:
    """Notes that the notebook has to be run: called before it starts."""
    _store({other: kinds for other, kinds in _load(folder).items() if other != name}, folder)


def _path(folder: Path) -> Path:
    return folder / "notebooks" / "finished.json"


def _load(folder: Path) -> dict[str, dict[str, str]]:
    path = _path(folder)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _store(finished: dict, folder: Path) -> None:
    temporary = _path(folder).with_suffix(".part")
    temporary.write_text(json.dumps(finished, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, _path(folder))


def _package_files() -> list[Path]:
    files = (p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return sorted(p for p in files if p.relative_to(PACKAGE).parts[0] not in RUNNER)


def _content(path: Path) -> str:
    """A file by its bytes; a folder (a model's, of gigabytes) by names, sizes and times."""
    if path.is_file():
        return _file(path)
    stats = [(p, p.stat()) for p in sorted(path.rglob("*")) if p.is_file()]
    return _sha(str([(str(p.relative_to(path)), s.st_size, s.st_mtime_ns) for p, s in stats]))


def _file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

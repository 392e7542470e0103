"""Records which notebooks of a run are finished, and with what inputs: notebooks/finished.json.

An input is what decides a notebook's result: its parameters, its code, the modules of the package that it uses, and
the files it reads.
"""

import ast
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import grimp
import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import read_json, write_json
from llm_finetuning.files.checksums import hash_file

PACKAGE = Path(__file__).parents[1]
SET_UP = "colab.install(clone)"
"""What the set-up cell ends with: it installs packages in Colab, and takes no part in what a notebook computes."""


def inputs(notebook: Path, parameters: dict, folder: Path, reads: tuple[str, ...]) -> dict[str, str]:
    """Returns what the notebook's result depends on, as {kind of input: SHA-256}.

    `folder` is the output folder, `reads` are glob patterns in it. Where it is on the disk does not count.
    """
    own = {name: value for name, value in parameters.items() if value != str(folder.resolve())}
    code = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    named = [Path(v) for v in own.values() if isinstance(v, str) and os.path.exists(v)]  # a long text is no path
    read = [path for pattern in reads for path in sorted(folder.glob(pattern))]
    return {
        "parameters": _hash_text(json.dumps(own, sort_keys=True)),
        "notebook": _hash_text(json.dumps(code)),
        "package": _hash_text("".join(hash_file(path) for path in used_files(code))),
        "input files": _hash_text("".join(_hash_content(path) for path in named + read)),
    }


def used_files(code: list[str]) -> list[Path]:
    """Returns the package's files that these code cells use: modules, and the data files that lie beside them.

    A module counts when a cell imports it, or another module that counts does, at its top or inside a function.
    """
    graph = grimp.build_graph(PACKAGE.name, cache_dir=None)
    used, new = set(), {_module(name, graph.modules) for name in _imported_names(code)}
    while new := new - used - {""}:
        used |= new
        new = {name for module in new for name in {module.rpartition(".")[0], *graph.find_upstream_modules(module)}}
    paths = [PACKAGE.parent.joinpath(*module.split(".")) for module in used]
    files = {path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths}
    beside = {path for folder in {file.parent for file in files} for path in folder.iterdir() if path.is_file()}
    return sorted(files | {path for path in beside if path.suffix != ".py"})


def _imported_names(code: list[str]) -> set[str]:
    """Returns the dotted names that the cells import, `from a import b` as `a.b`."""
    nodes, names = [], set()
    for source in code:
        with suppress(SyntaxError):  # such a cell says so when the notebook runs
            if not source.rstrip().endswith(SET_UP):
                nodes += ast.walk(ast.parse(TransformerManager().transform_cell(source)))
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {origin + alias.name for alias in node.names}
    return names


def _module(name: str, modules: set[str]) -> str:
    """Returns the module of the package that a dotted name names or lies in; "" = none of the package."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def changed(name: str, now: dict[str, str], folder: Path) -> list[str] | None:
    """Returns the kinds of input that differ from when the notebook finished; None = it never finished."""
    before = _load(folder).get(name)
    return None if before is None else [kind for kind in now if now[kind] != before.get(kind)]


def remember(name: str, now: dict[str, str], folder: Path) -> None:
    """Records that the notebook finished with these inputs."""
    write_json(_path(folder), _load(folder) | {name: now})


def forget(name: str, folder: Path) -> None:
    """Records that the notebook has to be run; called before it starts."""
    write_json(_path(folder), {other: kinds for other, kinds in _load(folder).items() if other != name})


def _path(folder: Path) -> Path:
    return folder / "notebooks" / "finished.json"


def _load(folder: Path) -> dict[str, dict[str, str]]:
    return read_json(_path(folder))


def _hash_content(path: Path) -> str:
    """Hashes a file by its bytes, and a folder (a model's, of gigabytes) by names, sizes and times."""
    if path.name == checksums.NAME:  # all but the model card, which an evaluation is written into
        return checksums.digest(path.parent)
    if path.is_file():
        return hash_file(path)
    stats = [(p, p.stat()) for p in sorted(path.rglob("*")) if p.is_file()]
    return _hash_text(str([(str(p.relative_to(path)), s.st_size, s.st_mtime_ns) for p, s in stats]))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

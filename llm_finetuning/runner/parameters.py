"""Reads what the notebooks are run with: their parameters cells, the profiles, and `-p NAME=VALUE`.

A parameters cell is the code cell tagged `parameters`; it holds `name = literal` lines only. A profile is a
YAML file of the same names. Nothing is run before every name and value has been checked.
"""

import ast
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

PACKAGED = Path(__file__).parents[1] / "notebooks"
ROOT = PACKAGED if PACKAGED.is_dir() else PACKAGED.parents[1]
"""The folder of the notebooks and the profiles: in an installed package its own (see setup.py), else the checkout."""
PROFILES = ROOT / "profiles"
OUTPUT_NAMES = ("drive_folder", "work_folder")
"""Parameters that the runner sets itself, to the output folder."""
PATH_NAMES = ("source", "model_name", "model_folder", "tokenizer_folder", "chat_template", "prompts_file")
PATH_NAMES += ("documents", "generator_folder", "adapter_folder")
"""Parameters that may name a file or folder; a relative one counts from where the command was typed."""


class _Loader(yaml.SafeLoader):
    """A loader for YAML 1.2's core schema: `2e-4` is a number; `on`, `off`, `yes`, `no` and dates are text."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Reads a mapping. Raises YAMLError for a name that stands there twice, of which one value would be lost."""
        names = [name.value for name, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"{twice[0]} stands there twice")
        return super().construct_mapping(node, deep)


for _tag, _pattern, _starts in (
    ("null", r"~|null|None|", "~nN"),
    ("bool", r"true|True|false|False", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_starts, ""])


def defaults(notebook: Path) -> dict[str, object]:
    """Returns the names and literals of a notebook's parameters cell.

    Raises ValueError when there is no such cell or it holds anything but `name = literal`.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]  # nbformat takes seconds to import
    cells = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{notebook}: {len(cells)} cells are tagged `parameters`; exactly one has to be")
    values = {}
    for line in ast.parse("".join(cells[0]["source"])).body:
        try:
            (target,) = line.targets
            values[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError):
            place = f"line {line.lineno} of the parameters cell: {ast.unparse(line)}"
            raise ValueError(f"{notebook}, {place}\nExpected `name = literal`") from None
    return values


def read_profile(profile: str) -> dict[str, object]:
    """Returns the names and values of a profile: `sample`, `rehearsal` (profiles/*.yaml), or a YAML file's path.

    Raises FileNotFoundError when there is none, ValueError when it is not a YAML mapping of names.
    """
    path = PROFILES / f"{profile}.yaml"
    if not path.is_file():
        path = Path(os.path.expanduser(profile))
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise FileNotFoundError(f"profile {profile!r} not found: say one of {names}, or the path of a YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: expected lines of `name: value`, one parameter each")
    return values


def parse(text: str, default: object) -> object:
    """Reads a value as typed after -p: as text where the parameter's default is text, else as YAML (2, [a, b])."""
    if isinstance(default, str):
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def assign(
    cells: list[dict], profile: dict, typed: list[tuple[str, str]], output: Path, others: Sequence[dict] = ()
) -> list[dict]:
    """Returns the parameters of each notebook: the profile's, then those `typed` (name, text), then the output folder.

    `cells` are the notebooks' defaults, in order, `others` those of notebooks that are not run: a profile may name
    their parameters too. A name goes to every notebook that has it. Raises ValueError that lists every name which no
    notebook has, and those that the runner sets itself.
    """
    every = {name: value for cell in (*others, *cells) for name, value in cell.items()}
    problems = [_unknown(name, every) for name in [*profile, *dict(typed)] if name not in every]
    problems += [
        f"{name}: the runner sets it; choose the folder with --output"
        for name in OUTPUT_NAMES
        if name in profile or name in dict(typed)
    ]
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    values = profile | {name: parse(text, every[name]) for name, text in typed}
    values = {name: absolute(name, value) for name, value in values.items()}
    values |= dict.fromkeys(OUTPUT_NAMES, str(output.resolve()))
    return [{name: values[name] for name in cell if name in values} for cell in cells]


def _unknown(name: str, every: dict) -> str:
    """Returns the error text for a parameter that no notebook has, with the names that come closest."""
    close = difflib.get_close_matches(name.strip().lower(), every, n=3)
    cure = f"did you mean {' or '.join(close)}?" if close else "run --parameters lists them, for these notebooks"
    return f"{name}: no notebook has this parameter; {cure}"


def absolute(name: str, value: object) -> object:
    """Makes an existing path absolute, because the notebooks may be opened elsewhere later; `~` is the home."""
    if name not in PATH_NAMES or not isinstance(value, str) or value in ("", "sample", "rehearsal"):
        return value
    path = os.path.expanduser(value)  # a shell leaves that of source=~/chats.jsonl alone
    return str(Path(path).resolve()) if os.path.exists(path) else value

"""Reads the configurations that a dataset's card (README.md) names, and which files belong to one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

CARD = "README.md"


@dataclass(frozen=True)
class Configuration:
    """One configuration of a dataset; others: the names of those beside it.

    patterns: of each split the globs of its files; of the split "" those of files whose own names tell their split.
    """

    name: str
    others: list[str]
    patterns: dict[str, list[str]]

    @property
    def origin(self) -> dict:
        """What a report says of it: nothing where it is the only one."""
        return {"configuration": self.name, "other_configurations": self.others} if self.others else {}


def configuration(folder: Path, source: str, wanted: str) -> Configuration | None:
    """Returns the wanted configuration of the card in a folder, else its default or only one; None = it names no files.

    Raises ValueError as `choose` does.
    """
    entries = {str(entry["config_name"]): entry for entry in _entries(folder / CARD)}
    found = {name: patterns for name, entry in entries.items() if (patterns := _patterns(entry))}
    if not found:
        return None
    marked = [name for name in found if entries[name].get("default") is True]
    default = next(iter([*marked, *({"default"} & found.keys())]), "")
    name = choose(list(found), default, source, wanted, f"'{source}, {next(iter(found))}'")
    return Configuration(name, [other for other in found if other != name], found[name])


def choose(names: Sequence[str], default: str, source: str, wanted: str, example: str) -> str:
    """Returns the name that is wanted, else the default or only one, "" of none; example: a source that names one.

    Raises ValueError where the wanted one is not among them, or there are several and no default.
    """
    if wanted and wanted not in names:
        raise ValueError(f"{source} has no configuration {wanted!r}; it has {', '.join(names) or 'none'}.")
    if not wanted and not default and len(names) > 1:
        raise ValueError(f"{source} has the configurations {', '.join(names)}. Set source = {example}.")
    return wanted or default or next(iter(names), "")


def _entries(card: Path) -> list[dict]:
    """Returns what stands under `configs` in a card's front matter, nothing where that is no such YAML."""
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(card) or {}).get("configs")
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return []
    return [entry for entry in found if type(entry) is dict and "config_name" in entry] if type(found) is list else []


def _patterns(entry: dict) -> dict[str, list[str]]:
    """Returns `Configuration.patterns` of an entry; addresses of other places are left out."""
    folder, files = str(entry.get("data_dir") or ""), entry.get("data_files")
    files = files or "**" * bool(folder)
    found: dict[str, list[str]] = {}
    for one in files if type(files) is list else [files]:
        split, paths = (one.get("split"), one.get("path")) if type(one) is dict else ("", one)
        for path in paths if type(paths) is list else [paths]:
            if type(path) is str and path and "://" not in path:
                found.setdefault(str(split or ""), []).append(str(PurePosixPath(folder, path)))
    return found

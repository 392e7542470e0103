"""Finds the files of a source and of one of its splits: a file, a folder, a saved dataset, or a dataset of the Hub."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path

from llm_finetuning import sample
from llm_finetuning.data import dataset_card
from llm_finetuning.data.reading import existing_file
from llm_finetuning.files.checksums import hash_file, hash_together

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FORMS = (".parquet", ".arrow", ".jsonl", ".json", ".ndjson", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
FILE_SUFFIXES = (*FORMS, *COMPRESSED, ".txt")
KINDS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev")}
KINDS |= {"test": ("test", "testing", "eval", "evaluation")}
"""Words in the name of a split, as `datasets` knows them."""
NO_DATA = {"dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"}
SHARD = re.compile(r"(.+?)[-_]\d+[-_]of[-_]\d+.*")
NUMBERED = re.compile(r"(.*[^\W\d_](?<!\bv)(?<!_v))[-_. \d]*\d", re.IGNORECASE)
"""A name with a number at its end that is not the number of a version."""
Splits = tuple[str, str]
"""Names of the splits for training and validation; "" = found by their names."""


@dataclass(frozen=True)
class Located:
    """A source whose files are known.

    source: as it was named. origin: source, revision or sha256 (what computes it, until `hashing` is left),
    split_in_source (False = the files hold both splits), split_name (of the source's own split), other_splits (those,
    and files, that are not read for either), configuration and other_configurations where there are several.
    """

    source: str
    files: list[Path]
    origin: dict

    @contextmanager
    def hashing(self) -> Iterator[None]:
        """Computes the SHA-256 of a source that has one while the block reads it: hashing frees the GIL."""
        sha256 = self.origin.get("sha256")
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(sha256) if callable(sha256) else None
            yield
        if found:
            self.origin["sha256"] = found.result()


def locate(
    source: "str | Path | Located", split: str | None, revision: str = "main", splits: Splits = ("", "")
) -> Located:
    """Finds the files of a source, or of one of its splits; downloads a dataset of the Hub.

    The sample without a split is its training split. What was located already is returned as it is.
    """
    if isinstance(source, Located):
        return source
    return Located(str(source), *_find(source, split, revision, splits))


def _find(source: str | Path, split: str | None, revision: str, splits: Splits) -> tuple[list[Path], dict]:
    if source == "sample":
        source, split = sample.FOLDER, split or sample.TRAIN
    name, configuration = _without_configuration(str(source))
    if not Path(name).exists() and looks_like_hub_id(name):
        folder = _download(name, revision, configuration)
        files, found = _of_split(*_by_split(folder, name, configuration, is_download=True), name, split, splits)
        return files, {"source": name, "revision": folder.name} | found
    if Path(name).is_dir():
        files, found = _of_split(*_by_split(Path(name), name, configuration), name, split, splits)
        return files, {"source": Path(name).name, "sha256": partial(_hash_of, files)} | found
    path = existing_file(source)
    if any(splits):
        raise ValueError(f"{path} is one file, without splits. Leave train_split and validation_split empty.")
    return [path], {"source": path.name, "sha256": partial(hash_file, path), "split_in_source": False}


def _without_configuration(source: str) -> tuple[str, str]:
    """Returns (dataset id or folder, configuration) of `owner/name, configuration`, (source, "") of any other."""
    name, _, configuration = (part.strip() for part in source.rpartition(","))
    is_id = looks_like_hub_id(name) and not configuration.lower().endswith(FILE_SUFFIXES)
    is_named = name and not Path(source).exists() and (is_id or Path(name).is_dir())
    return (name, configuration) if is_named else (source, "")


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that does not exist here is meant as a dataset id."""
    return HUB_ID.fullmatch(source) is not None and not source.lower().endswith(FILE_SUFFIXES)


def _download(dataset: str, revision: str, configuration: str) -> Path:
    """Returns the folder of the dataset's files from the Hub, or from its cache when there is no network.

    Where the dataset's card names the files of the configuration, these alone are fetched. Otherwise files other than
    parquet are fetched only where there is no parquet: many datasets hold the same in both.
    """
    from huggingface_hub import snapshot_download

    from llm_finetuning.models import asking_the_hub

    def fetch(patterns: list[str], revision: str) -> Path:
        with asking_the_hub("source", dataset):
            return Path(snapshot_download(dataset, repo_type="dataset", revision=revision, allow_patterns=patterns))

    folder = fetch([dataset_card.CARD], revision)
    if card := dataset_card.configuration(folder, dataset, configuration):
        globs = [one for patterns in card.patterns.values() for one in patterns]
        folder = fetch([*globs, *(one.replace("**/", "") for one in globs)], folder.name)
    else:
        folder = fetch(["*.parquet"], folder.name)
        if not any(folder.rglob("*.parquet")):
            folder = fetch([f"*{suffix}{packed}" for suffix in FORMS for packed in ("", *COMPRESSED)], folder.name)
    if not _data_files(folder):
        raise ValueError(
            f"{dataset} has no parquet, JSON, CSV or arrow files at revision {revision}. Set source_revision = "
            '"refs/convert/parquet" if the Hub has converted it, or download a file of it and name that.'
        )
    return folder


def _data_files(folder: Path) -> list[Path]:
    """Returns the data files below a folder, a saved dataset as one; what is hidden, such as checkpoints, is none."""
    saved = {path.parent for path in folder.rglob("state.json")}
    files = [
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith((*FORMS, *COMPRESSED))
        and path.name not in NO_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and saved.isdisjoint(path.parents)
        and path.is_file()
    ]
    return sorted([*saved, *files])


def _by_split(folder: Path, source: str, wanted: str, is_download: bool = False) -> tuple[dict[str, list[Path]], dict]:
    """Returns ({split: its files} of one configuration of a folder, what `origin` says of what is not read).

    A split in parquet and in another form is the same twice: parquet is read, unless a card says otherwise. Raises
    ValueError where there is no file, and as `dataset_card.choose` does.
    """
    files, by_name = _data_files(folder), defaultdict(list)
    if card := dataset_card.configuration(folder, source, wanted):
        origin = card.origin
        for split, path in _matching(folder, files, card.patterns):
            by_name[split or split_name(path.relative_to(folder))].append(path)
    else:
        if is_download:
            files = list(filter(_is_parquet, files)) or files
        files, origin = _of_one_configuration(folder, files, source, wanted)
        for path in files:
            by_name[split_name(path.relative_to(folder))].append(path)
    if not by_name:
        where = f"{source} is a folder without data files" + (f" of the configuration {card.name}" if card else "")
        raise ValueError(f"{where} ({', '.join(FORMS)}). Name another, or a file.")
    read = by_name if card else {name: list(filter(_is_parquet, paths)) or paths for name, paths in by_name.items()}
    mixed = [name for name in by_name if len(read[name]) < len(by_name[name])]
    ignored = [path for name in mixed for path in by_name[name] if not _is_parquet(path)]
    return read, origin | {"other_splits": [str(path.relative_to(folder)) for path in ignored]}


def _matching(folder: Path, files: list[Path], patterns: dict[str, list[str]]) -> Iterator[tuple[str, Path]]:
    """Yields (split, file) of each of the files that a pattern of the split stands for."""
    for split, globs in patterns.items():
        names = {folder / name for one in globs for name in glob(one, root_dir=folder, recursive=True)}
        yield from ((split, path) for path in files if path in names)


def _is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


def _of_split(
    by_name: dict[str, list[Path]], origin: dict, source: str, split: str | None, splits: Splits
) -> tuple[list[Path], dict]:
    """Returns (files of one split, what `origin` says of it); training's own where nothing is there for validation."""
    if split is None:
        return sorted(path for paths in by_name.values() for path in paths), origin | {"split_in_source": False}
    by_name = _join_numbered(by_name, splits)
    if not any(map(kind_of, by_name)) and not any(splits):
        by_name = {"": [path for paths in by_name.values() for path in paths]}  # parts of one whole
    train = _choose("train", by_name, source, splits[0])
    if train is None:
        train, by_name = _join_plain(by_name, source, splits[1])
    validation = _choose("validation", by_name, source, splits[1], train)
    if validation is None:
        validation = _choose("test", by_name, source, "", train)
    name = validation if split == "validation" and validation else train
    others = [other for other in by_name if other not in (train, validation)] + origin["other_splits"]
    found = {"split_in_source": validation is not None, "split_name": name, "other_splits": others}
    return by_name[name], origin | found


def _join_numbered(by_name: dict[str, list[Path]], splits: Splits) -> dict[str, list[Path]]:
    """Joins splits whose names differ by a number at their end alone, but for one that `splits` names."""
    groups = defaultdict(list)
    for name in by_name:
        numbered = None if name in splits else NUMBERED.fullmatch(name)
        groups[numbered[1] if numbered else name].append(name)
    return {
        start if len(names) > 1 else names[0]: [path for name in names for path in by_name[name]]
        for start, names in groups.items()
    }


def _join_plain(by_name: dict[str, list[Path]], source: str, validation: str) -> tuple[str, dict[str, list[Path]]]:
    """Returns (training's name, splits) where none is named as training: all that are not named as another, or the one.

    Raises ValueError where several are there, each named as one for evaluation.
    """
    left = [name for name in by_name if not validation or name != validation]
    plain = [name for name in left if not kind_of(name)] or left
    if not plain or len(plain) > 1 and kind_of(plain[0]):
        raise ValueError(f"{source} has no split for training, only {', '.join(by_name)}. Set train_split to one.")
    joined = {", ".join(plain): [path for name in plain for path in by_name[name]]}
    return ", ".join(plain), joined | {name: paths for name, paths in by_name.items() if name not in plain}


def _of_one_configuration(folder: Path, files: list[Path], source: str, wanted: str) -> tuple[list[Path], dict]:
    """Returns (files of one configuration of a folder laid out as configuration/split/0000.parquet, its `origin`).

    All files where it is laid out otherwise. Raises ValueError as `dataset_card.choose` does.
    """
    parts = {path: path.relative_to(folder).parts for path in files}
    names = {path: part[-3] if len(part) > 2 and _stem(path).isdigit() else "" for path, part in parts.items()}
    several = sorted(set(names.values()) - {""})
    example = "" if not several else folder / several[0] if Path(source).is_dir() else f"'{source}, {several[0]}'"
    default = "default" if "default" in several else ""
    name = dataset_card.choose(several, default, source, wanted, str(example))
    if len(several) < 2:
        return files, {}
    others = [other for other in several if other != name]
    found = {"configuration": name, "other_configurations": others}
    return [path for path in files if names[path] in ("", name)], found


def _choose(kind: str, names: Iterable[str], source: str, wanted: str, train: str = "") -> str | None:
    """Returns the split that is wanted, or the one for training, validation or test by its name; None = there is none.

    Of several for training that called train, or ending in sft; of several others the one named as training's is.
    """
    if wanted and wanted not in names:
        raise ValueError(f"{source} has no split {wanted!r}; it has {', '.join(sorted(names))}.")
    if wanted:
        return wanted
    found = [name for name in names if kind_of(name) == kind and name != train]
    ending = _without_kind(train) if train else ""
    better = [name for name in found if _without_kind(name) == ending]
    better = better or [name for name in found if name.endswith("sft")] or found
    if len(better) > 1:
        setting = "train_split" if kind == "train" else "validation_split"
        raise ValueError(f"{source} has several splits for {kind}: {', '.join(better)}. Set {setting} to one of them.")
    return better[0] if better else None


def kind_of(name: str) -> str | None:
    """Returns "train", "validation" or "test" if a word of a name says so."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((kind for kind, known in KINDS.items() if set(words) & set(known)), None)


def _without_kind(name: str) -> str:
    return "-".join(word for word in re.split(r"[^a-z]+", name.lower()) if not kind_of(word))


def split_name(path: Path) -> str:
    """Returns the name of the split that a data file belongs to, by its own name or by its folder's.

    data/train-00000-of-00002.parquet, default/train/0000.parquet and train.jsonl.gz are all of train.
    """
    stem = _stem(path)
    folders = [part for part in reversed(path.parts[:-1]) if kind_of(part)]
    return stem if kind_of(stem) or not folders else folders[0]


def _stem(path: Path) -> str:
    """Returns a file's name without its suffixes and the number of its shard."""
    name = path.name
    while name.lower().endswith((*FORMS, *COMPRESSED)):
        name = name.rpartition(".")[0]
    shard = SHARD.fullmatch(name)
    return shard[1] if shard else name


def _hash_of(files: list[Path]) -> str:
    """Returns one SHA-256 of the contents of several files, those of a saved dataset included."""
    inside = [p for path in files for p in (sorted(path.rglob("*")) if path.is_dir() else [path]) if p.is_file()]
    return hash_together(inside)

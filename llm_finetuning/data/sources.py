"""Finds the files of a source and of one of its splits: a file, a folder, a saved dataset, or a dataset of the Hub."""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm_finetuning import sample
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
Splits = tuple[str, str]
"""Names of the splits for training and validation; "" = found by their names."""


@dataclass(frozen=True)
class Located:
    """A source whose files are known.

    source: as it was named. origin: source, revision or sha256 (what computes it, until `hashing` is left),
    split_in_source (False = the files hold both splits), split_name (of the source's own split), other_splits (those
    that are not read for either).
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
    elif not Path(source).exists() and looks_like_hub_id(str(source)):
        folder = _download(str(source), revision)
        files, found = _of_split(folder, str(source), split, splits)
        return files, {"source": str(source), "revision": folder.name} | found
    if Path(source).is_dir():
        files, found = _of_split(Path(source), str(source), split, splits)
        return files, {"source": Path(source).name, "sha256": partial(_hash_of, files)} | found
    path = existing_file(source)
    if any(splits):
        raise ValueError(f"{path} is one file, without splits. Leave train_split and validation_split empty.")
    return [path], {"source": path.name, "sha256": partial(hash_file, path), "split_in_source": False}


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that does not exist here is meant as a dataset id."""
    return HUB_ID.fullmatch(source) is not None and not source.lower().endswith(FILE_SUFFIXES)


def _download(dataset: str, revision: str) -> Path:
    """Returns the folder of the dataset's files from the Hub, or from its cache when there is no network.

    Files other than parquet are fetched only where there is no parquet: many datasets hold the same in both.
    """
    from huggingface_hub import snapshot_download

    from llm_finetuning.models import asking_the_hub

    def fetch(patterns: list[str]) -> Path:
        with asking_the_hub("source", dataset):
            return Path(snapshot_download(dataset, repo_type="dataset", revision=revision, allow_patterns=patterns))

    folder = fetch(["*.parquet"])
    if not any(folder.rglob("*.parquet")):
        folder = fetch([f"*{suffix}{packed}" for suffix in FORMS for packed in ("", *COMPRESSED)])
    if not _data_files(folder):
        raise ValueError(
            f"{dataset} has no parquet, JSON, CSV or arrow files at revision {revision}. Set source_revision = "
            '"refs/convert/parquet" if the Hub has converted it, or download a file of it and name that.'
        )
    return folder


def _data_files(folder: Path) -> list[Path]:
    """Returns the data files below a folder, those of parquet alone where there are some; a saved dataset is one."""
    saved = [path.parent for path in sorted(folder.rglob("state.json"))]
    if saved:
        return saved
    inside = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in inside if p.name not in NO_DATA and p.name.lower().endswith((*FORMS, *COMPRESSED))]
    return [path for path in files if path.name.lower().endswith(".parquet")] or files


def _of_split(folder: Path, source: str, split: str | None, splits: Splits) -> tuple[list[Path], dict]:
    """Returns (files of one split, what `origin` says of it); training's own where nothing is there for validation."""
    files = _of_one_configuration(folder, _data_files(folder), source)
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(split_name(path.relative_to(folder)), []).append(path)
    if split is None:
        return files, {"split_in_source": False}
    if not any(map(kind_of, by_name)) and not any(splits):
        by_name = {"": files}  # parts of one whole
    train = _choose("train", by_name, source, splits[0]) or next(iter(by_name))
    validation = _choose("validation", by_name, source, splits[1], train)
    if validation is None:
        validation = _choose("test", by_name, source, "", train)
    name = validation if split == "validation" and validation else train
    others = [other for other in by_name if other not in (train, validation)]
    return by_name[name], {"split_in_source": validation is not None, "split_name": name, "other_splits": others}


def _of_one_configuration(folder: Path, files: list[Path], source: str) -> list[Path]:
    """Returns the files of a folder laid out as configuration/split/0000.parquet, of the default one if there are more.

    Raises ValueError where the folder has no data files, or several configurations and no default.
    """
    if not files:
        raise ValueError(f"{source} is a folder without data files ({', '.join(FORMS)}). Name another, or a file.")
    parts = {path: path.relative_to(folder).parts for path in files}
    names = {path: part[-3] if len(part) > 2 and _stem(path).isdigit() else "" for path, part in parts.items()}
    several = sorted(set(names.values()) - {""})
    if len(several) > 1 and "default" not in several:
        raise ValueError(f"{source} has the configurations {', '.join(several)}. Set source = {folder / several[0]!s}.")
    return [path for path in files if len(several) < 2 or names[path] in ("", "default")]


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

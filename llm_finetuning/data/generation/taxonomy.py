"""What prompts are about: topics × difficulties × forms × languages, in a file that can be changed before the start."""

import hashlib
import json
from itertools import product, zip_longest
from math import prod
from pathlib import Path

import pandas as pd

from llm_finetuning.data.generation import parsing, requests
from llm_finetuning.data.generation.endpoint import GeneratorError
from llm_finetuning.data.generation.generator import Generator
from llm_finetuning.files.atomic import write_json
from llm_finetuning.settings import Generation, split_names

AXES = ("topics", "difficulties", "forms", "languages")
ONE = ("topic", "difficulty", "form", "language")
TEXT_FILES = (".txt", ".md", ".rst", ".csv", ".html", ".json", ".jsonl")
PASSAGE = 3000
"""Characters of a passage of the documents; a passage ends with a paragraph."""


class TaxonomyWritten(RuntimeError):
    """The taxonomy waits to be read."""


def passages(documents: str) -> list[str]:
    """Reads a text file, or all those of a folder, as passages of whole paragraphs, at most PASSAGE characters each.

    The first of them are of all files, for each file has its turn; within a turn and a file their hashes order them.
    Raises FileNotFoundError, or ValueError that names a file which is no UTF-8 text, or a folder without any.
    """
    if not documents:
        return []
    path = Path(documents)
    if not path.exists():
        raise FileNotFoundError(f"documents = {documents!r}: not found. Give a text file or a folder of them.")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_FILES)
    turns = zip_longest(*(sorted(_split(_read(file)), key=_order) for file in files))
    found = list(dict.fromkeys(text for turn in turns for text in sorted(filter(None, turn), key=_order)))
    if not found:
        raise ValueError(
            f"documents = {documents!r}: no text in it. Files that are read end in {', '.join(TEXT_FILES)}."
        )
    return found


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is no UTF-8 text. Save it as plain text, or take it out of documents.")
    return text


def _split(text: str) -> list[str]:
    """Joins paragraphs up to PASSAGE characters; a longer one is cut."""
    found, current = [], ""
    for paragraph in (part for part in text.split("\n\n") if part.strip()):
        if current and len(current) + len(paragraph) > PASSAGE:
            found.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}".strip()
        while len(current) > PASSAGE:
            found.append(current[:PASSAGE])
            current = current[PASSAGE:]
    return [*found, current] if current else found


def task_hash(settings: Generation, texts: list[str]) -> str:
    """Returns what names the cache: 12 hex digits of the settings that decide what is written, documents included.

    How many pairs are wanted, prices, limits, filters and the form of the pairs are none of them.
    """
    names = ("task", "examples", "style", "endpoint", "generator_model", "generator_folder", "temperature")
    values = [getattr(settings, name) for name in (*names, "max_answer_tokens")]
    return hashlib.sha256(json.dumps([values, texts], sort_keys=True).encode()).hexdigest()[:12]


def taxonomy_path(settings: Generation, name: str) -> Path:
    """Returns the file of the taxonomy that these settings ask for; others have another one."""
    values = [getattr(settings, axis) for axis in (*AXES, "topics_wanted")]
    digits = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:6]
    return settings.generation_folder / f"{name}-{digits}.taxonomy.json"


def taxonomy(settings: Generation, generator: Generator, texts: list[str], path: Path) -> dict[str, list[str]]:
    """Returns {axis: values} of AXES from its file; where there is none, makes it and writes it first.

    Raises TaxonomyWritten once after that if `review_taxonomy` is set, ValueError for a file that is no taxonomy.
    """
    is_new = not path.exists()
    if is_new:
        values = settings.topics or _proposed(settings, generator, texts)
        chosen = (list(dict.fromkeys(values)), settings.difficulties, settings.forms, split_names(settings.languages))
        write_json(path, dict(zip(AXES, chosen, strict=True)))
    axes = _checked(path)
    if is_new and settings.review_taxonomy:
        raise TaxonomyWritten(
            f"The taxonomy is in {path}: {sentence(axes)} Read it, change what you like, and run all cells"
            " again: only then are pairs written. review_taxonomy = False goes on at once."
        )
    return axes


def _proposed(settings: Generation, generator: Generator, texts: list[str]) -> list[str]:
    (answer,) = generator.ask([requests.topics(settings, texts)])
    found = parsing.strings(answer.text, "topics") if answer else []
    if not found:
        why = "the budget does not reach for it" if answer is None else answer.fault or f"it wrote {answer.text[:80]!r}"
        raise GeneratorError(
            f"The generator proposed no topics ({why}). Write some into topics, or take another model."
        )
    return found[: settings.topics_wanted]


def _checked(path: Path) -> dict[str, list[str]]:
    """Reads a taxonomy that may have been changed by hand."""
    cure = f"Correct {path}, or delete it: it is then made again."
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        axes = {axis: list(dict.fromkeys(value.strip() for value in found[axis])) for axis in AXES}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no taxonomy ({error!r:.80}). {cure}") from None
    if empty := [axis for axis, values in axes.items() if not values or "" in values]:
        raise ValueError(f"{path}: {', '.join(empty)} lacks values, or has an empty one. {cure}")
    return axes


def cells(axes: dict[str, list[str]]) -> list[dict]:
    """Returns every cell of the taxonomy; neighbours differ in topic, so that a part of them covers all topics."""
    others = sorted(product(*(axes[axis] for axis in AXES[1:])), key=lambda one: _order(*one))
    return [
        {"topic": topic, "difficulty": difficulty, "form": form, "lang": lang}
        for turn in range(len(others))
        for number, topic in enumerate(axes["topics"])
        for difficulty, form, lang in (others[(turn + number) % len(others)],)
    ]


def _order(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def sentence(axes: dict[str, list[str]]) -> str:
    """Says how many cells there are: 20 topics × 3 difficulties × 3 forms × 1 language = 180 cells."""
    sizes = [
        (len(axes[axis]), axis if len(axes[axis]) != 1 else singular) for axis, singular in zip(AXES, ONE, strict=True)
    ]
    return f"{' × '.join(f'{size} {axis}' for size, axis in sizes)} = {prod(size for size, _ in sizes):,} cells."


def table(axes: dict[str, list[str]]) -> pd.DataFrame:
    """Shows the axes side by side."""
    return pd.DataFrame({axis: pd.Series(values, dtype=object) for axis, values in axes.items()}).fillna("")

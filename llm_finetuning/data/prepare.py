"""The steps of the two data preparation notebooks: read, flatten, count tokens, write, and check for leaks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from llm_finetuning import plotting, prompts
from llm_finetuning.data import figures, leaks, oasst, own_data, pairs, reports
from llm_finetuning.data.filters import Filters
from llm_finetuning.data.shapes import Columns
from llm_finetuning.data.sources import locate
from llm_finetuning.files.checksums import hash_file
from llm_finetuning.prompts import Template
from llm_finetuning.settings import NO_FILTERS, DataPrep, split_names

FILES = {"train": "train_file", "validation": "val_file"}


@dataclass
class Prepared:
    """One prepared split: its pairs, the funnel of what was left out, and token counts.

    lengths: token counts of every candidate before any was truncated or chosen; final_lengths: those of `pairs`.
    Both have the columns prompt, history, response, total.
    """

    settings: DataPrep
    source: pd.DataFrame
    pairs: pd.DataFrame
    funnel: pd.DataFrame
    lengths: pd.DataFrame
    final_lengths: pd.DataFrame

    @property
    def split(self) -> str:
        return self.source.attrs["split"]

    @property
    def path(self) -> Path:
        """The file to which the pairs are written."""
        return getattr(self.settings.folders, FILES[self.split])

    def figure(self, name: str) -> Path:
        """Returns the file of one of this split's figures."""
        return self.settings.folders.figures / f"data_{self.split}_{name}.png"


def read(settings: DataPrep, split: str) -> pd.DataFrame:
    """Reads the messages of one split of the source, or its pairs if it is a file of pairs."""
    columns = Columns(settings.prompt_column, settings.response_column, settings.system_column)
    splits = settings.train_split, settings.validation_split
    files, _ = locate(settings.source, split, settings.source_revision, splits)
    given = settings.on_error, settings.validation_share, settings.source_revision, splits
    if own_data.is_pairs_file(files[0], columns):
        return own_data.read_pairs(settings.source, split, *given, columns)
    return oasst.read_messages(settings.source, split, *given)


def is_messages(source: pd.DataFrame) -> bool:
    """Whether `read` returned messages and not pairs."""
    return "parent_id" in source.columns


def prepare(settings: DataPrep, source: pd.DataFrame, template: Template) -> Prepared:
    """Flattens and filters the result of `read` as the settings say, and counts tokens on the way."""
    counted: dict[tuple, dict] = {}
    candidates: list[dict] = []

    def truncate(batch: list[dict]) -> list[dict | None]:
        candidates.extend(batch)
        return truncate_long(batch, token_lengths(batch, template, counted), template, settings.max_seq_length)

    flat = flatten(settings, source, truncate)
    final = token_lengths(pairs.to_records(flat.pairs), template, counted)
    first = token_lengths(candidates, template, counted) if candidates else final
    tables = [pd.DataFrame(lengths, columns=list(reports.PARTS)) for lengths in (first, final)]
    return Prepared(settings, source, flat.pairs, flat.funnel, *tables)


def token_lengths(candidates: list[dict], template: Template, counted: dict[tuple, dict]) -> list[dict]:
    """Returns `prompts.lengths` of the pairs, and counts only those not in `counted` (texts of a pair → lengths)."""
    keys = [(p["prompt"], p["response"], *(turn["content"] for turn in p["history"])) for p in candidates]
    new = {key: pair for key, pair in zip(keys, candidates, strict=True) if key not in counted}
    counted.update(zip(new, prompts.lengths(list(new.values()), template), strict=True))
    return [counted[key] for key in keys]


def truncate_long(
    candidates: list[dict], lengths: list[dict], template: Template, max_length: int
) -> list[dict | None]:
    """Applies `prompts.truncate_histories` to pairs over `max_length` tokens; None for one that stays too long."""
    places = [place for place, length in enumerate(lengths) if length["total"] > max_length]
    truncated = prompts.truncate_histories([candidates[place] for place in places], template, max_length)
    shortened = {place: cut.pair if cut.example else None for place, cut in zip(places, truncated, strict=True)}
    return [shortened.get(place, pair) for place, pair in enumerate(candidates)]


def filters_of(settings: DataPrep, truncate: Callable[[list[dict]], list[dict | None]] | None) -> Filters:
    """Returns the settings' filters that are on; `truncate` is one of them if `drop_too_long` is "yes"."""
    on = {name: value for name, value in settings.filters.items() if value != NO_FILTERS[name]}
    truncate = truncate if on.pop("drop_too_long", "no") == "yes" else None
    on |= {name: split_names(on[name]) for name in ("languages", "tree_states") if name in on}
    on |= {name: True for name, value in on.items() if value == "yes"}
    return Filters(truncate=truncate, **on)


def flatten(
    settings: DataPrep, source: pd.DataFrame, truncate: Callable[[list[dict]], list[dict | None]] | None = None
) -> oasst.Flattened:
    """Calls `oasst.flatten`, or `own_data.flatten_pairs` for ready-made pairs, with the settings' filters."""
    filters = filters_of(settings, truncate)
    if is_messages(source):
        return oasst.flatten(source, settings.replies, filters=filters)
    return own_data.flatten_pairs(source, filters)


def report(prepared: Prepared) -> dict:
    """Returns the report of one split: where it comes from, what was left out, and what is left."""
    settings, attrs = prepared.settings, prepared.source.attrs
    known = reports.known_answers(prepared.source) if is_messages(prepared.source) else None
    limit = settings.max_seq_length
    return {
        "source": {name: value for name, value in attrs.items() if name not in ("skipped", "read", "trees")},
        "recipe": {"replies": settings.replies} | settings.filters | _token_settings(settings),
        "funnel": prepared.funnel.to_dict("records"),
        "skipped": attrs["skipped"],
        "messages": reports.message_counts(prepared.source) if is_messages(prepared.source) else None,
        "pairs": {"pairs": len(prepared.pairs)} | reports.pair_counts(prepared.pairs),
        "tokens_before_cutting": reports.token_statistics(prepared.lengths, limit),
        "tokens": reports.token_statistics(prepared.final_lengths, limit),
        "known_answers": None if known is None else known.to_dict("index"),
        "examples": reports.examples(prepared.pairs),
        "versions": reports.versions(),
    }


def _token_settings(settings: DataPrep) -> dict:
    names = ("model_name", "tokenizer_folder", "system_message", "chat_template", "max_seq_length", "validation_share")
    return {name: getattr(settings, name) for name in names}


def write(prepared: Prepared) -> pd.DataFrame:
    """Writes the pairs and their report, and returns the pairs as read back from the file.

    Raises ValueError if they differ from those that were prepared.
    """
    path = pairs.write_jsonl(prepared.pairs, prepared.path)
    back = pairs.read_jsonl(path)
    if pairs.to_records(back) != pairs.to_records(prepared.pairs):
        raise ValueError(f"{path} does not hold what was written to it. Write it again, on another disk.")
    reports.write_report({"file": path.name, "sha256": hash_file(path)} | report(prepared), path)
    return back


def language_counts(report: dict) -> tuple[dict | None, dict]:
    """Returns (messages per language of the source, pairs per language); a source of pairs has no messages."""
    return report["messages"] and report["messages"]["languages"], report["pairs"]["languages"]


def shapes(report: dict) -> dict[str, dict]:
    """Returns {axis label: {value: count}} for `figures.shape`."""
    messages = report["messages"] or {}
    labels = {"depths": "depth of a message in its tree", "replies_per_prompt": "replies to a prompt"}
    panels = {label: messages[name] for name, label in labels.items() if name in messages}
    return panels | {"turns before a pair's prompt": report["pairs"]["turns_before"]}


def save_figures(prepared: Prepared) -> list[plotting.Figure]:
    """Draws all four figures of a split, writes them to figures/ and returns them for display."""
    facts, name = report(prepared), prepared.split.capitalize()
    plots = {
        "funnel": figures.funnel(prepared.funnel, f"{name} split: what each step kept"),
        "languages": figures.languages(*language_counts(facts), f"{name} split: languages"),
        "shape": figures.shape(shapes(facts), f"{name} split: shape of the conversations"),
        "token_lengths": figures.token_lengths(
            prepared.lengths, prepared.settings.max_seq_length, f"{name} split: tokens before cutting"
        ),
    }
    return [plotting.save(figure, prepared.figure(plot)) for plot, figure in plots.items()]


def token_sentence(statistics: dict) -> str:
    """Says in one line how many pairs and tokens there are, and what share of them is in the loss."""
    return (
        f"{statistics['pairs']:,} pairs, {statistics['tokens']:,} tokens, {statistics['share_trained']:.0%} "
        f"of them in the loss; {statistics['share_beyond']:.1%} of the pairs are longer than "
        f"{statistics['max_seq_length']:,} tokens."
    )


def known_sentence(report: dict) -> str:
    """Says whether the counts are those that are known of the source."""
    known = report["known_answers"]
    if known is None:
        return f"Nothing is known beforehand about {report['source']['source']}."
    lines = [
        f"{name}: {row['found']:,} found, {row['expected']:,} known: {'same' if row['same'] else 'DIFFERENT'}"
        for name, row in known.items()
    ]
    return "\n".join(lines)


def leak_sentence(prepared: Prepared) -> str:
    """Says how many pairs the last check removed from the training file."""
    removed = reports.read_report(prepared.path)["leaks"]["removed_from_train"]
    left = len(pairs.read_jsonl(prepared.settings.folders.train_file))
    return f"{removed:,} pairs taken out of the training file, {left:,} left there; validation is unchanged."


def check_leaks(prepared: Prepared, template: Template) -> pd.DataFrame:
    """Compares the validation pairs with the training file, both ways, and removes leaks from the latter.

    Validation is never changed. The training file and its report are rewritten only if something was removed.
    Returns one row for each kind of leak: the number of training pairs and that of validation pairs. Raises
    FileNotFoundError if the training file has not been written yet.
    """
    settings, path = prepared.settings, prepared.settings.folders.train_file
    if not path.exists():
        raise FileNotFoundError(
            f'{path.name} not found in {path.parent}. Run "Data Prep/OpenAssistant Finetuning Training Data '
            'Prep.ipynb" first.'
        )
    train = pairs.read_jsonl(path)
    in_train = leaks.overlaps(train, prepared.pairs, settings.leak_similarity)
    in_validation = leaks.overlaps(prepared.pairs, train, settings.leak_similarity)
    table = pd.DataFrame({"training pairs": leaks.count(in_train), "validation pairs": leaks.count(in_validation)})
    removed = int(in_train.notna().sum()) if settings.remove_leaks else 0
    if removed:
        _rewrite_train(path, train[in_train.isna()], table, template, settings)
    _add_to_report(prepared.path, {"leaks": {"found": table.to_dict(), "removed_from_train": removed}})
    return table


def _rewrite_train(
    path: Path, train: pd.DataFrame, table: pd.DataFrame, template: Template, settings: DataPrep
) -> None:
    """Writes the training file without the leaks, and updates its report."""
    old = reports.read_report(path)
    before = old["pairs"]["pairs"]
    removed = before - len(train)
    lengths = pd.DataFrame(prompts.lengths(pairs.to_records(train), template), columns=list(reports.PARTS))
    step = {"step": "not in the validation file", "unit": "pair", "kept": len(train), "dropped": removed}
    pairs.write_jsonl(train, path)
    new = {
        "sha256": hash_file(path),
        "funnel": [*old["funnel"], step],
        "pairs": {"pairs": len(train)} | reports.pair_counts(train),
        "tokens": reports.token_statistics(lengths, settings.max_seq_length),
        "examples": reports.examples(train),
        "leaks": {"found": table.to_dict(), "removed_from_train": removed},
    }
    reports.write_report(old | new, path)


def _add_to_report(path: Path, entries: dict) -> None:
    reports.write_report(reports.read_report(path) | entries, path)

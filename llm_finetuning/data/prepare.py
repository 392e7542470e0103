"""The steps of the two data preparation notebooks: read, flatten, count tokens, write, and check for leaks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from llm_finetuning import plotting
from llm_finetuning.data import containers, figures, leaks, oasst, own_data, pairs, preferences, reports
from llm_finetuning.data import funnel as funnels
from llm_finetuning.data.filters import Filters
from llm_finetuning.data.reading import without_collector
from llm_finetuning.data.shapes import Columns
from llm_finetuning.data.sources import locate
from llm_finetuning.data.tokens import TokenCounter
from llm_finetuning.files.checksums import hash_file
from llm_finetuning.prompts import Template
from llm_finetuning.settings import NO_FILTERS, DataPrep, split_names

FILES = {"train": "train_file", "validation": "val_file"}
PREFERENCES = {"train": "train_preferences", "validation": "val_preferences"}
NO_VALIDATION = "validation_share = 0: everything is in training, and no validation file is written."


@dataclass
class Prepared:
    """One prepared split: what flattening gave, and token counts.

    lengths: token counts of every candidate before any was truncated or chosen; final_lengths: those of `pairs`.
    Both have the columns prompt, history, response, total.
    """

    settings: DataPrep
    source: pd.DataFrame
    flat: oasst.Flattened
    lengths: pd.DataFrame
    final_lengths: pd.DataFrame

    @property
    def pairs(self) -> pd.DataFrame:
        return self.flat.pairs

    @property
    def funnel(self) -> pd.DataFrame:
        return self.flat.funnel

    @property
    def is_empty(self) -> bool:
        """Whether this is the validation split of a source that goes into training as a whole."""
        return len(self.source) == 0

    @property
    def split(self) -> str:
        return self.source.attrs["split"]

    @property
    def path(self) -> Path:
        """The file to which the pairs are written."""
        return getattr(self.settings.folders, FILES[self.split])

    @property
    def preferences_path(self) -> Path:
        """The file to which the preference pairs are written."""
        return getattr(self.settings.folders, PREFERENCES[self.split])

    @cached_property
    def facts(self) -> dict:
        """What `report` returns, gathered once."""
        return _facts(self)

    def figure(self, name: str) -> Path:
        """Returns the file of one of this split's figures."""
        return self.settings.folders.figures / f"data_{self.split}_{name}.png"


def read(settings: DataPrep, split: str) -> pd.DataFrame:
    """Reads the messages of one split of the source, or its pairs if it is a file of pairs."""
    columns = Columns(settings.prompt_column, settings.response_column, settings.system_column)
    splits = settings.train_split, settings.validation_split
    found = locate(settings.source, split, settings.source_revision, splits)
    given = found, split, settings.on_error, settings.validation_share
    if own_data.is_pairs_file(found.files[0], columns):
        return own_data.read_pairs(*given, columns=columns)
    return oasst.read_messages(*given)


def is_messages(source: pd.DataFrame) -> bool:
    """Whether `read` returned messages and not pairs."""
    return "parent_id" in source.columns


def prepare(settings: DataPrep, source: pd.DataFrame, template: Template, ready: Sequence[dict] = ()) -> Prepared:
    """Flattens and filters the result of `read` as the settings say, and counts tokens on the way.

    ready: the source's own preference records. Raises ValueError that names step and parameter if nothing is left.
    """
    counter = TokenCounter(template)
    first: list[dict] = []

    def truncate(batch: list[dict]) -> list[dict | None]:
        lengths = counter.lengths(batch)
        first.extend(lengths)
        return counter.truncate(batch, settings.max_seq_length, lengths)

    flat = flatten(settings, source, truncate, ready)
    if len(source):
        funnels.check_left(flat.funnel)
    final = counter.lengths(pairs.to_records(flat.pairs))
    tables = [pd.DataFrame(lengths, columns=list(reports.PARTS)) for lengths in (first or final, final)]
    return Prepared(settings, source, flat, *tables)


def filters_of(settings: DataPrep, truncate: Callable[[list[dict]], list[dict | None]] | None) -> Filters:
    """Returns the settings' filters that are on; `truncate` is one of them if `drop_too_long` is "yes"."""
    on = {name: value for name, value in settings.filters.items() if value != NO_FILTERS[name]}
    truncate = truncate if on.pop("drop_too_long", "no") == "yes" else None
    on |= {name: split_names(on[name]) for name in ("languages", "tree_states") if name in on}
    on |= {name: True for name, value in on.items() if value == "yes"}
    return Filters(truncate=truncate, **on)


def flatten(
    settings: DataPrep,
    source: pd.DataFrame,
    truncate: Callable[[list[dict]], list[dict | None]] | None = None,
    ready: Sequence[dict] = (),
) -> oasst.Flattened:
    """Calls `oasst.flatten`, or `own_data.flatten_pairs` for ready-made pairs, with the settings' filters.

    ready: the source's own preference records.
    """
    filters = filters_of(settings, truncate)
    if is_messages(source):
        return oasst.flatten(source, settings.replies, filters=filters, preference_pairs=settings.preference_pairs)
    return own_data.flatten_pairs(source, filters, settings.replies, settings.preference_pairs, ready)


def report(prepared: Prepared) -> dict:
    """Returns the report of one split: where it comes from, what was left out, and what is left."""
    return prepared.facts


def _facts(prepared: Prepared) -> dict:
    settings, attrs = prepared.settings, prepared.source.attrs
    known = reports.known_answers(prepared.source) if is_messages(prepared.source) else None
    limit = settings.max_seq_length
    return {
        "source": {name: value for name, value in attrs.items() if name not in ("skipped", "read", "trees")},
        "recipe": {"replies": settings.replies} | settings.filters | _token_settings(settings),
        "funnel": prepared.funnel.to_dict("records"),
        "skipped": attrs["skipped"],
        "messages": reports.message_counts(prepared.source) if is_messages(prepared.source) else None,
        "dropped_examples": prepared.funnel.attrs["examples"],
        "prompts_without_pair": reports.without_pair(prepared.funnel) if is_messages(prepared.source) else None,
        "pairs": {"pairs": len(prepared.pairs)} | reports.pair_counts(prepared.pairs),
        "shortened": prepared.flat.shortened,
        "preferences": {"pairs": len(prepared.flat.preferences), "which": settings.preference_pairs},
        "shape": reports.shape(prepared.source, prepared.pairs, prepared.funnel),
        "tokens_before_cutting": reports.token_statistics(prepared.lengths, limit),
        "tokens": reports.token_statistics(prepared.final_lengths, limit),
        "known_answers": None if known is None else known.to_dict("index"),
        "examples": reports.examples(prepared.pairs),
        "versions": reports.versions(),
        "token_counts": reports.token_counts(prepared.final_lengths),
    }


def _token_settings(settings: DataPrep) -> dict:
    names = ("model_name", "tokenizer_folder", "system_message", "chat_template", "max_seq_length", "validation_share")
    return {name: getattr(settings, name) for name in names}


@without_collector()
def write(prepared: Prepared) -> pd.DataFrame:
    """Writes the pairs, their report and the preference pairs, and returns the pairs as read back from the file.

    Where there is nothing to write there is no file, and one of an earlier run goes. Raises ValueError if the pairs
    differ from those that were prepared.
    """
    preferences.write(prepared.flat.preferences, prepared.preferences_path)
    if prepared.is_empty:
        for old in (prepared.path, reports.report_path(prepared.path)):
            old.unlink(missing_ok=True)
        return prepared.pairs
    path = pairs.write_jsonl(prepared.pairs, prepared.path)
    back = pairs.read_jsonl(path)
    if pairs.to_records(back) != pairs.to_records(prepared.pairs):
        raise ValueError(f"{path} does not hold what was written to it. Write it again, on another disk.")
    reports.write_report({"file": path.name, "sha256": hash_file(path)} | report(prepared), path)
    return back


def language_counts(report: dict) -> tuple[dict | None, dict]:
    """Returns (messages per language of the source, pairs per language); a source of pairs has no messages."""
    return report["messages"] and report["messages"]["languages"], report["pairs"]["languages"]


@without_collector()
def save_figures(prepared: Prepared) -> list[plotting.Figure]:
    """Draws all four figures of a split, writes them to figures/ and returns them for display."""
    if prepared.is_empty:
        return []
    facts, name = report(prepared), prepared.split.capitalize()
    plots = {
        "funnel": figures.funnel(prepared.funnel, f"{name} split: what each step kept"),
        "languages": figures.languages(*language_counts(facts), f"{name} split: languages"),
        "shape": figures.shape(facts["shape"], f"{name} split: shape of the conversations"),
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


def written_sentence(prepared: Prepared) -> str:
    """Says what was written: pairs, preference pairs, and how many lost turns of their history."""
    if prepared.is_empty:
        return NO_VALIDATION
    lost, number = prepared.flat.shortened, len(prepared.flat.preferences)
    liked = f"{number:,} preference pairs in {prepared.preferences_path.name}"
    lines = [
        f"{len(prepared.pairs):,} pairs in {prepared.path}",
        liked if number else "No replies with ranks: no file of preference pairs.",
    ]
    if lost["pairs"]:
        lines.append(f"{lost['pairs']:,} pairs lost their oldest turns, {lost['without_history']:,} of them all turns.")
    return "\n".join(lines)


def loss_sentences(prepared: Prepared) -> str:
    """Says which filters took much, with examples, how many histories were cut, and why prompts have no pair."""
    if prepared.is_empty:
        return NO_VALIDATION
    attrs = prepared.funnel.attrs
    lines = [funnels.large_losses(prepared.funnel), *(f"{step}: {note}." for step, note in attrs["notes"].items())]
    if is_messages(prepared.source):
        reasons = reports.without_pair(prepared.funnel)
        lines.append("Prompts that have no pair, by where they lost their last reply:")
        lines += [f"    {step}: {number:,}" for step, number in reasons.items()]
    return "\n".join(lines)


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


def counts_sentence(prepared: Prepared) -> str:
    """Says of the written split whether its counts are those that are known, and how many tokens it has."""
    if prepared.is_empty:
        return NO_VALIDATION
    facts = reports.read_report(prepared.path)
    return f"{known_sentence(facts)}\n{token_sentence(facts['tokens'])}"


def leak_sentence(prepared: Prepared) -> str:
    """Says how many pairs the last check removed from the training file."""
    if prepared.is_empty:
        return NO_VALIDATION
    found = reports.read_report(prepared.path)["leaks"]
    left = sum(1 for _ in containers.lines(prepared.settings.folders.train_file))
    of_ranked = f" ({found['removed_preferences']:,} preference pairs too)" if found["removed_preferences"] else ""
    return (
        f"{found['removed_from_train']:,} pairs taken out of the training file{of_ranked}, {left:,} left there;"
        " validation is unchanged."
    )


@without_collector()
def check_leaks(prepared: Prepared, template: Template) -> pd.DataFrame:
    """Compares what validation holds with what training holds, and removes leaks from the latter.

    Pairs and preference pairs count on both sides. Validation is never changed; training's files and report are
    rewritten only if something was removed. Returns one row for each kind of leak: the number of training pairs, of
    validation pairs, and of training preference pairs if there are any. Raises FileNotFoundError if the training
    file has not been written yet, ValueError if no training pair would be left.
    """
    settings, folders = prepared.settings, prepared.settings.folders
    if prepared.is_empty:
        return pd.DataFrame()
    if not folders.train_file.exists():
        raise FileNotFoundError(
            f'{folders.train_file.name} not found in {folders.train_file.parent}. Run "Data Prep/OpenAssistant '
            'Finetuning Training Data Prep.ipynb" first.'
        )
    train, ranked = pairs.read_jsonl(folders.train_file), preferences.read(folders.train_preferences)
    held_out = pd.concat([prepared.pairs, preferences.as_pairs(prepared.flat.preferences)], ignore_index=True)
    everything = pd.concat([train, preferences.as_pairs(ranked)], ignore_index=True)
    in_train, in_validation = leaks.overlaps(everything, held_out, settings.leak_similarity)
    sides = in_train[len(train) :].tolist()  # chosen and rejected of each preference pair in turn
    both = zip(sides[::2], sides[1::2], strict=True)
    of_ranked = pd.Series([next((k for k in leaks.KINDS if k in two), None) for two in both], dtype=object)
    in_train, in_validation = in_train[: len(train)], in_validation[: len(prepared.pairs)]
    found = {"training pairs": leaks.count(in_train), "validation pairs": leaks.count(in_validation)}
    table = pd.DataFrame(found | ({"training preference pairs": leaks.count(of_ranked)} if ranked else {}))
    removed = {"removed_from_train": 0, "removed_preferences": 0}
    if settings.remove_leaks:
        removed = dict(zip(removed, (int(kinds.notna().sum()) for kinds in (in_train, of_ranked)), strict=True))
    entries = {"leaks": {"found": table.to_dict()} | removed}
    if any(removed.values()):
        stays = [record for record, kind in zip(ranked, of_ranked, strict=True) if kind is None]
        _rewrite_train(train, in_train, stays, entries, TokenCounter(template), settings)
    add_to_report(prepared.path, entries)
    return table


def _rewrite_train(
    train: pd.DataFrame,
    kinds: pd.Series,
    ranked: list[dict],
    entries: dict,
    counter: TokenCounter,
    settings: DataPrep,
) -> None:
    """Writes training's files without the leaks, and updates the report."""
    path, left, removed = settings.folders.train_file, train[kinds.isna()], entries["leaks"]
    if not len(left):
        raise ValueError(
            f"nothing is left: the leak check took all {len(train):,} pairs out of {path.name}"
            f" ({', '.join(f'{kind}: {number:,}' for kind, number in leaks.count(kinds).items() if number)}):"
            " set leak_similarity = 0 (equal prompts only) or remove_leaks = False"
        )
    old = reports.read_report(path)
    lengths = _lengths_left(path, old, train, kinds, counter)
    pairs.write_jsonl(left, path)
    preferences.write(ranked, settings.folders.train_preferences)
    name, number = "not in the validation file", removed["removed_preferences"]
    steps = [{"step": name, "unit": "pair", "kept": len(left), "dropped": len(train) - len(left)}]
    if number:
        steps.insert(0, {"step": name, "unit": preferences.UNIT, "kept": len(ranked), "dropped": number})
    new = {
        "sha256": hash_file(path),
        "funnel": [*old["funnel"], *steps],
        "pairs": {"pairs": len(left)} | reports.pair_counts(left),
        "preferences": {"pairs": len(ranked), "which": settings.preference_pairs},
        "tokens": reports.token_statistics(lengths, settings.max_seq_length),
        "examples": reports.examples(left),
        "token_counts": reports.token_counts(lengths),
    }
    reports.write_report(old | new | entries, path)


def _lengths_left(
    path: Path, report: dict, train: pd.DataFrame, kinds: pd.Series, counter: TokenCounter
) -> pd.DataFrame:
    """Returns token counts of the pairs that stay, from the report's counts if it is that of the file as it is."""
    if report.get("sha256") == hash_file(path) and "token_counts" in report:
        gone = counter.lengths(pairs.to_records(train[kinds.notna()]))
        return reports.lengths_without(report["token_counts"], gone)
    return pd.DataFrame(counter.lengths(pairs.to_records(train[kinds.isna()])), columns=list(reports.PARTS))


def add_to_report(path: Path, entries: dict) -> None:
    """Adds entries to the report beside a pair file, in place of those of the same names."""
    reports.write_report(reports.read_report(path) | entries, path)

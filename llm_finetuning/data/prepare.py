"""The steps of the two data preparation notebooks: read, flatten, measure, write, and check for leaks."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from llm_finetuning import plotting, prompts
from llm_finetuning.data import figures, leaks, oasst, own_data, pairs, reports
from llm_finetuning.data.reading import sha256
from llm_finetuning.settings import DataPrep, split_names

FILES = {"train": "train_file", "validation": "val_file"}


@dataclass
class Prepared:
    """One split on its way to its file.

    lengths: token counts of every candidate before anything was cut or chosen; final_lengths: of `pairs`;
    columns prompt, history, response, total.
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
        """The pairs' file."""
        return getattr(self.settings.folders, FILES[self.split])

    def figure(self, name: str) -> Path:
        """The file of one of this split's plots."""
        return self.settings.folders.figures / f"data_{self.split}_{name}.png"


def read(settings: DataPrep, split: str) -> pd.DataFrame:
    """The messages of one split of the source, or its pairs if it is a file of pairs."""
    share = settings.validation_share
    files, _ = oasst.locate(settings.source, split, settings.source_revision)
    if own_data.is_pairs_file(files[0]):
        return own_data.read_pairs(files[0], split, settings.on_error, share)
    return oasst.read_messages(settings.source, split, settings.on_error, share, settings.source_revision)


def is_messages(source: pd.DataFrame) -> bool:
    return "parent_id" in source.columns


def prepare(settings: DataPrep, source: pd.DataFrame, template) -> Prepared:
    """Flattens and filters what `read` gave, as the settings say, and counts tokens on the way."""
    known: dict[tuple, dict] = {}
    candidates: list[dict] = []

    def fit(found: list[dict]) -> list[dict | None]:
        candidates.extend(found)
        return truncate_long(found, token_lengths(found, template, known), template, settings.max_seq_length)

    flat = flatten(settings, source, fit if settings.filters["drop_too_long"] == "yes" else None)
    final = token_lengths(pairs.to_records(flat.pairs), template, known)
    first = token_lengths(candidates, template, known) if candidates else final
    tables = [pd.DataFrame(rows, columns=list(reports.PARTS)) for rows in (first, final)]
    return Prepared(settings, source, flat.pairs, flat.funnel, *tables)


def token_lengths(found: list[dict], template, known: dict[tuple, dict]) -> list[dict]:
    """`prompts.lengths` of the pairs, of those in `known` (texts of a pair → its lengths) without counting again."""
    keys = [(p["prompt"], p["response"], *(turn["content"] for turn in p["history"])) for p in found]
    new = {key: pair for key, pair in zip(keys, found, strict=True) if key not in known}
    known.update(zip(new, prompts.lengths(list(new.values()), template), strict=True))
    return [known[key] for key in keys]


def truncate_long(candidates: list[dict], lengths: list[dict], template, max_length: int) -> list[dict | None]:
    """The pairs, those over `max_length` tokens cut by `prompts.truncate_histories`; None where that cannot help."""
    long = [place for place, row in enumerate(lengths) if row["total"] > max_length]
    fitted = list(candidates)
    for place, fit in zip(
        long, prompts.truncate_histories([candidates[p] for p in long], template, max_length), strict=True
    ):
        fitted[place] = fit.pair if fit.example else None
    return fitted


def flatten(settings: DataPrep, source: pd.DataFrame, fit=None) -> oasst.Flattened:
    """`oasst.flatten`, or `own_data.flatten_pairs` for ready-made pairs, with the settings' filters."""
    chosen = settings.filters
    common = {
        "languages": split_names(chosen["languages"]),
        "min_response_chars": chosen["min_response_chars"],
        "drop_duplicates": chosen["drop_duplicates"] == "yes",
        "near_duplicates": chosen["near_duplicates"],
        "fit": fit,
    }
    if not is_messages(source):
        return own_data.flatten_pairs(source, **common)
    switches = {name: chosen[name] == "yes" for name in ("drop_deleted", "drop_unreviewed", "drop_synthetic")}
    bounds = {
        name: chosen[name] if chosen[name] != off else None
        for name, off in (("min_quality", 0), ("max_toxicity", 1), ("max_detoxify", 1))
    }
    states = split_names(chosen["tree_states"])
    return oasst.flatten(source, settings.replies, tree_states=states, **switches, **bounds, **common)


def report(prepared: Prepared) -> dict:
    """Everything about one split that is worth keeping: where it comes from, what was lost, what is left."""
    settings, attrs = prepared.settings, prepared.source.attrs
    known = reports.known_answers(prepared.source) if is_messages(prepared.source) else None
    limit = settings.max_seq_length
    return {
        "source": {name: attrs[name] for name in ("source", "revision", "sha256", "split") if name in attrs},
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
    names = ("model_name", "tokenizer_folder", "system_message", "max_seq_length", "validation_share")
    return {name: getattr(settings, name) for name in names}


def write(prepared: Prepared) -> pd.DataFrame:
    """Writes the pairs and their report, reads the pairs back, and returns what was read.

    Raises ValueError if what was read back differs from what was prepared.
    """
    path = pairs.write_jsonl(prepared.pairs, prepared.path)
    back = pairs.read_jsonl(path)
    if pairs.to_records(back) != pairs.to_records(prepared.pairs):
        raise ValueError(f"{path} does not hold what was written to it. Write it again, on another disk.")
    reports.write_report({"file": path.name, "sha256": sha256(path)} | report(prepared), path)
    return back


def language_counts(report: dict) -> tuple[dict | None, dict]:
    """(messages per language of the source, pairs per language); no messages in a source of pairs."""
    return report["messages"] and report["messages"]["languages"], report["pairs"]["languages"]


def shapes(report: dict) -> dict[str, dict]:
    """{axis label: {value: count}} for `figures.shape`."""
    messages = report["messages"] or {}
    labels = {"depths": "depth of a message in its tree", "replies_per_prompt": "replies to a prompt"}
    panels = {label: messages[name] for name, label in labels.items() if name in messages}
    return panels | {"turns before a pair's prompt": report["pairs"]["turns_before"]}


def save_figures(prepared: Prepared) -> list[plotting.Figure]:
    """All four plots of a split, written to figures/ and returned for display."""
    found, name = report(prepared), prepared.split.capitalize()
    plots = {
        "funnel": figures.funnel(prepared.funnel, f"{name} split: what each step kept"),
        "languages": figures.languages(*language_counts(found), f"{name} split: languages"),
        "shape": figures.shape(shapes(found), f"{name} split: shape of the conversations"),
        "token_lengths": figures.token_lengths(
            prepared.lengths, prepared.settings.max_seq_length, f"{name} split: tokens before cutting"
        ),
    }
    return [plotting.save(figure, prepared.figure(plot)) for plot, figure in plots.items()]


def token_sentence(statistics: dict) -> str:
    """How much there is to train, in one line."""
    return (
        f"{statistics['pairs']:,} pairs, {statistics['tokens']:,} tokens, {statistics['share_trained']:.0%} "
        f"of them trained; {statistics['share_beyond']:.1%} of the pairs are longer than "
        f"{statistics['max_seq_length']:,} tokens."
    )


def known_sentence(report: dict) -> str:
    """Whether the counts are those that are known of the source."""
    known = report["known_answers"]
    if known is None:
        return f"Nothing is known beforehand about {report['source']['source']}."
    lines = [
        f"{name}: {row['found']:,} found, {row['expected']:,} known: {'same' if row['same'] else 'DIFFERENT'}"
        for name, row in known.items()
    ]
    return "\n".join(lines)


def leak_sentence(prepared: Prepared) -> str:
    """How many pairs the last check took out of the training file."""
    removed = reports.read_report(prepared.path)["leaks"]["removed_from_train"]
    left = len(pairs.read_jsonl(prepared.settings.folders.train_file))
    return f"{removed:,} pairs taken out of the training file, {left:,} left there; validation is unchanged."


def check_leaks(prepared: Prepared, template) -> pd.DataFrame:
    """Compares the validation pairs with the training file, both ways, and takes leaks out of the latter.

    Validation is never changed. The training file and its report are rewritten only if something was removed.
    Returns one row a kind of leak: how many training pairs, how many validation pairs. Raises
    FileNotFoundError when the training file has not been written yet.
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


def _rewrite_train(path, kept: pd.DataFrame, table: pd.DataFrame, template, settings: DataPrep) -> None:
    """The training file without the leaks, and its report brought up to date."""
    old = reports.read_report(path)
    before = old["pairs"]["pairs"]
    lengths = pd.DataFrame(prompts.lengths(pairs.to_records(kept), template), columns=list(reports.PARTS))
    step = {
        "step": "not in the validation file",
        "unit": "pair",
        "kept": len(kept),
        "dropped": before - len(kept),
    }
    pairs.write_jsonl(kept, path)
    new = {
        "sha256": sha256(path),
        "funnel": [*old["funnel"], step],
        "pairs": {"pairs": len(kept)} | reports.pair_counts(kept),
        "tokens": reports.token_statistics(lengths, settings.max_seq_length),
        "examples": reports.examples(kept),
        "leaks": {"found": table.to_dict(), "removed_from_train": before - len(kept)},
    }
    reports.write_report(old | new, path)


def _add_to_report(path, entries: dict) -> None:
    reports.write_report(reports.read_report(path) | entries, path)

"""Preference pairs: of siblings with ranks, or ready-made ones; to one prompt a chosen and a rejected response."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from llm_finetuning.data.comparisons import differ
from llm_finetuning.data.duplicates import like_earlier
from llm_finetuning.data.filters import Filters, Forest, speaks
from llm_finetuning.data.funnel import Funnel
from llm_finetuning.data.pairs import Rows, check, checked
from llm_finetuning.data.recipes import histories, prompters_of
from llm_finetuning.files.atomic import write_json_lines

UNIT = "preference pair"
SIDES = ("chosen", "rejected")
WAYS: dict[str, Callable[[list], Iterable[tuple]]] = {
    "best-worst": lambda ranked: [(ranked[0], ranked[-1])],
    "adjacent": pairwise,
    "all": lambda ranked: combinations(ranked, 2),
}
"""Which two of the replies to a prompt, from the best rank to the worst, make a preference."""


def of_siblings(pairs: list[dict], prompters: list[Hashable], way: str) -> tuple[list[dict], list[Hashable]]:
    """Returns (preference records of the candidates that have a rank, the prompter message of each).

    way: "best-worst" = to each prompt the best against the worst, "adjacent" = each rank against the next, "all" =
    each against every worse one. Replies of equal rank or equal text are no preference.
    """
    numbers: dict[Hashable, int] = {}
    owners = np.array([numbers.setdefault(prompter, len(numbers)) for prompter in prompters], dtype=np.int64)
    ranks = np.array([pair.get("rank") for pair in pairs], dtype=float)
    found = _better_and_worse(owners, ranks, [pair["response"] for pair in pairs], way)
    return [_record(pairs[better], pairs[worse]) for better, worse in found], [prompters[one] for one, _ in found]


def of_forest(forest: Forest, way: str) -> tuple[list[dict], list[Hashable]]:
    """Returns what `of_siblings` does of every reply that is left, where no pair has been made of them."""
    replies = forest.replies()
    if "" in (texts := forest["text"][replies].tolist()):
        replies = replies[[text != "" for text in texts]]
        texts = list(filter(None, texts))
    parents = forest.parents[replies]
    found = _better_and_worse(parents, forest.numbers("rank")[replies], texts, way)
    better, worse = np.array(found, dtype=np.int64).reshape(-1, 2).T
    asked, better, worse = parents[better], replies[better], replies[worse]
    columns = {
        "prompt": forest["text"][asked],
        "history": histories(forest, asked),
        "chosen": forest["text"][better],
        "rejected": forest["text"][worse],
        "lang": forest["lang"][better],
        "message_tree_id": forest["message_tree_id"][better],
        "chosen_id": forest["message_id"][better],
        "rejected_id": forest["message_id"][worse],
        "chosen_rank": forest["rank"][better],
        "rejected_rank": forest["rank"][worse],
    }
    return list(Rows(columns)), asked.tolist()


def _better_and_worse(
    owners: np.ndarray, ranks: np.ndarray, responses: Sequence[str], way: str
) -> list[tuple[int, int]]:
    """Returns (place of a better reply, of a worse one), by the first reply with a rank to the same prompt.

    owners: (N,) number of the prompt that each replies to. ranks: (N,) NaN where there is none.
    """
    if way not in WAYS:
        raise ValueError(f"preference_pairs = {way!r}: one of {', '.join(WAYS)}")
    places = np.flatnonzero(~np.isnan(ranks))
    if not len(places):
        return []
    ranked = places[np.lexsort((ranks[places], owners[places]))]
    starts = np.flatnonzero(np.diff(owners[ranked], prepend=-1))
    ends = np.append(starts[1:], len(ranked))
    several = ranks[ranked[starts]] < ranks[ranked[ends - 1]]
    by_first = np.argsort(np.minimum.reduceat(ranked, starts)[several])
    bounds = zip(starts[several][by_first].tolist(), ends[several][by_first].tolist(), strict=True)
    found, ranks = ranked.tolist(), ranks.tolist()
    pairs = chain.from_iterable(WAYS[way](found[start:end]) for start, end in bounds)
    return [
        (one, other) for one, other in pairs if ranks[one] < ranks[other] and differ(responses[one], responses[other])
    ]


def _record(better: dict, worse: dict) -> dict:
    """The preference record of two candidates; where one lost more turns than the other, both get its history."""
    return {
        "prompt": better["prompt"],
        "history": min(better["history"], worse["history"], key=len),
        "chosen": better["response"],
        "rejected": worse["response"],
        "lang": better.get("lang"),
        "message_tree_id": better.get("message_tree_id"),
        "chosen_id": better.get("message_id"),
        "rejected_id": worse.get("message_id"),
        "chosen_rank": better.get("rank"),
        "rejected_rank": worse.get("rank"),
    }


def _sides(record: dict) -> list[dict]:
    """The chosen and the rejected response of a record as two pairs."""
    shared = {name: record.get(name) for name in ("prompt", "lang", "message_tree_id")}
    shared["history"] = record.get("history") or []
    return [
        shared | {"response": record[side], "message_id": record.get(f"{side}_id"), "rank": record.get(f"{side}_rank")}
        for side in SIDES
    ]


def filter_ready(records: list[dict], filters: Filters, funnel: Funnel) -> list[dict]:
    """Applies the filters to ready-made records; one goes where either of its responses would."""
    sides = [_sides(record) for record in records]
    _step(funnel, "ready-made", sides)
    if languages := filters.languages:
        sides = [two for two in sides if speaks(two[0]["lang"], languages)]
        _step(funnel, f"language {', '.join(languages)}", sides)
    if shortest := filters.min_response_chars:
        sides = [two for two in sides if all(len(one["response"].strip()) >= shortest for one in two)]
        _step(funnel, f"responses of at least {shortest} characters", sides)
    if filters.truncate:
        cut = filters.truncate([one for two in sides for one in two])
        sides = [[*two] for two in zip(cut[::2], cut[1::2], strict=True) if None not in two]
        _step(funnel, "short enough in tokens", sides)
    if filters.drop_duplicates:
        chosen = [two[0] for two in sides]
        like = like_earlier(chosen, prompters_of(chosen), filters.near_duplicates or 0.0)
        sides = [two for two, one in zip(sides, like, strict=True) if one is None]
        _step(funnel, "prompt not seen before", sides)
    return [_record(*two) for two in sides if differ(two[0]["response"], two[1]["response"])]


def _step(funnel: Funnel, name: str, sides: list) -> None:
    funnel.step(name, UNIT, len(sides))


def write(records: list[dict], path: Path) -> Path | None:
    """Writes preference records as JSON lines, atomically; without any there is no file, and an old one goes."""
    for number, record in enumerate(records, 1):
        try:
            for side in _sides(record):
                check(side)
        except ValueError as error:
            raise ValueError(f"preference {number} for {path.name}: {error}") from error
    if not records:
        path.unlink(missing_ok=True)
        return None
    rows = ({name: value for name, value in record.items() if value is not None} for record in records)
    return write_json_lines(path, rows)


def read(path: Path) -> list[dict]:
    """Reads a file that `write` wrote; none gives no records. Raises ValueError with file and line for a broken one."""
    return checked(path, check_record) if path.exists() else []


def read_prepared(path: Path, part: str) -> list[dict]:
    """Returns the records of a file that a data preparation notebook wrote; part: "Training" or "Validation".

    Raises FileNotFoundError where there is none, ValueError with file and line for a record that is none.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise FileNotFoundError(
            f"{path} holds no preference pairs: they come of data in which people ranked several replies to a prompt"
            " (OASST1), or of chosen and rejected responses. Set source to such data in the Data Prep notebooks,"
            f" and run the one for {part.lower()} data"
        )
    return checked(path, check_record)


def check_record(record: dict) -> None:
    """Raises ValueError with the reason if a dictionary is not a preference record."""
    if missing := [name for name in ("prompt", "chosen", "rejected") if record.get(name) is None]:
        raise ValueError(f"{' and '.join(missing)} missing: a preference pair has prompt, chosen and rejected")
    for side, pair in zip(SIDES, _sides(record), strict=True):
        try:
            check(pair)
        except ValueError as error:
            raise ValueError(str(error).replace("response", f"{side} response")) from error
    if empty := [side for side in SIDES if not record[side].strip()]:
        raise ValueError(f"the {empty[0]} response is blank")
    if record["chosen"].strip() == record["rejected"].strip():
        raise ValueError(f"chosen and rejected are the same text ({record['chosen']!r:.60}): that is no preference")


def as_pairs(records: Iterable[dict]) -> pd.DataFrame:
    """Returns each response as a row with the columns that the leak check compares."""
    names = ("prompt", "history", "message_tree_id", "message_id")
    rows = [[side[name] for name in names] for record in records for side in _sides(record)]
    return pd.DataFrame(rows, columns=names, dtype=object)

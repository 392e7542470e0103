"""Preference pairs: of siblings with ranks, or ready-made ones; to one prompt a chosen and a rejected response."""

import json
from collections.abc import Hashable, Iterable
from itertools import combinations, pairwise
from pathlib import Path

import pandas as pd

from llm_finetuning.data.duplicates import like_earlier
from llm_finetuning.data.filters import Filters, speaks
from llm_finetuning.data.funnel import Funnel
from llm_finetuning.data.pairs import check, checked
from llm_finetuning.data.recipes import prompters_of
from llm_finetuning.data.shapes import differ
from llm_finetuning.files.atomic import write_json_lines

UNIT = "preference pair"
SIDES = ("chosen", "rejected")
WAYS = ("best-worst", "adjacent", "all")


def of_siblings(pairs: list[dict], prompters: list[Hashable], way: str) -> tuple[list[dict], list[Hashable]]:
    """Returns (preference records of the candidates that have a rank, the prompter message of each).

    way: "best-worst" = to each prompt the best against the worst, "adjacent" = each rank against the next, "all" =
    each against every worse one. Replies of equal rank or equal text are no preference.
    """
    if way not in WAYS:
        raise ValueError(f"preference_pairs = {way!r}: one of {', '.join(WAYS)}")
    siblings: dict[Hashable, list[dict]] = {}
    for pair, prompter in zip(pairs, prompters, strict=True):
        if pair.get("rank") is not None:
            siblings.setdefault(prompter, []).append(pair)
    records, owners = [], []
    for prompter, replies in siblings.items():
        ranked = sorted(replies, key=lambda pair: pair["rank"])
        found = {"all": combinations(ranked, 2), "adjacent": pairwise(ranked)}.get(way, [(ranked[0], ranked[-1])])
        for better, worse in found:
            if better["rank"] < worse["rank"] and differ(better["response"], worse["response"]):
                records.append(_record(better, worse))
                owners.append(prompter)
    return records, owners


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
    """Reads a file that `write` wrote; none gives no records."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


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

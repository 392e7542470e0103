"""What a data preparation says about itself: counts, token lengths, examples, known answers."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from llm_finetuning.data.oasst import flatten
from llm_finetuning.data.pairs import to_records, write_text

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
PARTS = ("prompt", "history", "response", "total")
PACKAGES = ("pandas", "pyarrow", "transformers", "datasketch")
EXAMPLES = 10

KNOWN = {
    ("OpenAssistant/oasst1", "train"): {
        "messages": 84437,
        "trees": 9846,
        "joined rows": 31525,
        "with a response": 20587,
    },
    ("OpenAssistant/oasst1", "validation"): {
        "messages": 4401,
        "trees": 518,
        "joined rows": 1645,
        "with a response": 1095,
    },
}
"""Counts of the dataset's revision of 2023, and of the original notebooks' rows made from it."""


def known_answers(messages: pd.DataFrame) -> pd.DataFrame | None:
    """Expected and found counts of a source whose counts are known (KNOWN), or None."""
    expected = KNOWN.get((messages.attrs["source"], messages.attrs["split"]))
    if expected is None:
        return None
    rows = flatten(messages, "joined").funnel.query("unit == 'pair'")["kept"].tolist()
    found = [len(messages), messages["message_tree_id"].nunique(), *rows]
    table = pd.DataFrame({"expected": expected, "found": dict(zip(expected, found, strict=True))})
    return table.assign(same=table["expected"] == table["found"])


def message_counts(messages: pd.DataFrame) -> dict[str, dict]:
    """Messages per language and per depth (0 = first prompt), and prompts per number of replies."""
    depths = message_depths(messages)
    prompts = messages.loc[messages["role"] == "prompter", "message_id"]
    replies = messages.loc[messages["role"] == "assistant", "parent_id"].value_counts()
    return {
        "languages": counts(messages["lang"]),
        "depths": counts(depths, by_size=False),
        "replies_per_prompt": counts(prompts.map(replies).fillna(0).astype(int), by_size=False),
    }


def message_depths(messages: pd.DataFrame) -> pd.Series:
    """(N,) steps from the first prompt of the tree; a parent stands before its replies."""
    depths: dict[str, int] = {}
    for message, parent in zip(messages["message_id"], messages["parent_id"], strict=True):
        depths[message] = depths.get(parent, -1) + 1
    return pd.Series(list(depths.values()), index=messages.index, dtype=int)


def pair_counts(pairs: pd.DataFrame) -> dict[str, dict]:
    """Pairs per language, and per number of turns before the prompt."""
    return {
        "languages": counts(pairs["lang"]),
        "turns_before": counts(pairs["history"].map(len), by_size=False),
    }


def counts(values: pd.Series, by_size: bool = True) -> dict:
    """{value: how often}, the most frequent first or in the order of the values; null is "unknown"."""
    found = values.astype(object).where(values.notna(), "unknown").value_counts()
    found = found if by_size else found.sort_index()
    return {str(value): int(number) for value, number in found.items()}


def token_statistics(lengths: pd.DataFrame, max_seq_length: int) -> dict:
    """Tokens of each of PARTS: mean, percentiles, maximum; share of pairs beyond the limit, share trained."""
    parts = {
        part: {"mean": round(float(lengths[part].mean()), 1)}
        | {f"p{p}": int(lengths[part].quantile(p / 100, interpolation="lower")) for p in PERCENTILES}
        | {"max": int(lengths[part].max())}
        for part in PARTS
    }
    return parts | {
        "pairs": len(lengths),
        "tokens": int(lengths["total"].sum()),
        "max_seq_length": max_seq_length,
        "share_beyond": round(float((lengths["total"] > max_seq_length).mean()), 4),
        "share_trained": round(float(lengths["response"].sum() / lengths["total"].sum()), 4),
    }


def token_table(statistics: dict) -> pd.DataFrame:
    """token_statistics as a table: one row a part, in tokens."""
    return pd.DataFrame.from_dict({part: statistics[part] for part in PARTS}, orient="index")


def random_pairs(pairs: pd.DataFrame, number: int = EXAMPLES) -> pd.DataFrame:
    """`number` pairs (or all, if fewer), the same at every call."""
    return pairs.sample(min(number, len(pairs)), random_state=0)


def examples(pairs: pd.DataFrame) -> list[dict]:
    return to_records(random_pairs(pairs))


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what comes out."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def report_path(pairs_path: Path) -> Path:
    """finetuning_data_train.jsonl → finetuning_data_train.report.json beside it."""
    return pairs_path.with_suffix(".report.json")


def read_report(pairs_path: Path) -> dict:
    """Raises FileNotFoundError when the file of pairs was not written by the data preparation."""
    if not report_path(pairs_path).exists():
        raise FileNotFoundError(
            f"{report_path(pairs_path).name} not found in {pairs_path.parent}. Run the notebook in Data Prep that "
            f"writes {pairs_path.name}; it writes the report too."
        )
    return json.loads(report_path(pairs_path).read_text(encoding="utf-8"))


def write_report(report: dict, pairs_path: Path) -> Path:
    path = report_path(pairs_path)
    write_text(path, json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    return path

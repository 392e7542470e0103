"""The report of a data preparation: counts, token lengths, examples, and counts known beforehand."""

import json
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from llm_finetuning.data.oasst import flatten
from llm_finetuning.data.pairs import to_records
from llm_finetuning.data.recipes import prompters_of
from llm_finetuning.files.atomic import write_json

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
    """Compares the counts of a source with those that are known beforehand (KNOWN); None if there are none."""
    expected = KNOWN.get((messages.attrs["source"], messages.attrs["split"]))
    if expected is None:
        return None
    rows = flatten(messages, "joined").funnel.query("unit == 'pair'")["kept"].tolist()
    found = [len(messages), messages["message_tree_id"].nunique(), *rows]
    table = pd.DataFrame({"expected": expected, "found": dict(zip(expected, found, strict=True))})
    return table.assign(same=table["expected"] == table["found"])


def message_counts(messages: pd.DataFrame) -> dict[str, dict]:
    """Counts messages per language and per depth (0 = first prompt), and prompts per number of replies."""
    depths = message_depths(messages)
    prompts = messages.loc[messages["role"] == "prompter", "message_id"]
    replies = messages.loc[messages["role"] == "assistant", "parent_id"].value_counts()
    return {
        "languages": counts(messages["lang"]),
        "depths": counts(depths, by_size=False),
        "replies_per_prompt": counts(prompts.map(replies).fillna(0).astype(int), by_size=False),
    }


def message_depths(messages: pd.DataFrame) -> pd.Series:
    """Returns (N,) steps from the first prompt of the tree; a parent stands before its replies."""
    depths: dict[str, int] = {}
    for message, parent in zip(messages["message_id"], messages["parent_id"], strict=True):
        depths[message] = depths.get(parent, -1) + 1
    return pd.Series(list(depths.values()), index=messages.index, dtype=int)


def shape(source: pd.DataFrame, pairs: pd.DataFrame, funnel: pd.DataFrame) -> dict[str, dict]:
    """Returns {axis label: {"in the source" or "after the filters": {value: count}}} for `figures.shape`.

    Both count the same things: prompts by the turns before them, and prompts by their replies.
    """
    before, after = "in the source", "after the filters"
    left = pd.Series(funnel.attrs["replies_left"], dtype=int)
    replies = {str(number): int(prompts) for number, prompts in left.sort_index().items()}
    if "parent_id" in source.columns:
        depths = message_depths(source)
        asked = pd.Series(depths.to_numpy(), index=source["message_id"])
        of_pairs = asked.reindex(pairs["message_id"])
        of_pairs = of_pairs - of_pairs % 2  # a reply stands one below its prompt
        turns = {
            before: counts(depths[source["role"] == "prompter"], False),
            after: counts(of_pairs.astype(int), False),
        }
        siblings = {before: message_counts(source)["replies_per_prompt"], after: replies}
    else:
        turns = {name: pair_counts(frame)["turns_before"] for name, frame in ((before, source), (after, pairs))}
        same = pd.Series(prompters_of(to_records(source)), dtype=object).value_counts()
        siblings = {before: counts(same, False), after: replies}
    return {"turns before a prompt": turns, "replies to a prompt": siblings}


def without_pair(funnel: pd.DataFrame) -> dict[str, int]:
    """Returns {the step at which a prompt lost its last reply: number of prompts}, the most frequent first."""
    losses = {step: number for step, number in funnel.attrs["without_reply"].items() if number}
    return dict(sorted(losses.items(), key=lambda item: -item[1]))


def pair_counts(pairs: pd.DataFrame) -> dict[str, dict]:
    """Counts pairs per language, and per number of turns before the prompt."""
    return {
        "languages": counts(pairs["lang"]),
        "turns_before": counts(pairs["history"].map(len), by_size=False),
    }


def counts(values: pd.Series, by_size: bool = True) -> dict:
    """Counts each value, the most frequent first or in the order of the values; null is "unknown"."""
    numbers = values.astype(object).where(values.notna(), "unknown").value_counts()
    numbers = numbers if by_size else numbers.sort_index()
    return {str(value): int(number) for value, number in numbers.items()}


def token_statistics(lengths: pd.DataFrame, max_seq_length: int) -> dict:
    """Returns mean, percentiles and maximum of the tokens of each of PARTS, and the shares too long and in the loss."""
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


def token_counts(lengths: pd.DataFrame) -> dict[str, dict]:
    """Returns {part: {tokens: number of pairs}}, from which `lengths_without` goes on after some pairs left."""
    return {part: counts(lengths[part], by_size=False) for part in PARTS}


def lengths_without(counted: dict[str, dict], gone: list[dict]) -> pd.DataFrame:
    """Returns the token counts that `token_counts` counted, sorted in each column, without those of some pairs."""
    columns = {}
    for part in PARTS:
        left = Counter({int(tokens): number for tokens, number in counted[part].items()})
        left.subtract(length[part] for length in gone)
        columns[part] = sorted(left.elements())
    return pd.DataFrame(columns, columns=list(PARTS))


def token_table(statistics: dict) -> pd.DataFrame:
    """Puts `token_statistics` into a table: one row for each part, in tokens."""
    return pd.DataFrame.from_dict({part: statistics[part] for part in PARTS}, orient="index")


def random_pairs(pairs: pd.DataFrame, number: int = EXAMPLES) -> pd.DataFrame:
    """Returns `number` random pairs (or all, if fewer), the same at every call."""
    return pairs.sample(min(number, len(pairs)), random_state=0)


def examples(pairs: pd.DataFrame) -> list[dict]:
    """Returns the random pairs that a report quotes."""
    return to_records(random_pairs(pairs))


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the result."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def report_path(pairs_path: Path) -> Path:
    """Returns the report's path: finetuning_data_train.jsonl → finetuning_data_train.report.json beside it."""
    return pairs_path.with_suffix(".report.json")


def read_report(pairs_path: Path) -> dict:
    """Reads the report of a file of pairs; raises FileNotFoundError if the data preparation did not write that file."""
    if not report_path(pairs_path).exists() or not report_path(pairs_path).stat().st_size:  # not uploaded to its end
        raise FileNotFoundError(
            f"{report_path(pairs_path).name} not found in {pairs_path.parent}. Run the notebook in Data Prep that "
            f"writes {pairs_path.name}; it writes the report too."
        )
    return json.loads(report_path(pairs_path).read_text(encoding="utf-8"))


def write_report(report: dict, pairs_path: Path) -> Path:
    """Writes the report beside its file of pairs, and returns the report's path."""
    return write_json(report_path(pairs_path), report, indent=2)

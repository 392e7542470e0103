"""What the model card says about the data: from the reports that data preparation left beside the pairs."""

import json
from pathlib import Path

from llm_finetuning.files.checksums import hash_file

LICENCES = {
    "OpenAssistant/oasst1": "Apache-2.0",
    "OpenAssistant/oasst2": "Apache-2.0",
    "sample": "Apache-2.0",
}
LANGUAGES_SHOWN = 5


def data_facts(train_file: str | Path, val_file: str | Path) -> dict:
    """`facts["data"]` of `model_card.write`: source, revision, licence, languages, and counts of both splits.

    A file without its `*.report.json` (pairs of one's own) is described by its count and hash alone.
    """
    train, val = _report(Path(train_file)), _report(Path(val_file))
    source = train.get("source", {})
    name = source.get("source")
    languages = [code for code in train.get("pairs", {}).get("languages", {}) if code != "unknown"]
    facts = {
        "source": name,
        "revision": source.get("revision") or source.get("sha256"),
        "licence": LICENCES.get(name),
        "languages": languages,
        "train": _counts(Path(train_file), train),
        "val": _counts(Path(val_file), val),
    }
    return {key: value for key, value in facts.items() if value}


def _report(pairs_file: Path) -> dict:
    path = pairs_file.with_suffix(".report.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _counts(pairs_file: Path, report: dict) -> dict:
    """Rows for the card: pairs, tokens, languages, how replies were chosen, the file's hash."""
    with open(pairs_file, encoding="utf-8") as file:
        counts = {"pairs": sum(1 for line in file if line.strip())}
    tokens, recipe = report.get("tokens", {}), report.get("recipe", {})
    languages = list(report.get("pairs", {}).get("languages", {}).items())
    if tokens:
        counts |= {"tokens": tokens["tokens"], "tokens trained": f"{tokens['share_trained']:.0%}"}
    if languages:
        counts["languages"] = ", ".join(f"{code} {count:,}" for code, count in languages[:LANGUAGES_SHOWN])
    if recipe:
        counts["replies"] = recipe["replies"]
    return counts | {"SHA-256": hash_file(pairs_file)}

"""An evaluation in the model card of a folder that is published already."""

import os
import re
from pathlib import Path

from llm_finetuning.evaluation import candidates, report
from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import write_text
from llm_finetuning.files.checksums import CARD
from llm_finetuning.settings import Folders

BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def add_to_measured(folders: Folders, record: dict[str, dict]) -> list[Path]:
    """Writes the figures into the card of each model trained here that was measured; returns the cards."""
    known = {name: folder for name, folder in candidates.trained_here(folders).items() if folder.is_dir()}
    return [add_evaluation(folder, record) for name, folder in known.items() if record.keys() & {name, folder.name}]


def add_evaluation(folder: str | Path, record: dict[str, dict]) -> Path:
    """Writes the figures of evaluation.json into the model card of `folder`, in place of earlier ones.

    The folder matches its SHA256SUMS at every moment: the card's line goes before the card changes, and comes back
    after it. The list keeps its time, since GGUF files beside it that are older count as another model's.
    Raises what `checksums.verify_checksums` raises for a folder that is not whole.
    """
    folder = Path(folder)
    listed, time = checksums.verify_checksums(folder), (folder / checksums.NAME).stat().st_mtime_ns
    card = (folder / CARD).read_text(encoding="utf-8")
    card = re.sub(rf"\n*{BEGIN}.*?{END}\n*", "\n", card, flags=re.DOTALL).rstrip("\n")
    checksums.write_listed(folder, {name: sha256 for name, sha256 in listed.items() if name != CARD})
    write_text(folder / CARD, f"{card}\n\n{section(record)}\n")
    os.utime(checksums.write_listed(folder, listed | {CARD: checksums.hash_file(folder / CARD)}), ns=(time, time))
    return folder / CARD


def section(record: dict[str, dict]) -> str:
    """The evaluation as Markdown: figures down, models across, each with its 95% interval."""
    rows = report.table(record)
    lines = [f"|  | {' | '.join(rows.columns)} |", f"| --- |{' --- |' * len(rows.columns)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in zip(rows.index, rows.values, strict=True)]
    about = (
        "All models on the same held-out conversations, with 95% intervals; n counts pairs, questions or ranked pairs."
        " `rank_agreement` is the share of ranked replies in which the one that people preferred has the higher"
        " likelihood per token, `generic_loss` the loss on text that finetuning does not teach, `other_languages_loss`"
        " that on replies in languages that it does not teach."
    )
    return "\n".join([BEGIN, "## Evaluation", "", about, "", *lines, END])

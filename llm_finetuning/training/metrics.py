"""metrics.jsonl, the record of a run by step, and what was predicted of it beside what was measured."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from llm_finetuning import hardware
from llm_finetuning.files.atomic import write_text
from llm_finetuning.files.copying import is_full
from llm_finetuning.files.drive import make_parent
from llm_finetuning.training import planning

if TYPE_CHECKING:
    from llm_finetuning.training.selfcheck import Checks


class Metrics:
    """metrics.jsonl: training entries (`loss`, …) and evaluations (`held_out_loss`, `answers`) by step."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[dict] = []
        """Entries that a full disk did not take."""

    def write(self, entry: dict) -> None:
        """Appends an entry. One that a full disk does not take waits for the next; training goes on."""
        make_parent(self.path)
        self.waiting.append(entry)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(map(self.line, self.waiting))
        except OSError as error:
            if not is_full(error):
                raise
            if len(self.waiting) == 1:
                print(f"{self.path} cannot be written ({error.strerror}): its entries wait in memory")
            os.truncate(self.path, size)
        else:
            self.waiting.clear()

    @staticmethod
    def line(entry: dict) -> str:
        return json.dumps(entry, ensure_ascii=False) + "\n"

    def read(self) -> list[dict]:
        """Every whole entry; a last line that was cut off with the machine is left out."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = text.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")] + self.waiting

    def evaluations(self, figure: str = "held_out_loss") -> list[tuple[float, int]]:
        """(figure, step) of every evaluation."""
        return [(entry[figure], entry["step"]) for entry in self.read() if figure in entry]

    def cut_after(self, step: int, held_out_changed: bool = False) -> None:
        """Forgets what came after the checkpoint that a run goes on from; all of it for a fresh start.

        Evaluations too where they were on another held-out set: they do not compare.
        """
        kept = [entry for entry in self.read() if entry["step"] <= step and step > 0]
        if held_out_changed:
            kept = [entry for entry in kept if "held_out_loss" not in entry]
        write_text(self.path, "".join(map(self.line, kept)))


def evaluation_share(board: dict, entries: list[dict]) -> str:
    """What the evaluations took, the scoreboard's and those while training, as a share of the training's time."""
    seconds = {name: scores["seconds"] for name, scores in board.items() if "seconds" in scores}
    watched = [entry["evaluation_seconds"] for entry in entries if "evaluation_seconds" in entry]
    trained = sum(entry["seconds"] for entry in entries if "tokens_per_second" in entry)
    whole = sum(seconds.values()) + sum(watched)
    share = f", {whole / trained:.0%} of the training's {hardware.readable_seconds(trained)}" if trained else ""
    parts = [f"{name} {hardware.readable_seconds(value)}" for name, value in seconds.items()]
    parts.append(f"{len(watched)} while training {hardware.readable_seconds(sum(watched))}")
    return f"evaluation took {hardware.readable_seconds(whole)}{share} ({', '.join(parts)})"


def predicted_and_measured(plan: planning.Plan, checks: "Checks", entries: list[dict]) -> pd.DataFrame:
    """Memory and time of the run: planned before the start, predicted after the self-check, measured."""
    trained = [entry for entry in entries if "tokens_per_second" in entry]
    seconds = sum(entry["seconds"] for entry in trained)
    peak = max((entry["memory_bytes"] for entry in trained), default=0)
    rows = [
        ("time", plan.seconds, checks.seconds, seconds, hardware.readable_seconds),
        ("peak memory", plan.peak_memory, checks.memory, peak, hardware.as_gib),
    ]
    return pd.DataFrame(
        [
            {
                "what": what,
                "plan": show(planned),
                "self-check": show(checked),
                "measured": show(measured),
                "measured / plan": round(measured / planned, 2),
                "measured / self-check": round(measured / checked, 2),
            }
            for what, planned, checked, measured, show in rows
        ]
    )

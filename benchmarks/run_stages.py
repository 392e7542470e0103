"""What the time of a finished run went to: read from its executed notebooks, and from when its processes loaded
libraries."""

import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import measuring

from llm_finetuning.runner.steps import NAMED

STAGES = (
    ("data", "training-data", ""),
    ("data", "validation-data", ""),
    ("making the base and the plan", "finetuning", "plan_run("),
    ("self-check", "finetuning", "selfcheck.run("),
    ("training", "finetuning", "train(trainer"),
    ("measuring before, after and merged", "finetuning", "scoreboard."),
    ("merge and verification", "finetuning", "merge_and_verify("),
    ("publishing", "finetuning", "publish("),
    ("answers", "inference", ""),
)
"""Stage, notebook, and what its cells call; "" = all of them. A cell belongs to the first that fits."""
LOADING, REST = "loading libraries", "the rest"
Span = tuple[float, float]
"""Begin and end, in seconds since 1970."""


def clocked(log: Path) -> dict[str, str]:
    """The environment of a process that writes to `log` when it, and those it starts, load libraries."""
    path = os.pathsep.join(filter(None, [str(measuring.HERE / "import_clock"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "IMPORT_CLOCK": str(log)}


def seconds(output: Path, log: Path, whole: float) -> dict[str, float]:
    """{stage: seconds} of the run in `output` that took `whole` seconds; they add up to it."""
    loading = united([span for _, span in loads(log)])
    found = {LOADING: length(loading)}
    for stage, span in cells(output):
        found[stage] = found.get(stage, 0.0) + length([span]) - length(within(loading, span))
    return found | {REST: whole - sum(found.values())}


def cells(output: Path) -> Iterator[tuple[str, Span]]:
    """Yields the stage and the span of each cell that belongs to one."""
    for name, step in NAMED.items():
        path = output / "notebooks" / step.notebook.name
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []:
            ran, source = cell["metadata"].get("papermill", {}), "".join(cell["source"])
            stage = next((stage for stage, notebook, call in STAGES if notebook == name and call in source), None)
            if stage and cell["cell_type"] == "code" and ran.get("end_time"):
                yield stage, (stamp(ran["start_time"]), stamp(ran["end_time"]))


def stamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def loads(log: Path) -> list[tuple[str, Span]]:
    """Which modules were loaded and when, in all processes that wrote to `log`."""
    lines = [line.split() for line in log.read_text(encoding="utf-8").splitlines()]
    return [(name, (float(begun), float(begun) + float(seconds))) for begun, seconds, name in lines]


def united(spans: list[Span]) -> list[Span]:
    """The same time in spans that do not overlap, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def within(spans: list[Span], whole: Span) -> list[Span]:
    """The parts of `spans` that lie in `whole`."""
    cut = [(max(begin, whole[0]), min(end, whole[1])) for begin, end in spans]
    return [(begin, end) for begin, end in cut if begin < end]


def length(spans: list[Span]) -> float:
    return sum(end - begin for begin, end in spans)

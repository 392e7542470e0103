"""What gpu.py would write on a GPU that is not here: part by part, with the time that the notebook's plan predicts."""

from functools import cache
from pathlib import Path

import gpu_checks
import gpu_variants
import inference
import merge
import peers
import scaling
import shapes
import training_runs
from scaling import SHEETS

from llm_finetuning.training import planning

UNKNOWN = "not predicted"


def table(size: str, gpu: str, seconds: float) -> str:
    """Markdown: each part, what it writes, how often it loads the base, and predicted seconds of training.

    seconds: measured per variant and per peer. Loading, merging and answering are not predicted: nobody measured them
    on a GPU yet.
    """
    sheet = next(sheet for sheet in SHEETS if sheet.name == gpu)
    rows = [*checks(size, sheet), *variants(size, sheet, seconds), *others(), *beside(size, sheet, seconds)]
    known = sum(entry[-1] for entry in rows if isinstance(entry[-1], float))
    loads = sum(entry[2] for entry in rows)
    head = f"On a {gpu} by its data sheet: {known:.0f} s of training, and {loads} times the base is loaded beside.\n\n"
    shown = [[*map(str, entry[:-1]), as_text(entry[-1])] for entry in rows]
    return head + scaling.table(["part", "what is written", "loads", "training, predicted"], shown)


def as_text(seconds: float | str) -> str:
    return seconds if isinstance(seconds, str) else f"{seconds:.1f} s"


def checks(size: str, sheet: scaling.Sheet) -> list[list]:
    """The parts that say whether it is right."""
    step, run = step_seconds(size, sheet, {}), gpu_checks.STEPS
    return [
        ["attention", "largest relative error of the kernel", 0, UNKNOWN],
        ["packing", "relative errors of the loss and the gradients, packed and padded against alone", 2, UNKNOWN],
        ["notebook", "difference of a resumed adapter, and of two; merge: time and losses", 3, times(step, 2 * run)],
    ]


def variants(size: str, sheet: scaling.Sheet, seconds: float) -> list[list]:
    """Each variant: its warm-up, the time that is measured, and the step that is under way when it is over."""
    what = "tokens/s, rows/s, memory, MFU, planned: "
    return [
        ["variants", what + name, 1, measured(step_seconds(size, sheet, changes), size, seconds)]
        for name, changes in gpu_variants.VARIANTS.items()
    ]


def others() -> list[list]:
    """The parts that are programs of their own: each turn of theirs has a process, which loads the base."""
    merges = len(merge.SIDES) * merge.GPU_ROUNDS
    answers = 2 * inference.GPU_ROUNDS["sides"] + 1  # side by side all in one process
    return [
        ["merge", "time and memory of PEFT's merge and of ours", merges, UNKNOWN],
        ["inference", "tokens/s and memory of the original's pipeline and of ours, side by side too", answers, UNKNOWN],
    ]


def beside(size: str, sheet: scaling.Sheet, seconds: float) -> list[list]:
    what = "tokens/s, rows/s, memory: "
    ours = measured(step_seconds(size, sheet, {}), size, seconds)
    named = [["peers", f"{what}{name}, losses", 1, f"{seconds:g} s and a warm-up"] for name in peers.PEERS]
    return [["peers", what + peers.OURS, 1, ours], *named]


def measured(step: float | str, size: str, seconds: float) -> float | str:
    return step if isinstance(step, str) else (gpu_variants.WARM_UP[size] + 1) * step + seconds


def times(step: float | str, count: float) -> float | str:
    return step if isinstance(step, str) else count * step


def step_seconds(size: str, sheet: scaling.Sheet, changes: dict) -> float | str:
    """Of an optimizer step as the plan predicts it on that GPU, or why there is none."""
    nowhere = Path("nowhere")
    chosen = training_runs.settings_for(nowhere, nowhere, gpu_variants.settings_of(changes, size))
    try:
        plan = planning.plan(chosen, scaling.machine_of(sheet), shapes.config(size), lengths(size))
    except ValueError as error:
        return f"cannot run: {str(error)[:80]}"
    return plan.seconds / plan.steps


@cache
def lengths(size: str) -> list[int]:
    """Tokens of each row that every variant trains."""
    return gpu_variants.rows_for(size, gpu_variants.ROWS[size]).lengths

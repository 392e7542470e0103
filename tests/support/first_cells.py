"""The finetuning notebook's cells before its base is loaded: which of them says what is wrong, and with which words."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_fixtures import SMALL, small_pairs, write_lines

from llm_finetuning import settings
from llm_finetuning.training import planning, qlora
from llm_finetuning.training.dataset import read_inputs


def check_stop(
    folder: Path,
    base: Path,
    changed: dict,
    cell: str,
    words: str,
    monkeypatch,
    change: Callable[[Path], object] | None = None,
) -> None:
    """Runs the cells on `base` with other settings and, after `change`, other files: `cell` must say `words` (a regex).

    What it says is no error of another library. `-s` prints it as a row of a table.
    """
    for name in ("train", "val"):
        write_lines(folder / "data" / f"finetuning_data_{name}.jsonl", small_pairs())
    if change:
        change(folder)
    monkeypatch.setattr(qlora, "load_base", lambda *_: pytest.fail("the base was loaded"))
    begun, found = time.perf_counter(), []
    with pytest.raises(Exception) as raised:
        for name in run(folder, base, changed):
            found.append(name)
    message = " ".join(str(raised.value).replace(str(folder), "…").split())
    print(f"\n| {found[-1]} | {time.perf_counter() - begun:.1f} s | {raised.type.__name__}: {message[:300]} |")
    assert raised.type in (ValueError, FileNotFoundError, OSError, ConnectionError), "a library's error"
    assert re.search(f"(?s){words}", str(raised.value))
    assert found[-1] == cell


def run(folder: Path, base: Path, changed: dict):
    """Yields the name of each cell before it is run."""
    folders = {"drive_folder": str(folder), "work_folder": str(folder), "model_name": str(base)}
    yield "settings"
    chosen = settings.from_cell(settings.Finetuning, SMALL | folders | changed)
    yield "pairs"
    inputs = read_inputs(chosen)
    yield "plan"
    planning.plan_run(chosen, inputs)
    yield "none"

"""What the first minutes are measured with: the clock of imports, the stages of a run, and what the README says."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pytest

from llm_finetuning.runner.steps import NAMED

ROOT = Path(__file__).parents[1]
SLOW = 0.1
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


@pytest.fixture
def stages(monkeypatch):
    """benchmarks/run_stages.py, as its programs import it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import run_stages

    return run_stages


MODULES = {"leaf": "", "branch": "import leaf", "lazy": "", "broken": "import nowhere_to_be_found"}
"""Modules that take SLOW seconds to load, and what they load then."""


def imported(stages, folder: Path, code: str) -> list[tuple[str, float]]:
    """The clock's names and seconds of MODULES in a process that runs `code` beside them."""
    for name, inside in MODULES.items():
        (folder / f"{name}.py").write_text(f"import time\ntime.sleep({SLOW})\n{inside}\n", encoding="utf-8")
    log = folder / "log"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=stages.clocked(log), check=True)
    return [(name, end - begin) for name, (begin, end) in stages.loads(log) if name in MODULES]


THREADS = "import threading\nfor name in 'leaf', 'lazy': threading.Thread(target=__import__, args=[name]).start()"
FAILS = "import contextlib\nwith contextlib.suppress(ImportError): import broken\nimport leaf"


@pytest.mark.parametrize(
    ("code", "loads"),
    [
        ("import leaf", {"leaf": 1}),
        ("import branch", {"branch": 2}),  # what it imports is part of it, once
        ("import leaf, branch", {"leaf": 1, "branch": 1}),
        ("import importlib; importlib.import_module('lazy'); import leaf", {"lazy": 1, "leaf": 1}),
        ("import leaf, leaf", {"leaf": 1}),
        (THREADS, {"leaf": 1, "lazy": 1}),
        (FAILS, {"broken": 1, "leaf": 1}),
        ("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import leaf'], check=True)", {"leaf": 1}),
        ("import leaf, os; os._exit(0)", {"leaf": 1}),
    ],
    ids=["one", "nested", "two", "importlib", "twice", "threads", "one that fails", "a child", "no orderly end"],
)
def test_the_clock_counts_each_import_once(stages, tmp_path, code, loads):
    found = imported(stages, tmp_path, code)
    assert sorted(name for name, _ in found) == sorted(loads)
    assert all(seconds >= SLOW * loads[name] for name, seconds in found)


def executed(folder: Path, name: str, *cells: tuple[str, float, float]) -> None:
    """A notebook of the house as papermill leaves it; each cell with its source, begin and end in seconds from noon."""
    made = []
    for source, begin, end in cells:
        stamps = {
            key: datetime.fromtimestamp(NOON + at, UTC).isoformat()
            for key, at in (("start_time", begin), ("end_time", end))
        }
        made.append(nbformat.v4.new_code_cell(source, metadata={"papermill": stamps}))
    made.append(nbformat.v4.new_code_cell("never_run()"))
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made), folder / "notebooks" / NAMED[name].notebook.name)


def test_the_stages_of_a_run_add_up_to_it(stages, tmp_path):
    executed(tmp_path, "training-data", ("anything", 1, 3))
    executed(tmp_path, "finetuning", ("plan = plan_run(settings, inputs)", 5, 25), ("train(trainer, board)", 25, 65.5))
    executed(tmp_path, "inference", ("chat", 70, 71))
    log = tmp_path / "log"
    log.write_text("".join(f"{NOON + at} {seconds} name\n" for at, seconds in ((0, 2), (1.5, 1), (24, 2), (69.5, 1))))
    found = stages.seconds(tmp_path, log, 80.0)
    assert sum(found.values()) == pytest.approx(80)
    named = {name: round(seconds, 3) for name, seconds in found.items() if name != stages.REST}
    assert named == {
        stages.LOADING: 5.5,  # 0 to 2.5, 24 to 26, 69.5 to 70.5
        "data": 0.5,
        "making the base and the plan": 19,
        "training": 39.5,
        "answers": 0.5,
    }


def test_every_stage_is_found_in_the_notebooks_of_the_house(stages):
    """A stage that no cell calls any more would be measured as nothing."""
    for stage, name, call in stages.STAGES:
        sources = [cell.source for cell in nbformat.read(NAMED[name].notebook, 4).cells if cell.cell_type == "code"]
        assert any(call in source for source in sources), stage


def report(**figures: float) -> dict:
    """A results file with these medians."""
    entries = [{"name": name, "median": value, "low": 0.1, "high": 0.3, "n": 9} for name, value in figures.items()]
    return {"machine": {"name": "M, 2 cores"}, "figures": entries}


def test_the_readme_says_what_was_measured_and_nothing_of_what_was_not(stages):
    import sentences

    scores = {f"make run: scoreboard, loss, {column}": 0.119 for column in sentences.COLUMNS}
    assert sentences.make_run([report()]) == sentences.make_rehearse([report()]) == ""
    text = sentences.make_run([report(**scores)])
    assert "| loss on responses, nats per token | 0.119 | 0.119 | 0.119 |" in text and "`make run`" not in text
    run = {"make run: the whole run": 161.0, "make run: peak memory of its largest process": 1.24}
    run |= {"make run: stage, training": 80.5, "make run: stage, data": 16.1, "make run: stage, publishing": 1.0}
    text = sentences.make_run([report(**run)])
    assert "2 min 41 s" in text and "1.2 GB" in text and "training (50%), data (10%)" in text
    assert "publishing" not in text and "installation" not in text
    text = sentences.make_run([report(**run, **{"installation: time": 77.0, "installation: disk": 2.41})])
    assert "1 min 17 s, 2.4 GB" in text

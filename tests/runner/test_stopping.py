"""Signals at a run: one line, exit code 130, a checkpoint first if training runs, and no process is left."""

import os
import signal
import subprocess
import time

import pytest
from terminal_runs import alive, started, wait_for

from llm_finetuning.runner import stopping

MORE = pytest.mark.more
CELL = 'drive_folder = ""'
IDS = """import os, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(drive_folder, "ids.part").write_text(f"{os.getpid()} {child.pid}")
os.rename(Path(drive_folder, "ids.part"), Path(drive_folder, "ids"))
"""
STUBBORN = """while True:
    try:
        Path(drive_folder, "loops").touch()
        time.sleep(600)
    except KeyboardInterrupt:
        Path(drive_folder, "refused").touch()
"""
TRAINING = """import signal
def train(steps):
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    Path(drive_folder, "trains").touch()
    for step in range(steps):
        time.sleep(0.1)
        if told:
            raise KeyboardInterrupt(f"stopped by SIGTERM; checkpoint-{step + 1000} is saved, run again to go on")
train(6000)
"""
LINE = "Stopped; the same command goes on.\n"
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture
def ids(tmp_path):
    """ids() → the kernel and a process that it started, as soon as a cell runs."""

    def read() -> list[int]:
        wait_for((tmp_path / "out" / "ids").exists)
        return [int(number) for number in (tmp_path / "out" / "ids").read_text().split()]

    return read


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=MORE), pytest.param(signal.SIGHUP, marks=MORE)],
    ids=lambda number: number.name,
)
def test_a_signal_ends_a_run_with_one_line_and_leaves_no_process(make_notebook, tmp_path, ids, number):
    notebook = make_notebook("sleeps", CELL, IDS, "time.sleep(600)")
    with started(tmp_path / "out", notebook, **PIPES) as run:
        processes = ids()
        run.send_signal(number)
        out, err = run.communicate()
    assert (run.returncode, err) == (130, LINE)
    assert "Traceback" not in out
    wait_for(lambda: not any(map(alive, processes)))
    assert (tmp_path / "out" / "notebooks" / "sleeps.html").exists()


def test_before_the_first_cell_and_between_notebooks_it_is_the_same(make_notebook, tmp_path):
    with started(tmp_path / "out", make_notebook("a", CELL, "1"), **PIPES) as run:
        wait_for((tmp_path / "out" / "notebooks").exists)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate()
    assert (run.returncode, err) == (130, LINE)


@pytest.mark.parametrize(
    "patience", [0.2, pytest.param(600, marks=MORE)], ids=["after a while", "at the second signal"]
)
def test_a_cell_that_does_not_stop_is_killed(make_notebook, tmp_path, ids, patience):
    notebook = make_notebook("stubborn", CELL, IDS, STUBBORN)
    with started(tmp_path / "out", notebook, patience=patience, **PIPES) as run:
        processes = ids()
        wait_for((tmp_path / "out" / "loops").exists)  # before it the cell would stop at once
        run.send_signal(signal.SIGINT)
        if patience > 1:
            wait_for((tmp_path / "out" / "refused").exists)
            time.sleep(stopping.ONE_REQUEST)
            run.send_signal(signal.SIGINT)
        _, err = run.communicate()
    assert (run.returncode, err) == (130, LINE)
    wait_for(lambda: not any(map(alive, processes)))


def test_training_saves_a_checkpoint_first_whatever_signals_come_together(make_notebook, tmp_path, ids):
    with started(tmp_path / "out", make_notebook("trains", CELL, IDS, TRAINING), patience=0, **PIPES) as run:
        processes = ids()
        wait_for((tmp_path / "out" / "trains").exists)
        for number in stopping.SIGNALS:  # all at once, as where a terminal is closed
            run.send_signal(number)
        _, err = run.communicate()
    assert run.returncode == 130
    assert err.startswith("Stopped at checkpoint-1") and len(err.splitlines()) == 1
    wait_for(lambda: not any(map(alive, processes)))


@MORE
def test_a_run_that_is_killed_takes_its_kernel_along(make_notebook, tmp_path, ids):
    with started(tmp_path / "out", make_notebook("sleeps", CELL, IDS, "time.sleep(600)"), **PIPES) as run:
        kernel, child = ids()
        run.kill()
        wait_for(lambda: not alive(kernel))
        os.kill(child, signal.SIGKILL)  # of the test, which nothing but its group could end


@MORE
def test_a_run_whose_lines_nobody_reads_any_more_is_hung_up(make_notebook, tmp_path, ids):
    notebook = make_notebook("sleeps", CELL, IDS, "time.sleep(600)")
    with started(tmp_path / "out", notebook, every=0.2, **PIPES) as run:
        processes = ids()
        run.stdout.close()
        assert run.stderr.read() == LINE
        assert run.wait() == 130
    wait_for(lambda: not any(map(alive, processes)))


@MORE
def test_a_signal_that_was_ignored_stays_ignored(make_notebook, tmp_path):
    notebook = make_notebook("goes on", CELL, IDS, "time.sleep(2)", "child.kill()")
    script = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}  # as nohup does
    with started(tmp_path / "out", notebook, **PIPES, **script) as run:
        wait_for((tmp_path / "out" / "ids").exists)
        run.send_signal(signal.SIGHUP)
        out, _ = run.communicate()
    assert run.returncode == 0 and out.endswith("the end\n")

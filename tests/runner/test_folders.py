"""Output folders that fail during a run, and two runs in one: one sentence, an exit code, and no traceback."""

import os
import signal
import subprocess

import pytest
from terminal_runs import started, wait_for

CELL = 'drive_folder = ""'
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
FILLS = """import contextlib, os
with contextlib.suppress(OSError), open(os.path.join(drive_folder, "filling"), "wb") as file:
    while True:
        file.write(bytes(4096))
        file.flush()
"""
REMOVED = "import shutil\nshutil.rmtree(drive_folder)"
MUCH = "print('x' * 3_000_000)"
SAID = "When that is cured, the same command goes on."


@pytest.mark.parametrize(
    ("megabytes", "cell", "words"),
    [
        (8, FILLS, "No space left on device"),
        (2, MUCH, "No space left on device"),
        (0.1, "1", "No space left on device"),  # the notebook fits, its page does not
        pytest.param(8, REMOVED, "", marks=pytest.mark.more),
    ],
    ids=["filled by a cell", "filled by an output", "too small for the page", "removed"],
)
def test_a_folder_that_fails_ends_the_run_with_a_sentence(make_notebook, tmp_path, small_disk, megabytes, cell, words):
    output = small_disk(tmp_path / "out", megabytes * 2**20)
    with started(output, make_notebook("troubled", CELL, cell, "print('after')"), **PIPES) as run:
        _, err = run.communicate()
    assert run.returncode == 1
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert words in err and "out" in err
    assert SAID in err or "Free some space" in err


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(make_notebook, tmp_path):
    waits = make_notebook(
        "waits",
        CELL,
        "import os, time\nfrom pathlib import Path\nfolder = Path(drive_folder)\n(folder / 'begun').touch()",
        "while not (folder / 'go').exists():\n    time.sleep(0.05)",
    )
    output = tmp_path / "out"
    with started(output, waits, **PIPES) as first:
        wait_for((output / "begun").exists)
        with started(output, waits, **PIPES) as second:
            _, err = second.communicate()
        assert second.returncode == 2
        assert err == f"Nothing was run.\nAnother run is at work in {output}: wait for its end, or set --output.\n"
        (output / "go").touch()
        assert first.wait() == 0
    with started(output, waits, **PIPES) as third:
        out, _ = third.communicate()
    assert third.returncode == 0 and "not run again" in out


def test_a_killed_run_holds_its_folder_no_longer(make_notebook, tmp_path):
    output, waits = tmp_path / "out", "import time\nfrom pathlib import Path\nPath(drive_folder, 'begun').touch()\n"
    with started(output, make_notebook("waits", CELL, f"{waits}time.sleep(600)"), **PIPES) as run:
        wait_for((output / "begun").exists)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    with started(output, make_notebook("is done", CELL, "1"), **PIPES) as again:
        _, err = again.communicate()
    assert (again.returncode, err) == (0, "")

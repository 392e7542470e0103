"""The lock beside the published folder: who holds it, when it is waited for, and when it no longer counts."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_finetuning.release import lock
from llm_finetuning.release.lock import Lock


def owner(path, **changes):
    other = {"host": "another-machine", "pid": 1, "started": 0.0, "id": "x"} | changes
    path.write_text(json.dumps(other))
    return path


def test_taken_and_released(tmp_path):
    with Lock(tmp_path / "lock").take():
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_second_waits_then_says_who_holds_it(tmp_path):
    waits = []
    refused = pytest.raises(TimeoutError, match=f"process {os.getpid()} on .*run this cell again")
    with Lock(tmp_path / "lock").take(), refused:
        Lock(tmp_path / "lock", sleep=waits.append).take()
    assert sum(waits) == lock.PATIENCE


def test_second_gets_it_when_the_first_ends(tmp_path):
    first = Lock(tmp_path / "lock").take()
    with Lock(tmp_path / "lock", sleep=lambda seconds: first.__exit__()).take() as second:
        second.confirm()


def test_lock_of_a_process_that_is_gone_does_not_count(tmp_path):
    code = "import os, psutil; print(os.getpid(), psutil.Process().create_time())"
    pid, started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    owner(tmp_path / "lock", host=socket.gethostname(), pid=int(pid), started=float(started))
    Lock(tmp_path / "lock", sleep=lambda seconds: None).take()


def test_process_number_used_again_by_another_process(tmp_path):
    owner(tmp_path / "lock", host=socket.gethostname(), pid=os.getppid(), started=12345.0)
    Lock(tmp_path / "lock", sleep=lambda seconds: None).take()


def test_lock_that_this_process_could_not_release(tmp_path, monkeypatch):
    """The mount was lost at that moment; the next cell of the same notebook must not wait for itself."""
    with Lock(tmp_path / "lock").take():
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError(107, "gone")))
    monkeypatch.undo()
    assert (tmp_path / "lock").exists()
    Lock(tmp_path / "lock", sleep=lambda seconds: None).take()


def test_another_machine_counts_until_it_is_silent(tmp_path):
    path = owner(tmp_path / "lock")
    with pytest.raises(TimeoutError, match="process 1 on another-machine"):
        Lock(path, sleep=lambda seconds: None).take()
    silent = time.time() - lock.ABANDONED - 1
    os.utime(path, (silent, silent))
    Lock(path, sleep=lambda seconds: None).take()


def test_half_written_lock_counts_for_a_moment_only(tmp_path):
    (tmp_path / "lock").write_text('{"host": "a')
    with pytest.raises(TimeoutError, match="another run"):
        Lock(tmp_path / "lock", sleep=lambda seconds: None).take()
    old = time.time() - 60
    os.utime(tmp_path / "lock", (old, old))
    Lock(tmp_path / "lock", sleep=lambda seconds: None).take()


def test_beat_shows_life_and_notices_a_takeover(tmp_path):
    with Lock(tmp_path / "lock").take() as mine:
        os.utime(tmp_path / "lock", (1, 1))
        mine.beat()
        assert (tmp_path / "lock").stat().st_mtime == 1  # not every time
        mine.beaten -= 60
        mine.beat()
        assert (tmp_path / "lock").stat().st_mtime > 1e9
        owner(tmp_path / "lock")
        with pytest.raises(RuntimeError, match="another-machine has taken over"):
            mine.confirm()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "another-machine"

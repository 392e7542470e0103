"""Full disks, killed processes, damaged shards, lost connections, and two runs at once; Drive has tests of its own.

In each case nothing stands under the final name that fails its own check, and the error says what to do next.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from publishing_world import (
    DISK_FULL,
    IO_ERROR,
    NOT_CONNECTED,
    SHARDS,
    FailingWrites,
    finished,
    flip,
    truncate,
    version_at,
)

from llm_finetuning.files import checksums, copying
from llm_finetuning.release import replace

ALWAYS = range(1, 10**9)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Version 1 is published at `target`, version 2 lies in `new`; chunks are small, pauses are noted."""
    monkeypatch.setattr(copying, "CHUNK", 1000)
    target = replace.replace_published(finished(tmp_path / "old", 1), tmp_path / "drive" / "finetuned_phi2")
    new = finished(tmp_path / "new", 2)
    return type("World", (), {"target": target, "new": new, "pauses": []})


def publish(world):
    return replace.replace_published(world.new, world.target, sleep=world.pauses.append)


def only_the_folder(world) -> bool:
    return os.listdir(world.target.parent) == [world.target.name]


# A full disk


def test_disk_full_in_mid_shard(world, monkeypatch):
    monkeypatch.setattr(copying, "write_chunk", FailingWrites(DISK_FULL, at=range(4, 5)))
    with pytest.raises(OSError, match="Free space.*run this cell again") as error:
        publish(world)
    assert error.value.errno == DISK_FULL
    assert "KB" in str(error.value) or "MB" in str(error.value)
    assert version_at(world.target) == 1
    assert world.pauses == []  # a full disk does not get better by waiting
    publish(world)
    assert version_at(world.target) == 2
    assert only_the_folder(world)


def test_disk_that_is_really_full(tmp_path, world, monkeypatch, small_disk):
    small = small_disk(tmp_path / "small", 64 << 10)
    publishing_room = replace.check_space
    monkeypatch.setattr(replace, "check_space", lambda *_: 0)  # somebody fills the disk after we looked
    old = replace.replace_published(finished(tmp_path / "a", 3), small / "finetuned_phi2")
    with pytest.raises(OSError, match="No space left.*Free space") as error:
        replace.replace_published(finished(tmp_path / "b", 4, size=40_000), old)
    assert error.value.errno == DISK_FULL
    assert version_at(old) == 3
    monkeypatch.setattr(replace, "check_space", publishing_room)
    with pytest.raises(OSError, match="needs"):
        replace.replace_published(tmp_path / "b", old)
    assert version_at(old) == 3


# A process killed


def test_recovery_itself_was_killed(world):
    """A damaged new version was being taken away again, its list first, when the process died."""
    world.target.rename(world.target.with_name(".finetuned_phi2.previous"))
    finished(world.target, 5)
    (world.target / "SHA256SUMS").unlink()
    publish(world)
    assert version_at(world.target) == 2
    assert only_the_folder(world)


@pytest.mark.parametrize(("how", "at_least"), [("steps", 80), ("fresh", 50), ("between", 30), ("random", 10)])
def test_killed_at_any_moment(tmp_path, how, at_least):
    script = Path(__file__).parents[1] / "support" / "publishing_kills.py"
    paths = os.pathsep.join([str(script.parent), str(script.parents[2])])
    command = [sys.executable, str(script), str(tmp_path), how]
    environment = os.environ | {"PYTHONPATH": paths}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["problems"] == []
    assert report["kills"] >= at_least


# A damaged shard


@pytest.mark.parametrize("damage", [flip, truncate])
def test_shard_damaged_while_copying_is_copied_again(world, monkeypatch, damage):
    writes = FailingWrites(0, at=range(0))
    monkeypatch.setattr(copying, "write_chunk", writes)
    digits = checksums.hash_file(world.new / "SHA256SUMS")[:12]
    partial = world.target.parent / f".finetuned_phi2.partial-{digits}"
    real, damaged = copying.os.fsync, []

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)
        if path == partial / SHARDS[0] and not damaged:
            damaged.append(path)
            damage(path)

    monkeypatch.setattr(copying.os, "fsync", fsync)
    publish(world)
    assert damaged and version_at(world.target) == 2
    assert only_the_folder(world)


def test_disk_that_damages_every_time_is_named(world, monkeypatch):
    monkeypatch.setattr(copying, "write_chunk", lambda file, chunk: file.write(b"\0" * len(chunk)))
    with pytest.raises(ValueError, match=f"(?s){SHARDS[0]}.*did not read back.*another disk"):
        publish(world)
    assert version_at(world.target) == 1


@pytest.mark.parametrize("damage", [flip, truncate])
def test_shard_damaged_in_an_interrupted_copy_is_not_trusted(world, monkeypatch, damage):
    monkeypatch.setattr(copying, "write_chunk", FailingWrites(DISK_FULL, at=range(8, 9)))
    with pytest.raises(OSError):
        publish(world)
    (shard,) = world.target.parent.glob(f".finetuned_phi2.partial-*/{SHARDS[0]}")
    damage(shard)
    monkeypatch.undo()
    publish(world)
    assert version_at(world.target) == 2


# A lost connection


@pytest.mark.parametrize("number", [IO_ERROR, NOT_CONNECTED])
def test_transport_errors_are_tried_again_with_growing_pauses(world, monkeypatch, number):
    monkeypatch.setattr(copying, "write_chunk", FailingWrites(number, at=range(3, 6)))
    publish(world)
    assert version_at(world.target) == 2
    assert only_the_folder(world)
    assert world.pauses == [1, 2, 4]


@pytest.mark.parametrize("number", [IO_ERROR, NOT_CONNECTED])
def test_connection_that_stays_lost(world, monkeypatch, number):
    monkeypatch.setattr(copying, "write_chunk", FailingWrites(number, at=range(7, 10**9)))
    with pytest.raises(OSError, match="stayed lost.*When that folder opens again, run this cell again") as error:
        publish(world)
    assert error.value.errno == number
    assert world.pauses == sorted(world.pauses) and len(world.pauses) == len(copying.PAUSES)
    assert version_at(world.target) == 1


def test_goes_on_where_it_stopped(world, monkeypatch):
    """What had arrived is not written again: not the whole files, not the first half of the shard."""
    written = FailingWrites(IO_ERROR, at=range(9, 10**9))
    monkeypatch.setattr(copying, "write_chunk", written)
    with pytest.raises(OSError):
        publish(world)
    rest = FailingWrites(0, at=range(0))
    monkeypatch.setattr(copying, "write_chunk", rest)
    publish(world)
    assert version_at(world.target) == 2
    assert rest.written < 5000  # bytes of the one shard that was cut; half of its second chunk had arrived


def test_interrupted_copy_of_another_version_makes_room(world, monkeypatch, tmp_path):
    monkeypatch.setattr(copying, "write_chunk", FailingWrites(DISK_FULL, at=range(8, 9)))
    with pytest.raises(OSError):
        publish(world)
    monkeypatch.undo()
    replace.replace_published(finished(tmp_path / "newer", 3), world.target)
    assert version_at(world.target) == 3
    assert only_the_folder(world)


@pytest.mark.parametrize("step", ["rename", "scandir", "fsync", "open"])
def test_transport_error_in_any_other_step(world, monkeypatch, step):
    """Renames, listings, flushes and opens fail twice each; publishing still ends well."""
    module = {"open": "builtins"}.get(step, "os")
    real, failures = getattr(sys.modules[module], step), []

    def fails_twice(path, *args, **kwargs):
        if len(failures) < 2 and (step == "fsync" or str(world.target.parent) in str(path)):
            failures.append(path)
            raise OSError(IO_ERROR, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(sys.modules[module], step, fails_twice)
    publish(world)
    monkeypatch.undo()
    assert len(failures) == 2
    assert version_at(world.target) == 2
    assert only_the_folder(world)


def test_mount_that_cannot_sync_a_folder(world, monkeypatch):
    real = os.fsync

    def refuses_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(copying.os, "fsync", refuses_folders)
    publish(world)
    assert version_at(world.target) == 2


# Two runs at once


def test_two_runs_at_once_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "CHUNK", 500)
    sources = [finished(tmp_path / str(version), version, size=50_000) for version in (1, 2, 3)]
    target, errors = tmp_path / "drive" / "finetuned_phi2", []

    def run(source):
        try:
            replace.replace_published(source, target, sleep=lambda seconds: threading.Event().wait(0.01))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert version_at(target) in (1, 2, 3)
    assert os.listdir(target.parent) == ["finetuned_phi2"]

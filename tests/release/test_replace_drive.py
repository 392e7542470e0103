"""Drive in Colab: which calls of google.colab publishing makes, against a stand-in of that module."""

import sys
import types

import pytest
from publishing_world import finished, version_at

from llm_finetuning.files import copying
from llm_finetuning.release import drive, replace


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """google.colab with a Drive mounted in tmp_path; returns the list of calls."""
    calls = []
    stand_in = types.ModuleType("google.colab.drive")
    stand_in.mount = lambda point, force_remount=False: calls.append(f"mount {force_remount}")
    stand_in.flush_and_unmount = lambda: calls.append("flush")
    package = types.ModuleType("google.colab")
    package.drive = stand_in
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.drive", stand_in)
    monkeypatch.setattr(drive, "MOUNT", tmp_path / "content" / "drive")
    monkeypatch.setattr(drive.Drive, "cache", tmp_path)
    return calls


def test_publishing_to_drive_flushes_and_mounts_again_before_and_after_the_rename(tmp_path, colab):
    target = tmp_path / "content" / "drive" / "MyDrive" / "finetuned_phi2"
    replace.replace_published(finished(tmp_path / "merged", 1), target)
    assert colab == ["flush", "mount False"] * 2
    assert version_at(target) == 1


def test_publishing_to_the_local_disk_of_colab_leaves_drive_alone(tmp_path, colab):
    replace.replace_published(finished(tmp_path / "merged", 1), tmp_path / "content" / "finetuned_phi2")
    assert colab == []


def test_lost_mount_is_mounted_by_force(colab):
    drive.Drive().remount()
    assert colab == ["mount True"]


def test_room_on_the_disk_of_the_machine_counts_too(tmp_path, colab, monkeypatch):
    """What is written to Drive lies on the VM's disk first."""
    small = tmp_path / "small"
    small.mkdir()
    monkeypatch.setattr(drive.Drive, "cache", small)
    usage = copying.check_space.__globals__["shutil"].disk_usage
    full = types.SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full if path == small else usage(path))
    target = tmp_path / "content" / "drive" / "MyDrive" / "finetuned_phi2"
    with pytest.raises(OSError, match=f"{small} has 0.000 MB free"):
        replace.replace_published(finished(tmp_path / "merged", 1), target)
    assert not target.exists()

"""Publishing to Drive in Colab, with the harm that Colab does: what the user reads, what is left, how it goes on."""

import errno
import os
import types
import zipfile
from pathlib import Path

import pytest
from publishing_world import SHARDS, finished, version_at

from llm_finetuning import colab
from llm_finetuning.files import copying, drive
from llm_finetuning.release import publish, replace


@pytest.fixture
def world(google_drive, on_colab, tmp_path):
    """Version 1 is published on Drive and uploaded; version 2 lies merged on this machine."""
    target = google_drive.view() / "MyDrive" / "llm_finetuning" / "finetuned_phi2"
    replace.replace_published(finished(tmp_path / "old", 1), target)
    google_drive.upload()
    new, cloud = finished(tmp_path / "new", 2), on_colab / "cloud" / target.relative_to(google_drive.view())
    return types.SimpleNamespace(drive=google_drive, target=target, cloud=cloud, new=new, pauses=[], folder=on_colab)


def publish_again(world) -> Path:
    return replace.replace_published(world.new, world.target, sleep=world.pauses.append)


def asked(world) -> list[str]:
    return (world.folder / "calls.txt").read_text().splitlines()


def somebody_is_there(world, visits: int = 9) -> None:
    (world.folder / "visits").write_text(str(visits))


def test_publishing_asks_for_nothing_and_says_what_is_pending(world, capsys):
    publish_again(world)
    assert version_at(world.target) == 2
    assert asked(world) == [f"drive.mount {drive.MOUNT}"]  # the set-up cell's
    said = capsys.readouterr().out
    assert f"{world.target}: written and read back, its upload is pending." in said
    assert "The version before stays in" in said and ".finetuned_phi2.previous" in said
    assert world.target.stat().st_ino != world.new.stat().st_ino and world.new.exists()


def test_the_local_disk_of_colab_is_no_drive(world, tmp_path, capsys):
    replace.replace_published(world.new, tmp_path / "content" / "finetuned_phi2")
    assert "pending" not in capsys.readouterr().out
    assert os.listdir(tmp_path / "content") == ["finetuned_phi2"]


# The machine ends


def test_a_machine_that_ends_before_the_upload_loses_no_good_version(world):
    publish_again(world)
    world.drive.end_machine()
    assert not any((world.cloud / name).stat().st_size for name in SHARDS)  # names have arrived, contents have not
    somebody_is_there(world)
    colab.mount_drive()
    with pytest.raises(ValueError, match="SHA256SUMS is empty.*on Google Drive wait for the upload to finish"):
        version_at(world.target)
    assert version_at(world.target.with_name(".finetuned_phi2.previous")) == 1
    publish_again(world)
    assert version_at(world.target) == 2


def test_a_machine_that_ends_after_the_upload_leaves_the_new_version(world, tmp_path):
    publish_again(world)
    world.drive.end_machine(upload_first=True)
    somebody_is_there(world)
    colab.mount_drive()
    assert version_at(world.target) == 2
    replace.replace_published(finished(tmp_path / "third", 3), world.target)
    assert version_at(world.target.with_name(".finetuned_phi2.previous")) == 2
    assert version_at(world.target) == 3


# The connection is lost


def places() -> list:
    few = (5, 20)  # of some forty calls
    return [*few, *(pytest.param(n, marks=pytest.mark.more) for n in range(1, 39) if n not in few)]


@pytest.mark.parametrize("place", places())
def test_a_connection_that_is_lost_comes_back_where_somebody_allows_it(place, world):
    somebody_is_there(world)
    world.drive.Kernel(disconnect_at=place)
    publish_again(world)
    world.drive.Kernel.hooked = None
    assert version_at(world.target) == 2
    assert asked(world).count(f"drive.mount {drive.MOUNT} again") == 1


@pytest.mark.parametrize("kind", ["MessageError", "ValueError"])
@pytest.mark.parametrize("place", places())
def test_a_connection_that_stays_lost_where_nobody_is_there(place, kind, world):
    (world.folder / "refuse").write_text(kind)
    world.drive.Kernel(disconnect_at=place)
    with pytest.raises(OSError) as error:
        publish_again(world)
    world.drive.Kernel.hooked = None
    said = str(error.value)
    assert f"Drive was not mounted ({kind}: " in said and f"{world.new} is whole" in said
    assert "Run the set-up cell again" in said and "run this cell again: it goes on with what lies in" in said
    assert error.value.errno == errno.ENOTCONN
    assert asked(world).count("nobody allowed it") == 1  # not once for each pause
    assert os.listdir(drive.MOUNT) == []  # else it could not be mounted again
    somebody_is_there(world)
    colab.mount_drive()
    publish_again(world)
    assert version_at(world.target) == 2


def test_files_that_read_back_empty_until_they_are_uploaded(world, monkeypatch):
    """Reported of large files; nothing is published unseen, and what waits goes on after the flush."""
    waiting, real = {}, copying.os.fsync

    def lags(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)
        if path.is_file() and drive.on_drive(path):
            waiting[path] = path.read_bytes()
            os.ftruncate(handle, 0)

    monkeypatch.setattr(copying.os, "fsync", lags)
    with pytest.raises(ValueError, match=r"did not read back(?s:.*)new is whole. Let Drive upload .*last cell"):
        publish_again(world)
    assert version_at(world.target) == 1
    for path, content in waiting.items():  # what the flush does
        path.write_bytes(content)
    publish_again(world)
    assert version_at(world.target) == 2


def test_damage_after_the_rename_brings_the_old_version_back(world, monkeypatch):
    real = os.rename

    def damages(source, target):
        real(source, target)
        if target == world.target and source != world.target.with_name(".finetuned_phi2.previous"):
            (world.target / SHARDS[1]).write_bytes(b"")

    monkeypatch.setattr(os, "rename", damages)
    with pytest.raises(ValueError, match=f"{SHARDS[1]} is empty"):
        publish_again(world)
    assert version_at(world.target) == 1
    monkeypatch.undo()


# The last cell: the flush


def test_the_flush_uploads_and_leaves_nothing_mounted(world):
    publish_again(world)
    assert "Uploaded: everything in" in colab.flush_drive(world.target.parent)
    assert version_at(world.cloud) == 2 and os.listdir(drive.MOUNT) == []


def test_a_flush_that_fails_costs_nothing_and_is_explained(world):
    publish_again(world)
    (world.folder / "flush_fails").touch()
    said = colab.flush_drive(world.target.parent)
    assert "(ValueError: flush_and_unmount failed). Nothing is lost" in said and "drive.google.com" in said
    assert version_at(world.target) == 2


def test_a_flush_of_a_drive_that_is_lost_is_not_called_an_upload(world):
    world.drive.disconnect()
    said = colab.flush_drive(world.target.parent)
    assert said.startswith("Drive did not say that everything is uploaded (OSError: ") and "Run the set-up cell" in said
    assert "drive.flush_and_unmount" not in asked(world)


def test_nothing_is_written_where_drive_was_until_it_is_mounted_again(world):
    colab.flush_drive(world.target.parent)
    (world.folder / "refuse").write_text("MessageError")
    with pytest.raises(OSError, match="Drive was not mounted .*Run the set-up cell again"):
        publish_again(world)
    with pytest.raises(OSError, match="Drive is not mounted, or its connection is lost. Run the set-up cell"):
        publish.write_text(world.target.parent / "metrics.jsonl", "{}")
    assert os.listdir(drive.MOUNT) == []
    somebody_is_there(world)
    colab.mount_drive()
    publish_again(world)
    assert version_at(world.target) == 2


def test_outside_colab_nothing_is_flushed(tmp_path):
    assert colab.flush_drive(tmp_path) == f"Everything lies in {tmp_path}."
    assert not drive.on_drive("/content/drive/MyDrive/x")
    assert drive.check_mounted("/content/drive/MyDrive/x") is None


# The bin


def test_what_is_replaced_on_drive_does_not_fill_its_bin(world, tmp_path):
    kernel = world.drive.Kernel()
    for version in range(2, 5):
        replace.replace_published(finished(tmp_path / f"v{version}", version, size=50_000), world.target)
    assert version_at(world.target) == 4
    assert kernel.bin < 5_000, "locks and names; a version takes 100,000 bytes"


def test_a_zip_that_is_written_again_does_not_fill_the_bin(world, tmp_path):
    adapter, target = tmp_path / "adapter", world.target.with_name("adapter.zip")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(bytes(100_000))
    kernel = world.drive.Kernel()
    for _ in range(3):
        publish.zip_adapter(adapter, target)
    assert zipfile.ZipFile(target).testzip() is None
    assert kernel.bin < 1000


def test_room_on_the_disk_of_the_machine_counts_too(world, monkeypatch, tmp_path):
    """What is written to Drive lies on the VM's disk first."""
    monkeypatch.setattr(drive, "CACHE", tmp_path / "small")
    usage, full = copying.shutil.disk_usage, types.SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full if path == tmp_path else usage(path))
    with pytest.raises(OSError, match=f"{tmp_path} has 0.000 MB free"):
        publish_again(world)
    assert version_at(world.target) == 1

"""Verified copies: complete under their name, and continued or copied afresh until they read back as listed."""

import os

import pytest
from publishing_world import IO_ERROR, SHARDS, FailingWrites, finished, version_at

from llm_finetuning.files import atomic, copying, drive


def test_folder_is_copied_and_takes_the_place_of_the_one_before(tmp_path):
    for version in (1, 2):
        source = finished(tmp_path / str(version), version)
        assert copying.copy_folder(source, tmp_path / "drive" / "copy") == tmp_path / "drive" / "copy"
        assert version_at(tmp_path / "drive" / "copy") == version
    assert os.listdir(tmp_path / "drive") == ["copy"]


def test_what_a_killed_copy_of_another_folder_left_does_not_come_along(tmp_path):
    left = copying.partial_name(tmp_path / "copy")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"other weights")
    copying.copy_folder(finished(tmp_path / "1", 1), tmp_path / "copy")
    assert version_at(tmp_path / "copy") == 1


def test_transport_errors_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(copying.retrying, "__defaults__", (None, (0, 0), lambda seconds: None))
    monkeypatch.setattr(copying, "write_chunk", FailingWrites(IO_ERROR, at=range(2, 4)))
    copying.copy_folder(finished(tmp_path / "1", 1), tmp_path / "copy")
    assert version_at(tmp_path / "copy") == 1


def test_disk_that_damages_every_time_leaves_the_folder_before(tmp_path, monkeypatch):
    copying.copy_folder(finished(tmp_path / "1", 1), tmp_path / "copy")
    monkeypatch.setattr(copying, "write_chunk", lambda file, chunk: file.write(b"\0" * len(chunk)))
    with pytest.raises(ValueError, match=f"(?s){SHARDS[0]}.*did not read back"):
        copying.copy_folder(finished(tmp_path / "2", 2), tmp_path / "copy")
    assert version_at(tmp_path / "copy") == 1


@pytest.mark.parametrize("there", [False, True], ids=["on a disk", "on Drive"])
def test_what_a_link_leads_to_is_neither_removed_nor_emptied(there, tmp_path, monkeypatch):
    """On Drive files are emptied before they are removed; those behind links are somebody else's."""
    monkeypatch.setattr(drive, "on_drive", lambda path: there)
    thesis = tmp_path / "thesis" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    folder = tmp_path / "adapter"
    for links in range(3):
        folder.mkdir()
        (folder / "own.txt").write_text("mine")
        (folder / "file").symlink_to(thesis)
        (folder / "folder").symlink_to(thesis.parent)
        (tmp_path / "link").symlink_to(folder if links == 1 else thesis if links == 2 else thesis.parent)
        drive.remove(tmp_path / "link", ignore_errors=True)
        assert (folder / "own.txt").read_text() == "mine"
        drive.remove(folder)
        assert sorted(os.listdir(tmp_path)) == ["thesis"] and thesis.read_text() == "years of work"


def test_a_folder_takes_the_place_of_a_link_again_and_again(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("kept")
    for number in range(3):
        (tmp_path / "adapter").symlink_to(tmp_path / "elsewhere")
        with atomic.building(tmp_path / "adapter") as partial:
            (partial / "number").write_text(str(number))
        assert sorted(os.listdir(tmp_path)) == ["adapter", "elsewhere"]
        assert not (tmp_path / "adapter").is_symlink() and os.listdir(tmp_path / "elsewhere") == ["notes.txt"]
        atomic.remove_folder(tmp_path / "adapter")

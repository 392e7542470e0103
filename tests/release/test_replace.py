"""Publishing to a folder when nothing goes wrong, and what it refuses to publish."""

import errno
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from publishing_world import SHARDS, finished, version_at

from llm_finetuning.files import checksums, copying
from llm_finetuning.release import hub, publish, replace


def test_publishes_whole_and_leaves_nothing_beside(tmp_path):
    source = finished(tmp_path / "merged", 1)
    target = replace.replace_published(source, tmp_path / "drive" / "finetuned_phi2")
    assert target == tmp_path / "drive" / "finetuned_phi2"
    assert version_at(target) == 1
    assert os.listdir(target.parent) == ["finetuned_phi2"]


def test_copy_shares_nothing_with_its_source(tmp_path):
    source = finished(tmp_path / "merged", 1)
    target = replace.replace_published(source, tmp_path / "finetuned_phi2")
    (source / SHARDS[0]).write_bytes(b"next run")
    assert version_at(target) == 1


def test_new_version_replaces_the_old_one(tmp_path):
    target = replace.replace_published(finished(tmp_path / "a", 1), tmp_path / "drive" / "finetuned_phi2")
    replace.replace_published(finished(tmp_path / "b", 2), target)
    assert version_at(target) == 2
    assert os.listdir(target.parent) == ["finetuned_phi2"]


def test_same_version_again_copies_nothing(tmp_path, monkeypatch):
    source = finished(tmp_path / "merged", 1)
    target = replace.replace_published(source, tmp_path / "finetuned_phi2")
    monkeypatch.setattr(copying, "write_chunk", None)
    assert replace.replace_published(source, target) == target


def test_damaged_version_under_the_target_is_replaced(tmp_path):
    source = finished(tmp_path / "merged", 1)
    target = replace.replace_published(source, tmp_path / "finetuned_phi2")
    (target / SHARDS[0]).write_bytes(b"")
    replace.replace_published(source, target)
    assert version_at(target) == 1


def test_what_somebody_put_into_the_old_version_is_kept(tmp_path):
    target = replace.replace_published(finished(tmp_path / "a", 1), tmp_path / "drive" / "finetuned_phi2")
    (target / "model-Q4_K_M.gguf").write_bytes(b"an hour of work")
    replace.replace_published(finished(tmp_path / "b", 2), target)
    assert version_at(target) == 2
    (kept,) = (path for path in target.parent.iterdir() if path != target)
    assert [path.name for path in kept.rglob("*") if path.is_file()] == ["model-Q4_K_M.gguf"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "MyDrive").mkdir()
    (tmp_path / "MyDrive" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="left alone"):
        replace.replace_published(finished(tmp_path / "merged", 1), tmp_path / "MyDrive")
    assert os.listdir(tmp_path / "MyDrive") == ["thesis.tex"]
    assert not list(tmp_path.glob(".MyDrive*"))


def test_source_that_is_not_whole_is_refused(tmp_path):
    source = finished(tmp_path / "merged", 1)
    (source / SHARDS[1]).write_bytes(b"cut")
    with pytest.raises(ValueError, match=SHARDS[1]):
        replace.replace_published(source, tmp_path / "finetuned_phi2")
    assert not (tmp_path / "finetuned_phi2").exists()


def test_source_and_target_must_differ(tmp_path):
    source = finished(tmp_path / "merged", 1)
    with pytest.raises(ValueError, match="both source and target"):
        replace.replace_published(source, source)
    assert version_at(source) == 1


@pytest.mark.parametrize("publish_it", [replace.replace_published, hub.push_to_hub])
def test_pickles_and_tokens_stay_here(tmp_path, publish_it):
    source = finished(tmp_path / "merged", 1)
    (source / "training_args.bin").write_bytes(b"\x80\x04.")
    checksums.write_checksums(source)
    with pytest.raises(ValueError, match="training_args.bin"):
        publish_it(source, tmp_path / "out/finetuned_phi2")
    (source / "training_args.bin").unlink()
    (source / "settings.json").write_text('{\n"token": "hf_' + "aB3" * 12 + '"}')
    checksums.write_checksums(source)
    with pytest.raises(ValueError, match="settings.json, line 2") as error:
        publish_it(source, tmp_path / "out/finetuned_phi2")
    assert "aB3aB3" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_room_is_looked_at_first(tmp_path, monkeypatch):
    source = finished(tmp_path / "merged", 1)
    monkeypatch.setattr(copying.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"needs 16\.\d+ MB.*0\.001 MB free") as error:
        replace.replace_published(source, tmp_path / "out" / "finetuned_phi2")
    assert error.value.errno == 28
    assert os.listdir(tmp_path / "out") == []


def test_check_space_of_a_folder_that_is_not_there_yet(tmp_path):
    free = copying.check_space(tmp_path / "a" / "b", 1, "The merged model")
    assert free > 1
    with pytest.raises(OSError, match=r"The merged model needs 1,000,000,000\.00 GB, and .* has [\d,.]+ [GM]B free"):
        copying.check_space(tmp_path / "a" / "b", 10**18, "The merged model")


def test_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        replace.replace_published(finished(tmp_path / "merged", 1), tmp_path / "file" / "finetuned_phi2")
    assert (tmp_path / "file").read_text() == "in the way"


def test_where_the_target_is_a_link_the_folder_behind_it_is_replaced(tmp_path):
    """As where the results lie on a larger disk; a second version, and one more, as a first may go well by chance."""
    real, target = tmp_path / "large disk" / "models", tmp_path / "drive" / "finetuned_phi2"
    target.parent.mkdir()
    target.symlink_to(real)  # nothing is there yet
    for version in (1, 2, 3):
        assert replace.replace_published(finished(tmp_path / str(version), version), target) == target
        assert target.is_symlink() and version_at(target) == version_at(real) == version
        assert os.listdir(real.parent) == ["models"] and os.listdir(target.parent) == ["finetuned_phi2"]


def test_a_link_to_somebody_else_s_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "finetuned_phi2").symlink_to(tmp_path / "thesis")
    with pytest.raises(ValueError, match="left alone"):
        replace.replace_published(finished(tmp_path / "merged", 1), tmp_path / "finetuned_phi2")
    assert os.listdir(tmp_path / "thesis") == ["thesis.tex"]


def test_links_in_a_circle_are_named(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="leads in a circle"):
        replace.replace_published(finished(tmp_path / "merged", 1), tmp_path / "a")


def test_a_file_under_the_target_s_name_is_left_alone(tmp_path):
    (tmp_path / "finetuned_phi2").write_text("notes")
    with pytest.raises(ValueError, match="is a file, so it was not published from here and is left alone"):
        replace.replace_published(finished(tmp_path / "merged", 1), tmp_path / "finetuned_phi2")
    assert (tmp_path / "finetuned_phi2").read_text() == "notes"


def test_source_and_target_must_differ_by_whatever_name(tmp_path):
    """As on a file system that does not tell capitals from small letters: two paths, one folder."""
    source = finished(tmp_path / "there" / "merged", 1)
    (tmp_path / "here").symlink_to(tmp_path / "there")
    for target in (tmp_path / "here" / "merged", tmp_path / "there" / ".." / "here" / "merged"):
        with pytest.raises(ValueError, match="both source and target"):
            replace.replace_published(source, target)
    assert version_at(source) == 1 and os.listdir(tmp_path / "there") == ["merged"]


@pytest.mark.parametrize("names", [("README.md", "readme.md"), ("Stra\u00dfe", "STRASSE"), ("\u00e9", "e\u0301")])
def test_names_that_are_one_file_elsewhere_are_refused(names, tmp_path):
    source = finished(tmp_path / "merged", 1)
    for name in names:
        (source / name).write_text(name)
    with pytest.raises(ValueError, match="one file on Windows and macOS"):
        checksums.write_checksums(source)


def test_a_target_that_is_read_only(tmp_path, small_disk):
    disk = small_disk(tmp_path / "disk", 1e6)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    source = finished(tmp_path / "merged", 1)
    with pytest.raises(OSError, match="cannot be written. Nothing new stands under .* Choose another folder") as error:
        replace.replace_published(source, disk / "finetuned_phi2")
    assert error.value.errno == errno.EROFS
    assert version_at(source) == 1


def bytes_read() -> int:
    """What this process has read so far, from files and from what the system keeps of them, by its kernel's count."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts what is read on Linux")
def test_each_byte_is_read_twice_after_it_was_written(tmp_path):
    """The merged model: hashed, then copied. Its copy: read back once."""
    size = 8_000_000
    source = finished(tmp_path / "merged", 1, size)
    replace.replace_published(finished(tmp_path / "first", 2), tmp_path / "drive" / "finetuned_phi2")
    before = bytes_read()
    checksums.write_checksums(source)
    hashed = bytes_read()
    replace.replace_published(source, tmp_path / "drive" / "finetuned_phi2")
    copied = bytes_read()
    assert hashed - before == pytest.approx(2 * size, rel=0.02)
    assert copied - hashed == pytest.approx(2 * 2 * size, rel=0.02)


def test_zip_of_the_adapter(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "training_args.bin", "README.md"):
        (adapter / name).write_text(name)
    path = publish.zip_adapter(adapter, tmp_path / "out" / "adapter.zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        archive.extractall(tmp_path / "there")
    assert names == ["adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert (tmp_path / "there/adapter/adapter_model.safetensors").read_text() == "adapter_model.safetensors"
    assert os.listdir(path.parent) == ["adapter.zip"]


def test_zip_of_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        publish.zip_adapter(tmp_path, tmp_path / "adapter.zip")
    assert not (tmp_path / "adapter.zip").exists()

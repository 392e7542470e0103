"""SHA256SUMS: written atomically, read by coreutils, and every kind of damage is named."""

import shutil
import subprocess

import pytest
from publishing_world import flip, truncate

from llm_finetuning.files import checksums


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "finetuned_phi2"
    (folder / "deeper").mkdir(parents=True)
    (folder / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"second shard" * 99)
    (folder / "config.json").write_text("{}")
    (folder / "deeper" / "ünïcode name.txt").write_text("with a space")
    checksums.write_checksums(folder)
    return folder


def test_lists_every_file_sorted_and_leaves_nothing_beside(folder):
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    assert [line[66:] for line in lines] == sorted(checksums.files_below(folder)[1:])
    assert len(lines) == 4
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_one_command_accepts_it_and_refuses_a_flipped_bit(folder):
    if not shutil.which("sha256sum"):
        pytest.skip("sha256sum is not installed")
    command = checksums.COMMAND.split()
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    flip(folder / "model-00002-of-00002.safetensors")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 1
    assert "model-00002-of-00002.safetensors: FAILED" in result.stdout


def test_whole_folder_returns_its_hashes(folder):
    assert set(checksums.verify_checksums(folder)) == set(checksums.files_below(folder)) - {"SHA256SUMS"}


def test_written_again_after_a_change(folder):
    (folder / "config.json").write_text('{"more": 1}')
    checksums.write_checksums(folder)
    checksums.verify_checksums(folder)


def test_a_model_card_is_there_to_be_edited(folder):
    before = checksums.digest(folder)
    (folder / "README.md").write_text("as published")
    checksums.write_checksums(folder)
    assert checksums.digest(folder) == before
    (folder / "README.md").write_text("as the Hub's editor left it")
    checksums.verify_checksums(folder)
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"README\.md is missing"):
        checksums.verify_checksums(folder)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "damaged"), (truncate, "damaged"), (empty, "0 bytes"), (lambda p: p.unlink(), "missing")],
)
def test_damage_names_the_file_and_only_it(folder, damage, words):
    damage(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        checksums.verify_checksums(folder)
    assert "model-00001-of-00002.safetensors" in str(error.value)
    assert "model-00002-of-00002.safetensors" not in str(error.value)
    assert "again" in str(error.value)  # the cure


def test_all_damages_at_once(folder):
    flip(folder / "model-00001-of-00002.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="(?s)config.json is missing.*model-00001"):
        checksums.verify_checksums(folder)


def test_a_weight_file_that_nobody_published_is_refused(folder):
    """transformers would load it instead of the shards."""
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="model.safetensors is not listed"):
        checksums.verify_checksums(folder)


def test_what_tools_leave_in_a_folder_is_ignored(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    (folder / "desktop.ini").write_text("Drive")
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    checksums.verify_checksums(folder)


@pytest.mark.parametrize("lines", ["", "no hash  config.json\n"])
def test_damaged_list_is_named(folder, lines):
    (folder / "SHA256SUMS").write_text(lines)
    with pytest.raises(ValueError, match="SHA256SUMS"):
        checksums.verify_checksums(folder)


def test_list_cut_off_in_a_line_names_the_line(folder):
    text = (folder / "SHA256SUMS").read_text(encoding="utf-8")
    (folder / "SHA256SUMS").write_text(text[:90], encoding="utf-8")
    with pytest.raises(ValueError, match="SHA256SUMS, line 2"):
        checksums.verify_checksums(folder)


def test_list_cut_off_between_lines_names_the_weights(folder):
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is not listed"):
        checksums.verify_checksums(folder)


def test_missing_folder_and_missing_list(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        checksums.verify_checksums(tmp_path / "nowhere")
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="not published whole"):
        checksums.verify_checksums(folder)


def test_missing_folder_points_at_the_version_that_lies_aside(folder):
    folder.rename(folder.parent / ".finetuned_phi2.previous")
    with pytest.raises(FileNotFoundError, match=r"\.finetuned_phi2\.previous"):
        checksums.verify_checksums(folder)


def test_nothing_to_list_and_a_name_that_the_format_cannot_hold(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        checksums.write_checksums(tmp_path / "empty")
    (folder / "two\nlines").write_text("")
    before = (folder / "SHA256SUMS").read_bytes()
    with pytest.raises(ValueError, match="Rename the file"):
        checksums.write_checksums(folder)
    assert (folder / "SHA256SUMS").read_bytes() == before

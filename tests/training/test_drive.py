"""Checkpoints and resume in Colab: Drive is lost, the machine ends before its uploads, the bin fills."""

import errno
import json
import os
from pathlib import Path

import pytest
from test_faults import at_once  # noqa: F401
from training_fixtures import digest, prepare, small_settings

from llm_finetuning import colab, plotting
from llm_finetuning.data import reports
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.files import checksums, drive
from llm_finetuning.release import model_card
from llm_finetuning.sample import making
from llm_finetuning.training import checkpoints
from llm_finetuning.training import resumable as training

RUN = {"max_steps": 8, "save_steps": 2, "num_train_epochs": 8.0}


def checkpoint(folder: Path, step: int, size: int = 50_000) -> Path:
    partial = folder / ".being-written"
    partial.mkdir(parents=True)
    (partial / "adapter_model.safetensors").write_bytes(os.urandom(size))
    return checkpoints.finalize(partial, folder / f"checkpoint-{step}", {"micro_batch_tokens": step, "optimizer": "x"})


@pytest.fixture
def on_drive(google_drive) -> Path:
    return google_drive.view() / "MyDrive" / "run" / "checkpoints"


def test_three_epochs_of_checkpoints_do_not_fill_the_bin(google_drive, on_drive, tmp_path):
    """Free accounts have 15 GB; seventeen checkpoints of Phi-2's adapter took 19 of them in the bin."""
    mirror, kernel = checkpoints.Mirror(tmp_path, on_drive, limit=2), google_drive.Kernel()
    for step in range(50, 900, 50):
        mirror.send(checkpoint(tmp_path, step))
        mirror.wait()
    assert mirror.problem is None
    assert [path.name for path in checkpoints.complete(on_drive)] == ["checkpoint-800", "checkpoint-850"]
    assert kernel.bin < 1000


def test_a_checkpoint_that_is_cut_off_and_sent_again_does_not_fill_the_bin(google_drive, on_drive, tmp_path):
    half = on_drive / ".checkpoint-50.partial"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(bytes(30_000))
    mirror, kernel = checkpoints.Mirror(tmp_path, on_drive, limit=2), google_drive.Kernel()
    mirror.send(checkpoint(tmp_path, 50))
    mirror.wait()
    assert mirror.problem is None and kernel.bin < 1000


@pytest.mark.parametrize("place", [2, 6, *(pytest.param(n, marks=pytest.mark.more) for n in (1, 3, 4, 5, 8, 12, 16))])
def test_a_drive_that_is_lost_is_named_and_its_folder_stays_empty(place, google_drive, on_drive, tmp_path, capsys):
    mirror = checkpoints.Mirror(tmp_path, on_drive, limit=2)
    google_drive.Kernel(disconnect_at=place)
    for step in (50, 100, 150):
        mirror.send(checkpoint(tmp_path, step))
        mirror.wait()
    google_drive.Kernel.hooked = None
    assert mirror.problem.startswith("checkpoint-150 is not on Drive yet") and "Run the set-up cell" in mirror.problem
    assert capsys.readouterr().out.count("could not be copied to Drive") == 1
    assert os.listdir(drive.MOUNT) == []
    (Path(os.environ["COLAB_STUB"]) / "visits").write_text("1")
    colab.mount_drive()
    mirror.send(checkpoint(tmp_path, 200))
    mirror.wait()
    assert mirror.problem is None and checkpoints.complete(on_drive)[-1].name == "checkpoint-200"


def test_what_the_machine_did_not_upload_is_passed_over(google_drive, on_drive, tmp_path):
    checkpoint(on_drive, 50)
    google_drive.upload()
    checkpoint(on_drive, 100)
    google_drive.end_machine()
    colab.mount_drive()
    assert (on_drive / "checkpoint-100" / checkpoints.RUN_FILE).read_bytes() == b""
    assert checkpoints.newest_run(tmp_path, on_drive)["micro_batch_tokens"] == 50
    assert checkpoints.newest(tmp_path / "work", on_drive).name == "checkpoint-50"


@pytest.mark.parametrize("name", ["finetuning_data_train.report.json", "scoreboard.json", "recipe.json"])
def test_small_files_that_were_not_uploaded_count_as_missing(name, google_drive, tmp_path):
    """What another machine wrote shortly before it ended has 0 bytes here."""
    folder = google_drive.view() / "MyDrive" / "run"
    folder.mkdir(parents=True)
    pairs = folder / "finetuning_data_train.jsonl"
    pairs.write_text('{"prompt": "a", "response": "b"}\n')
    google_drive.upload()
    (folder / name).write_text('{"before": {"loss": 1}}')
    google_drive.end_machine()
    colab.mount_drive()
    assert (folder / name).read_bytes() == b""
    if name == "scoreboard.json":
        assert scoreboard.record(folder / name, after={"loss": 2}) == {"after": {"loss": 2}}
    elif name == "recipe.json":
        made = making.make_once(folder, "x", 1, lambda partial: (partial / "made").touch())
        assert json.loads((made / name).read_text()) == {"recipe": "x"}
    else:
        assert model_card.data_facts(pairs, pairs)["train"]["pairs"] == 1
        with pytest.raises(FileNotFoundError, match="not found in .*Run the notebook in Data Prep"):
            reports.read_report(pairs)


def test_a_figure_on_a_lost_drive_is_one_sentence(google_drive, on_drive):
    figure, _ = plotting.new_figure()
    google_drive.Kernel(disconnect_at=2)
    with pytest.raises(OSError, match="loss.png cannot be reached: Drive is not mounted, or its .*Run the set-up"):
        plotting.save(figure, on_drive / "loss.png")
    google_drive.Kernel.hooked = None
    assert os.listdir(drive.MOUNT) == []


def test_a_run_goes_on_after_its_machine_ended_before_the_upload(google_drive, on_drive, tiny_base, tmp_path, capsys):
    undisturbed = prepare(small_settings(tmp_path / "alone", tiny_base, **RUN))
    training.train(undisturbed.trainer)
    training.save_adapter(undisturbed.trainer)
    results = str(on_drive.parent)

    first = prepare(small_settings(results, tiny_base, work_folder=str(tmp_path / "vm1"), **RUN))
    google_drive.Kernel(disconnect_at=60)  # in the middle of the second checkpoint
    outcome = training.train(first.trainer)
    google_drive.Kernel.hooked = None
    assert outcome.step == 8 and "is not on Drive yet" in str(outcome)
    google_drive.end_machine()
    colab.mount_drive()

    again = prepare(small_settings(results, tiny_base, work_folder=str(tmp_path / "vm2"), **RUN))
    outcome = training.train(again.trainer)
    training.save_adapter(again.trainer)
    assert outcome.step == 8 and outcome.mirror_problem is None
    assert digest(again.settings.folders.adapter) == digest(undisturbed.settings.folders.adapter)
    assert [path.name for path in checkpoints.complete(on_drive)] == ["checkpoint-6", "checkpoint-8"]
    assert json.loads((on_drive / "checkpoint-8" / checkpoints.RUN_FILE).read_text()) == again.trainer.identity
    checksums.verify_checksums(on_drive / "checkpoint-8")


def test_a_drive_that_is_gone_at_the_start_is_not_taken_for_an_empty_one(google_drive, on_drive, tmp_path):
    checkpoint(on_drive, 50)
    google_drive.disconnect()
    with pytest.raises(OSError, match="cannot be read for a checkpoint .*Run the set-up cell") as error:
        checkpoints.newest(tmp_path / "work", on_drive)
    assert error.value.errno == errno.ENOTCONN


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that are hashed from now on."""
    files, hash_file = [], checksums.hash_file
    monkeypatch.setattr(checksums, "hash_file", lambda path: files.append(path) or hash_file(path))
    return files


def bytes_of(*folders: Path) -> int:
    """What checking these checkpoints hashes: all of them but their lists."""
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir() if file.name != checksums.NAME)


@pytest.mark.parametrize("there", ["nothing", "the same", "older ones"])
def test_nothing_older_than_the_newest_complete_checkpoint_is_hashed(there, tmp_path, hashed):
    work, mirrored = tmp_path / "work", tmp_path / "drive"
    *_, last = [checkpoint(work, step, 1_000_000) for step in (50, 100, 150)]
    for step in {"nothing": (), "the same": (50, 100, 150), "older ones": (20, 30)}[there]:
        checkpoint(mirrored, step, 1_000_000)
    hashed.clear()
    assert checkpoints.newest(work, mirrored) == last
    assert sum(file.stat().st_size for file in hashed) == bytes_of(last) < 1_001_000


def test_damaged_checkpoints_are_passed_over_from_the_newest_on(tmp_path, hashed, capsys):
    """Here 200 is damaged, on Drive 150 and 200 are; 100 is whole in both, and nothing below it is looked at."""
    work, mirrored = tmp_path / "work", tmp_path / "drive"
    here = {step: checkpoint(work, step) for step in (50, 100, 200)}
    there = {step: checkpoint(mirrored, step) for step in (50, 100, 150, 200)}
    for damaged in (here[200], there[150], there[200]):
        os.truncate(damaged / "adapter_model.safetensors", 40_000)
    hashed.clear()
    assert checkpoints.newest(work, mirrored) == here[100]
    assert {file.parent for file in hashed} == {here[200], there[200], there[150], here[100]}
    assert sum(file.stat().st_size for file in hashed) == bytes_of(here[200], there[200], there[150], here[100])
    assert "not those that were written: checkpoint-200\n" in capsys.readouterr().out


def test_the_newest_on_drive_is_fetched_without_a_look_at_what_lies_here(tmp_path, hashed):
    work, mirrored = tmp_path / "work", tmp_path / "drive"
    for step in (50, 100):
        checkpoint(work, step)
    ahead = checkpoint(mirrored, 150)
    hashed.clear()
    assert checkpoints.newest(work, mirrored) == work / "checkpoint-150"
    assert {file.parent.name for file in hashed} <= {ahead.name, ".checkpoint-150.partial"}


def test_a_drive_that_breaks_off_while_it_is_hashed_leaves_what_is_here(tmp_path, monkeypatch, capsys):
    work, mirrored, hash_file = tmp_path / "work", tmp_path / "drive", checksums.hash_file
    mine = checkpoint(work, 50)
    checkpoint(mirrored, 100)

    def broken(path):
        if mirrored in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        return hash_file(path)

    monkeypatch.setattr(checksums, "hash_file", broken)
    assert checkpoints.newest(work, mirrored) == mine
    assert "going on from what is here" in capsys.readouterr().out

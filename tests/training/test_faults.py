"""Faults while a run trains: Drive fails at any of its calls, the local disk is full. Training goes on, to the bit."""

import dataclasses
import errno
import sys
import threading
from pathlib import Path

import pytest
from training_fixtures import digest, prepare, small_settings
from transformers import TrainerCallback

from llm_finetuning.files import copying
from llm_finetuning.training import checkpoints
from llm_finetuning.training import resumable as training
from llm_finetuning.training.metrics import Metrics

ERRORS = (errno.ENOTCONN, errno.EIO, errno.ENOSPC)
LONG = {"max_steps": 20, "save_steps": 5, "eval_steps": 10, "num_train_epochs": 8.0}


class Drive:
    """Counts the system calls on paths below a folder as Python's audit events tell them, and makes some fail."""

    def __init__(self):
        self.folder, self.calls, self.fails = None, 0, lambda call: False
        self.lock = threading.Lock()
        sys.addaudithook(self._hook)

    def watch(self, folder: Path | None, fails=lambda call: False) -> None:
        self.folder, self.calls, self.fails = str(folder) if folder else None, 0, fails

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None or not event.startswith(("open", "os.", "shutil.")):
            return
        if not any(isinstance(path, (str, Path)) and str(path).startswith(self.folder) for path in arguments):
            return
        with self.lock:
            call, self.calls = self.calls, self.calls + 1
        if self.fails(call):
            number = ERRORS[call % len(ERRORS)]
            raise OSError(number, f"injected at call {call}: {event}")


@pytest.fixture(scope="module")
def drive():
    drive = Drive()  # an audit hook stays for ever: there is one
    yield drive
    drive.watch(None)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(copying.retrying, "__defaults__", (None, (0, 0), lambda seconds: None))


def trained(folder: Path, base: Path, drive: Drive, fails=lambda call: False):
    """Trains with `fails` deciding which calls on Drive do; returns (outcome, calls on Drive, adapter's digest)."""
    chosen = small_settings(folder / "drive", base, work_folder=str(folder / "vm"), **LONG)
    small = prepare(chosen)
    drive.watch(folder / "drive", fails)
    try:
        outcome = training.train(small.trainer)
    finally:
        calls = drive.calls
        drive.watch(None)
    training.save_adapter(small.trainer)
    return outcome, calls, digest(chosen.folders.adapter)


@pytest.fixture(scope="module")
def undisturbed(tiny_base, tmp_path_factory, drive):
    """(calls on Drive, digest of the adapter) of a run of twenty steps to which nothing happened."""
    outcome, calls, adapter = trained(tmp_path_factory.mktemp("undisturbed"), tiny_base, drive)
    assert outcome.step == outcome.of == 20 and outcome.mirror_problem is None
    assert calls > 20, "the mirror's calls are counted"
    return calls, adapter


def places(count: int) -> list:
    """Where in the calls on Drive, as shares of them; a few in each run of the tests, the others with the matrices."""
    few = (0.5,)
    return [*few, *(pytest.param(n / count, marks=pytest.mark.more) for n in range(1, count) if n / count not in few)]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("place", places(6))
def test_a_call_on_drive_that_fails_changes_nothing(place, lasting, undisturbed, drive, tiny_base, tmp_path):
    calls, adapter = undisturbed
    first = max(2, int(place * calls))
    outcome, _, found = trained(tmp_path, tiny_base, drive, lambda n: n >= first if lasting else n == first)
    assert found == adapter
    assert outcome.step == outcome.of == 20 and outcome.ended_by == "finished"
    if lasting:
        assert "is not on Drive yet" in outcome.mirror_problem


def test_a_drive_that_cannot_be_read_at_the_start_is_not_taken_for_an_empty_one(
    drive, tiny_base, tmp_path, undisturbed
):
    (tmp_path / "drive" / "checkpoints").mkdir(parents=True)  # a folder that is not there is not listed
    with pytest.raises(OSError, match="cannot be read for a checkpoint to go on from.*mount the Drive again"):
        trained(tmp_path, tiny_base, drive, lambda call: True)
    assert trained(tmp_path, tiny_base, drive)[2] == undisturbed[1]
    outcome, _, found = trained(tmp_path, tiny_base, drive, lambda call: True)  # what is here is enough
    assert (outcome.ended_by, found) == ("finished before", undisturbed[1])


@pytest.mark.parametrize("patience", [0, pytest.param(9, marks=pytest.mark.more)])
@pytest.mark.parametrize("room", ["0k", pytest.param("60k", marks=pytest.mark.more)])
def test_a_full_disk_at_each_checkpoint_changes_nothing(
    room, patience, tiny_base, tmp_path, capsys, undisturbed, small_disk
):
    """A real one: a tmpfs that is filled up to `room`, in which no checkpoint finds place."""
    work, results = small_disk(tmp_path / "vm", 8 << 20), tmp_path / "drive"
    chosen = small_settings(results, tiny_base, work_folder=str(work), **LONG, early_stopping_patience=patience)
    small = prepare(chosen)
    fill(work, int(room[:-1]) * 1024)
    outcome = training.train(small.trainer)
    assert outcome.step == outcome.of == 20
    said = capsys.readouterr().out
    assert all(f"checkpoint-{step} was not saved" in said for step in (5, 10, 15, 20))
    assert not checkpoints.found(work / "checkpoints") and not list((work / "checkpoints").glob(".*partial"))
    entries = Metrics.read(small.trainer.monitor.metrics)
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 21))
    with pytest.raises(OSError, match=f"{work} is full; the adapter is saved in {results / 'adapter'}"):
        training.save_adapter(small.trainer)
    saved = results / "adapter"
    if not patience:
        assert digest(saved) == undisturbed[1]
    else:
        assert outcome.best_loss == min(small.trainer.monitor.losses)[0]
    (work / "filling").unlink()
    assert training.save_adapter(small.trainer) == chosen.folders.adapter
    assert digest(chosen.folders.adapter) == digest(saved)


def fill(folder: Path, leave: int) -> None:
    """Writes a file that leaves `leave` bytes free, to within a page."""
    import shutil

    with open(folder / "filling", "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - leave)))


@pytest.mark.more
def test_a_disk_that_has_room_again_gets_the_next_checkpoint(tiny_base, tmp_path, capsys, undisturbed, small_disk):
    work = small_disk(tmp_path / "vm", 8 << 20)
    small = prepare(small_settings(tmp_path / "drive", tiny_base, work_folder=str(work), **LONG))
    fill(work, 0)
    small.trainer.add_callback(RoomAt(7, work / "filling"))
    assert training.train(small.trainer).step == 20
    assert "checkpoint-5 was not saved" in capsys.readouterr().out
    assert [path.name for path in checkpoints.complete(work / "checkpoints")] == ["checkpoint-15", "checkpoint-20"]
    training.save_adapter(small.trainer)
    assert digest(small.settings.folders.adapter) == undisturbed[1]
    metrics = Metrics(small.settings.folders.metrics).read()
    assert [entry["step"] for entry in metrics if "loss" in entry] == list(range(1, 21))


class RoomAt(TrainerCallback):
    """Somebody frees the disk at a step."""

    def __init__(self, step: int, file: Path):
        self.step, self.file = step, file

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.file.unlink()


def test_what_changed_since_a_checkpoint_is_said_in_words(tiny_base, tmp_path):
    """Other weights under the same name, another held-out set: the settings are the same."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    chosen = small_settings(tmp_path / "run", base, max_steps=2)
    training.train(prepare(chosen).trainer)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.bias"] = weights["lm_head.bias"] + torch.tensor(1e-3)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the base's weights changed\nSet them back, or set resume = False"):
        training.train(prepare(chosen).trainer)
    shutil.rmtree(base)
    shutil.copytree(tiny_base, base)
    stopping = dataclasses.replace(chosen, eval_pairs=3, early_stopping_patience=2, eval_steps=1)
    with pytest.raises(ValueError, match="the held-out set changed"):
        training.train(prepare(stopping).trainer)


def test_another_held_out_set_is_said_and_changes_nothing_where_it_decides_nothing(tiny_base, tmp_path, capsys):
    """The adapter is that of a run with one set; losses on the other set are not drawn into the same curve."""
    same = {"warmup_ratio": 0.0, "eval_steps": 1}
    once = prepare(small_settings(tmp_path / "once", tiny_base, max_steps=4, **same))
    training.train(once.trainer)
    chosen = small_settings(tmp_path / "twice", tiny_base, max_steps=2, early_stopping_patience=9, **same)
    training.train(prepare(chosen).trainer)
    assert (chosen.folders.checkpoints / "best").exists()
    changed = dataclasses.replace(chosen, max_steps=4, eval_pairs=3, early_stopping_patience=0)
    twice = prepare(changed)
    outcome = training.train(twice.trainer)
    assert (outcome.resumed_from, outcome.step) == ("checkpoint-2", 4)
    assert "the held-out set changed" in capsys.readouterr().out
    assert [step for _, step in twice.trainer.monitor.metrics.evaluations()] == [3, 4]
    assert not (chosen.folders.checkpoints / "best").exists(), "the other set had chosen it"
    ours, theirs = (run.trainer.model.state_dict() for run in (twice, once))
    assert all(ours[name].equal(theirs[name]) for name in theirs if "lora_" in name)
    training.train(prepare(dataclasses.replace(changed, early_stopping_patience=1)).trainer)
    assert "the held-out set changed" not in capsys.readouterr().out


def test_checkpoints_that_are_all_damaged_are_not_written_over(tiny_base, tmp_path, capsys):
    chosen = small_settings(tmp_path, tiny_base, max_steps=4, save_steps=2)
    training.train(prepare(chosen).trainer)
    older, newer = checkpoints.complete(tmp_path / "checkpoints")
    damage(newer)
    assert checkpoints.newest(tmp_path / "checkpoints", tmp_path / "checkpoints") == older
    assert f"passed over, for its files are not those that were written: {newer.name}" in capsys.readouterr().out
    damage(older)
    with pytest.raises(ValueError, match="checkpoint-2.*checkpoint-4 are not those that were written.*resume = False"):
        training.train(prepare(chosen).trainer)
    afresh = training.train(prepare(dataclasses.replace(chosen, resume=False)).trainer)
    assert (afresh.resumed_from, afresh.step) == (None, 4)
    assert len(checkpoints.found(tmp_path / "checkpoints-before-1")) == 2


def damage(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")

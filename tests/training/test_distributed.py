"""Several processes: the same run as one, and all of them stop together."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from servers import free_port
from training_fixtures import prepare, small_pairs, small_settings, write_lines

from llm_finetuning import settings
from llm_finetuning.training import checkpoints, qlora
from llm_finetuning.training import resumable as training
from llm_finetuning.training.dataset import read_inputs

pytestmark = pytest.mark.slow
SUPPORT = Path(__file__).parents[1] / "support"
WATCHED = {"tokens_per_step": 384, "eval_steps": 2, "early_stopping_patience": 3}


def write_run(folder: Path, base: Path, **changed) -> Path:
    """A folder with pairs and settings.json, as the notebooks leave it."""
    chosen = small_settings(folder, base, lora_dropout=0.0, num_train_epochs=1.0, **changed)
    for file, count in ((chosen.folders.train_file, 24), (chosen.folders.val_file, 4)):
        write_lines(file, small_pairs(count))
    return chosen.folders.settings if chosen.save(chosen.folders.settings) else None


def launch(settings_file: Path, processes: int) -> subprocess.CompletedProcess:
    where = ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return run_module("torch.distributed.run", *where, "-m", "llm_finetuning.train", str(settings_file))


def train_here(settings_file: Path) -> None:
    """The same without torchrun, in this process: what the notebook does."""
    chosen = settings.from_file(settings.Finetuning, settings_file)
    small = prepare(chosen, inputs=read_inputs(chosen))
    training.train(small.trainer)
    training.save_adapter(small.trainer)


def launch_faulty(settings_file: Path, rank: int, step: int, number: int, *more: str) -> subprocess.CompletedProcess:
    """Two processes, one of which gets an error of that number when it writes its part of the checkpoint of a step."""
    where = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    words = [str(settings_file), str(rank), str(step), str(number), *more]
    return run_module("torch.distributed.run", *where, str(SUPPORT / "train_faulty.py"), *words)


def launch_sharded(settings_file: Path, *more: str) -> subprocess.CompletedProcess:
    """The README's command for FSDP, by way of train_sharded.py, for there is no GPU."""
    where = ["--config_file", "profiles/accelerate/fsdp.yaml", "--main_process_port", str(free_port())]
    return run_module(
        "accelerate.commands.launch", *where, str(SUPPORT / "train_sharded.py"), str(settings_file), *more
    )


def run_module(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=SUPPORT.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT.parents[1])},
    )


def losses(folder: Path, name: str = "loss") -> list:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def test_two_processes_train_as_one_with_twice_the_accumulation(tiny_base, tmp_path):
    train_here(write_run(tmp_path / "1", tiny_base, tokens_per_step=384))
    done = launch(write_run(tmp_path / "2", tiny_base, tokens_per_step=384), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) > 2
    assert two == pytest.approx(one, abs=1e-3)
    found = checkpoints.complete(tmp_path / "2" / "checkpoints")
    assert checkpoints.step_of(found[-1]) == len(two)
    assert (tmp_path / "2" / "adapter" / "adapter_model.safetensors").is_file()


PLAN = """
import dataclasses, os, sys
from pathlib import Path
from llm_finetuning import hardware, train
from llm_finetuning.training import planning

usual, rank = hardware.detect("float32"), int(os.environ["RANK"])
config = train.read_settings(Path(sys.argv[1]))
for free in ((7, 5), (4, 6)):
    hardware.detect = lambda dtype: dataclasses.replace(usual, free_memory=free[rank] * 2**30)
    plan = planning.plan_run(config, train.read_inputs(config))
    print("planned", plan.machine.free_memory, plan.micro_batch_tokens)
"""


def test_processes_with_unequal_memory_make_the_same_plan(tiny_base, tmp_path):
    """Of micro-batches of other sizes each would have another number, and wait for the others in the last ones."""
    settings_file = write_run(tmp_path, tiny_base, tokens_per_step=384)
    (tmp_path / "plan.py").write_text(PLAN)
    where = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    done = run_module("torch.distributed.run", *where, str(tmp_path / "plan.py"), str(settings_file))
    assert done.returncode == 0, done.stderr[-3000:]
    plans = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("planned")]
    assert len(plans) == 4 and len({tuple(plan) for plan in plans}) == 2, done.stdout
    assert sorted(int(free) for free, _ in plans) == [size * 2**30 for size in (4, 4, 5, 5)]


@pytest.fixture(scope="module")
def undisturbed(tiny_base, tmp_path_factory) -> Path:
    """A folder with a run of two processes to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launch(write_run(folder, tiny_base, **WATCHED), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def equal_adapters(here: Path, there: Path) -> bool:
    ours, theirs = adapter(here), adapter(there)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.more
@pytest.mark.parametrize(("rank", "number"), [(1, errno.ENOSPC), (0, errno.EDQUOT)])
def test_a_checkpoint_that_one_process_cannot_write_is_left_out_by_all(rank, number, undisturbed, tiny_base, tmp_path):
    done = launch_faulty(write_run(tmp_path, tiny_base, **WATCHED), rank, 2, number)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checkpoint-2 was not saved") == 1
    found = [path.name for path in checkpoints.complete(tmp_path / "checkpoints")]
    assert found == ["checkpoint-4"] and not list((tmp_path / "checkpoints").glob(".*partial"))
    assert equal_adapters(tmp_path / "adapter", undisturbed / "adapter")


@pytest.mark.more
@pytest.mark.parametrize("rank", [0, 1])
def test_another_fault_in_one_process_ends_all_of_them(rank, tiny_base, tmp_path):
    done = launch_faulty(write_run(tmp_path, tiny_base, **WATCHED), rank, 2, errno.EACCES)
    assert done.returncode != 0
    assert "Permission denied" in done.stderr and "another process could not write its part" in done.stderr
    assert not checkpoints.complete(tmp_path / "checkpoints")


@pytest.mark.more
@pytest.mark.parametrize("shards", [True, False], ids=["sharded", "each whole"])
def test_a_full_disk_ends_no_run_of_several_processes(shards, undisturbed, sharded, tiny_base, tmp_path, small_disk):
    """A real one: no checkpoint, no best adapter, no metrics find room; the adapter is saved with the results."""
    work, results = small_disk(tmp_path / "vm", 8 << 20), tmp_path / "drive"
    file = write_run(results, tiny_base, work_folder=str(work), **WATCHED)
    done = launch_sharded(file, "fill") if shards else launch_faulty(file, 0, -1, 0, "fill")
    assert [done.stdout.count(f"checkpoint-{step} was not saved") for step in (2, 4)] == [1, 1], done.stderr[-3000:]
    assert f"{work} is full; the adapter is saved in {results / 'adapter'}" in done.stderr
    assert not checkpoints.found(work / "checkpoints")
    assert equal_adapters(results / "adapter", (sharded if shards else undisturbed) / "adapter")


@pytest.mark.more
def test_every_process_stops_when_one_fails(tiny_base, tmp_path):
    file = write_run(tmp_path, tiny_base, tokens_per_step=384, learning_rate=1e30, max_grad_norm=0.0)
    done = launch(file, 2)
    assert done.returncode != 0
    assert "the loss is" in done.stderr
    assert not (tmp_path / "adapter").exists()


@pytest.fixture(scope="module")
def sharded(tiny_base, tmp_path_factory):
    """A folder with a run whose model two processes shared."""
    folder = tmp_path_factory.mktemp("sharded")
    done = launch_sharded(write_run(folder, tiny_base, **WATCHED))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the model is sharded across" in done.stdout
    assert "Excluding from FSDP2 sharding" not in done.stderr, "accelerate left the 4-bit weights whole"
    return folder


@pytest.mark.more
def test_a_shared_model_trains_as_a_whole_one(sharded, tiny_base, tmp_path):
    train_here(write_run(tmp_path, tiny_base, **WATCHED))
    for name in ("loss", "held_out_loss", "grad_norm"):
        assert losses(sharded, name) == pytest.approx(losses(tmp_path, name), abs=1e-3)
    assert losses(sharded, "answers") == losses(tmp_path, "answers")
    here, there = adapter(sharded / "adapter"), adapter(tmp_path / "adapter")
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert torch.allclose(here[name], tensor, atol=1e-4), name


@pytest.mark.more
def test_a_shared_model_goes_on_from_its_checkpoint(sharded, tiny_base, tmp_path):
    before = adapter(sharded / "adapter")
    folder = tmp_path / "again"
    shutil.copytree(sharded, folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(checkpoints.complete(folder / "checkpoints")[-1])
    chosen = settings.from_file(settings.Finetuning, sharded / "settings.json")
    moved = dataclasses.replace(chosen, drive_folder=str(folder), work_folder=str(folder))
    moved.save(folder / "settings.json")
    with pytest.raises(ValueError, match="not over at step 2: go on with the command that began it"):
        small = prepare(moved, inputs=read_inputs(chosen))
        training.train(small.trainer)
    done = launch_sharded(folder / "settings.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "went on from checkpoint-2, now at step 4 of 4" in done.stdout
    after = adapter(folder / "adapter")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.more
def test_the_notebook_takes_what_a_shared_model_learned(sharded):
    chosen = settings.from_file(settings.Finetuning, sharded / "settings.json")
    small = prepare(chosen, inputs=read_inputs(chosen))
    outcome = training.train(small.trainer)
    assert (outcome.resumed_from, outcome.step, outcome.of) == ("checkpoint-4", 4, 4)
    learned = adapter(sharded / "adapter")
    for name, tensor in qlora.gather_adapter(small.model).items():
        assert torch.equal(tensor, learned[name.replace(".default", "")])
    longer = prepare(dataclasses.replace(chosen, num_train_epochs=2.0, warmup_ratio=0.0), inputs=read_inputs(chosen))
    with pytest.raises(ValueError, match="not over at step 4: go on with the command that began it"):
        training.train(longer.trainer)


def test_settings_come_back_from_their_file(tmp_path):
    chosen = small_settings(tmp_path, "m")
    chosen.save(tmp_path / "settings.json")
    assert settings.from_file(settings.Finetuning, tmp_path / "settings.json") == chosen
    with pytest.raises(FileNotFoundError, match="the finetuning notebook writes it"):
        settings.from_file(settings.Finetuning, tmp_path / "other.json")
    (tmp_path / "settings.json").write_text("{\n oops")
    with pytest.raises(ValueError, match="settings.json:2: no JSON"):
        settings.from_file(settings.Finetuning, tmp_path / "settings.json")

"""What a run of Phi-2's true size writes, against disks that are really so small: tmpfs, of which little is filled."""

import dataclasses
import errno
import os

import pytest
from training_fixtures import small_settings

from llm_finetuning.hardware import GIB, Machine
from llm_finetuning.training import planning, storage

PHI2 = {"max_seq_length": 512, "tokens_per_step": 512, "micro_batch_tokens": 512, "lora_r": 64}


@pytest.fixture
def disk(tmp_path, small_disk):
    """disk(name, gigabytes) → a folder on a disk of its own with so much room."""
    return lambda name, gigabytes: small_disk(tmp_path / name, gigabytes * 1e9)


@pytest.fixture(scope="module")
def size(tmp_path_factory, phi2):
    """Phi-2's counts, from its configuration alone."""
    import torch

    settings = small_settings(tmp_path_factory.mktemp("size"), "x", **PHI2)
    return planning.model_size.measure_size(settings, phi2, torch.bfloat16, True)


@pytest.fixture
def run(size):
    """run(results, work, **settings) → the plan of a run of Phi-2, whose base is on this machine."""

    def make(results, work, **changed):
        import torch

        settings = small_settings(results, "x", work_folder=str(work), **PHI2 | changed)
        a100 = Machine("cuda:0", "A100", (8, 0), 40 * GIB, 40 * GIB, 80 * GIB, 8, 250e12, True)
        counts = {
            "micro_batch_tokens": 512,
            "accumulation": 1,
            "processes": 1,
            "shards": 1,
            "examples": 1,
            "tokens": 512,
        }
        decided = {"dtype": torch.bfloat16, "attention": "sdpa", "gradient_checkpointing": False, "optimizer": "x"}
        return planning.Plan(settings, a100, size, **decided, **counts, steps=1, memory={}, model_path=work)

    return make


def sparse(path, gigabytes):
    """A file of that size which takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, int(gigabytes * 1e9))


def test_what_phi2_writes_is_counted_whole(run, tmp_path):
    plan = run(tmp_path / "drive", tmp_path / "work")
    adapter, model, held = 4 * 94_371_840, 2 * 2_779_683_840, 2_516_582_400 * 4.5 / 8
    assert plan.checkpoint_bytes == 3 * adapter
    assert plan.disk_work == 3 * plan.checkpoint_bytes + adapter + 2 * model + held
    assert plan.disk_drive == 3 * plan.checkpoint_bytes + adapter + adapter + model
    alone = run(tmp_path, tmp_path)
    assert alone.disk_drive == adapter + model, "checkpoints and adapter lie there already"


def test_a_first_run_fits_in_a_free_drive_and_a_second_beside_its_model_does_not(run, disk, tmp_path):
    drive, work = disk("drive", 15), disk("work", 30)
    assert storage.check(run(drive, work)) is None
    taken = 5.56 + 0.38 * 2 + 1.13 * 2  # what the first left
    second = disk("drive", 15 - taken)
    sparse(second / "finetuned_phi2" / "model.safetensors", 5.56)
    sparse(second / "adapter" / "adapter_model.safetensors", 0.38)
    sparse(second / "adapter.zip", 0.38)
    for step in (50, 100):
        sparse(second / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", 1.13)
    with pytest.raises(OSError, match="published model 5.56 GB.*Set save_total_limit = 1, which takes 1.13 GB") as e:
        storage.check(run(second, work))
    assert e.value.errno == errno.ENOSPC and str(second) in str(e.value) and "empty the bin" in str(e.value)
    assert storage.check(run(second, work, save_total_limit=1)) is None


def test_the_version_before_and_what_was_cut_off_make_room(run, disk):
    drive, work = disk("drive", 5), disk("work", 30)
    with pytest.raises(OSError, match="on Drive empty the bin"):
        storage.check(run(drive, work, save_total_limit=1))
    sparse(drive / ".finetuned_phi2.previous" / "model.safetensors", 4)
    assert storage.check(run(drive, work, save_total_limit=1)) is None


def test_one_disk_holds_both_and_is_counted_once_a_stage(run, disk):
    both = disk("both", 18)  # two merged models and the 4-bit weights; or a model, its copy, adapter and zip
    assert storage.check(run(both, both)) is None
    assert storage.check(run(both / "drive", both / "work", save_total_limit=1)) is None
    with pytest.raises(OSError, match="this run writes 19.05 GB there beside what it replaces .*the published model"):
        storage.check(run(both / "drive", both / "work", merge_base="original"))
    small = disk("small", 15.5)
    with pytest.raises(OSError, match="has 15.50 GB free, and this run writes 16.31 GB .*Set save_total_limit = 1"):
        storage.check(run(small, small))


def test_both_disks_are_named_at_once(run, disk):
    with pytest.raises(OSError) as error:
        storage.check(run(disk("drive", 1), disk("work", 2)))
    drive, work = sorted(str(error.value).splitlines())
    assert "drive has 1.00 GB free" in drive and "work has 2.00 GB free" in work


def test_a_base_that_has_to_be_fetched_needs_room_where_it_goes(run, disk, monkeypatch):
    cache = disk("cache", 5)
    monkeypatch.setattr(storage, "HF_HUB_CACHE", str(cache))
    plan = run(disk("drive", 15), disk("work", 30), model_name="owner/base")
    assert storage.check(plan) is None
    with pytest.raises(OSError, match="cache has 5.00 GB free.*the base's download 5.56 GB"):
        storage.check(dataclasses.replace(plan, model_path=None))


def test_uploads_wait_on_the_disk_of_the_machine(run, disk, google_drive, on_colab, monkeypatch):
    """Drive has room; the machine, which holds what it has not uploaded yet, has not."""
    drive = disk(google_drive.view().relative_to(on_colab.parent) / "MyDrive", 15)
    work, cache = disk("work", 30), disk("vm", 8)
    monkeypatch.setattr(storage.drive, "CACHE", cache)
    with pytest.raises(OSError, match="vm has 8.00 GB free.*uploads that wait"):
        storage.check(run(drive / "llm_finetuning", work))

"""The file with the 4-bit weights: what a fresh quantisation gives, to the byte, and never that of another base."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_fixtures import prepare, small_settings
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llm_finetuning.evaluation import scoreboard
from llm_finetuning.files import checksums, shards
from llm_finetuning.release import held_weights, merging, verify
from llm_finetuning.training import resumable as training

SCRIPT = Path(__file__).parents[1] / "support" / "merge_small.py"


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A trained small run whose 4-bit weights are in their file, and the trained model's held-out loss."""
    small = prepare(small_settings(tmp_path_factory.mktemp("run"), tiny_base))
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    small.after = scoreboard.held_out_loss(small.trainer.model, small.held_out, small.template)
    small.quantised = merging.quantised_names(small.trainer.model)
    held_weights.save(small.trainer.model, small.plan)
    small.file = small.settings.folders.merged / held_weights.NAME
    return small


def merge(small, folder: Path, **changed) -> dict[str, str]:
    """Merges in `folder`, with the file that lies there, if any; the hash of each file that was written."""
    settings = small_settings(folder, small.settings.model_name, **changed)
    shutil.copytree(small.settings.folders.adapter, settings.folders.adapter, dirs_exist_ok=True)
    plan = dataclasses.replace(small.plan, settings=settings)
    merged = verify.merge_and_verify(plan, small.quantised, small.template, small.held_out, small.after)
    assert not (settings.folders.merged / held_weights.NAME).exists(), "it goes with the verified merge"
    return {merged.base: ""} | checksums.hash_files(merged.folder, checksums.files_below(merged.folder))


def copied(small, folder: Path) -> Path:
    """The file in the run `folder`."""
    file = folder / "merged" / held_weights.NAME
    file.parent.mkdir(parents=True)
    return Path(shutil.copy(small.file, file))


@pytest.fixture(scope="module")
def fresh(trained, tmp_path_factory) -> dict[str, dict[str, str]]:
    """What merges without the file write, by `merge_base`."""
    return {base: merge(trained, tmp_path_factory.mktemp(base), merge_base=base) for base in ("best", "dequantized")}


@pytest.mark.parametrize("base", ["best", "dequantized"])
def test_a_merge_from_the_file_is_the_same_to_the_byte_and_quantises_nothing(
    base, trained, fresh, tmp_path, monkeypatch
):
    copied(trained, tmp_path)
    monkeypatch.setattr(merging, "quantize_dequantize", lambda *_: pytest.fail("the base was quantised again"))
    assert merge(trained, tmp_path, merge_base=base) == fresh[base]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_file_holds_what_a_fresh_quantisation_gives(kind, double, tiny_base, tmp_path):
    """Compared with bitsandbytes' own functions, tensor by tensor: packed weights, constants, and dequantised."""
    settings = small_settings(tmp_path, tiny_base, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    small = prepare(settings)
    held_weights.save(small.trainer.model, small.plan)
    base, held = shards.Weights(tiny_base), held_weights.find(small.plan)
    stored = load_file(held.path)
    names = merging.quantised_names(small.trainer.model)
    assert len(names) == 12
    for name in names:
        packed, state = functional.quantize_4bit(
            base.read(name).to(small.plan.dtype), quant_type=kind, compress_statistics=double, blocksize=64
        )
        assert torch.equal(stored[name], packed)
        for part, tensor in state.as_dict(packed=True).items():
            assert torch.equal(stored[f"{name}.{part}"], tensor), part
        assert torch.equal(held.read(name, "cpu"), functional.dequantize_4bit(packed, state))


def test_the_file_is_what_transformers_writes_of_a_4_bit_model(trained, tiny_base, tmp_path):
    """The same names and bytes as in a checkpoint that the library itself saves."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=trained.plan.dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=trained.plan.dtype, quantization_config=config)
    model.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), load_file(trained.file)
    assert set(ours) < set(theirs)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def other_base(small, file: Path) -> None:
    """As if the base's weights had changed since the file was written."""
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file(load_file(file), file, metadata=about | {"base": "0" * 64})


def other_kind(small, file: Path) -> None:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file(load_file(file), file, metadata=about | {"double_quant": "False"})


def unsigned(small, file: Path) -> None:
    save_file(load_file(file), file)


def cut(small, file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def emptied(small, file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [other_base, other_kind, unsigned, cut, emptied, lambda small, file: file.unlink()])
def test_a_file_that_is_not_of_this_base_is_not_taken(harm, trained, tmp_path):
    file = copied(trained, tmp_path)
    plan = dataclasses.replace(trained.plan, settings=small_settings(tmp_path, trained.settings.model_name))
    assert held_weights.find(plan) is not None
    harm(trained, file)
    assert held_weights.find(plan) is None


def test_where_the_file_is_of_another_base_the_merge_quantises_anew(trained, fresh, tmp_path):
    other_base(trained, copied(trained, tmp_path))
    assert merge(trained, tmp_path, merge_base="dequantized") == fresh["dequantized"]


@pytest.mark.parametrize("changed", [{"merge_base": "original"}, {"use_4bit": "no"}])
def test_nothing_is_written_where_nothing_is_dequantised(changed, tiny_base, tmp_path):
    small = prepare(small_settings(tmp_path, tiny_base, **changed))
    held_weights.save(small.trainer.model, small.plan)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("when", [7, *(pytest.param(n, marks=pytest.mark.more) for n in (1, 12, 13, 24))])
def test_a_merge_that_was_killed_is_made_again_by_another_process(when, trained, fresh, tmp_path):
    """Neither has the trained model; the first has the file, the second has it after an even number of tensors."""
    file = copied(trained, tmp_path)
    shutil.copytree(trained.settings.folders.adapter, tmp_path / "adapter")
    (tmp_path / "noted.json").write_text(json.dumps({"quantised": sorted(trained.quantised), "loss": trained.after}))
    command = [sys.executable, str(SCRIPT), str(tmp_path), trained.settings.model_name, str(when)]
    path = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    if when % 2:
        file.unlink()
    again = merge(trained, tmp_path)
    assert again == fresh["best"]
    assert os.listdir(tmp_path / "merged") == [next(iter(again))]

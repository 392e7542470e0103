"""Preference tuning as a script: which notebook's settings they are, and two processes as one."""

import json
from pathlib import Path

import pytest
from preference_fixtures import beside
from test_distributed import launch
from training_fixtures import small_settings

from llm_finetuning import train as script
from llm_finetuning.settings import Finetuning, PreferenceTuning
from llm_finetuning.training import planning


def written(finetuned: Path, folder: Path, base: Path, **changed) -> Path:
    """preference_settings.json, as the notebook leaves it."""
    folder.mkdir()
    chosen = beside(finetuned, folder, base, pairs_per_step=8, eval_steps=1, **changed)
    return chosen.save(chosen.folders.settings)


def test_the_script_takes_the_settings_of_both_notebooks(finetuned, tiny_base, tmp_path):
    tuned = script.read_settings(written(finetuned, tmp_path / "tuned", tiny_base))
    assert isinstance(tuned, PreferenceTuning) and tuned.lora_r == 4, "ranks are those of the adapter"
    chosen = small_settings(tmp_path, tiny_base)
    assert type(script.read_settings(chosen.save(chosen.folders.settings))) is Finetuning
    with pytest.raises(FileNotFoundError, match="none.json not found"):
        script.read_settings(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"pairs_per_step": 3')
    with pytest.raises(ValueError, match=r"broken.json:1: no JSON"):
        script.read_settings(broken)


def test_a_sharded_model_is_refused_before_the_base_is_loaded(finetuned, tiny_base, tmp_path, monkeypatch):
    config = script.read_settings(written(finetuned, tmp_path / "run", tiny_base))
    inputs = script.read_inputs(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(planning.models, "locate", lambda *_: pytest.fail("the base was fetched"))
    with pytest.raises(ValueError, match="does not shard the model: start it with torchrun"):
        planning.plan_run(config, inputs)


@pytest.mark.more
@pytest.mark.slow
def test_two_processes_tune_as_one(finetuned, tiny_base, tmp_path):
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = launch(written(finetuned, folder, tiny_base, loss="sigmoid", num_train_epochs=2.0), processes)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (folder / "preference_metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
        assert (folder / "preference_adapter" / "SHA256SUMS").is_file()
    for name in ("loss", "accuracy", "margin", "rewards/margins"):
        one, two = ([entry[name] for entry in entries if name in entry] for entries in found)
        assert len(one) == len(two) > 2 and two == pytest.approx(one, abs=1e-3), name

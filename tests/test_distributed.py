"""Several processes: the same run as one, and all of them stop together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training_fixtures import small_pairs, small_settings, tiny_base  # noqa: F401

from llm_finetuning import checkpoints, settings

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent


def write_run(folder: Path, base: Path, **changed) -> Path:
    """A folder with pairs and settings.json, as the notebooks leave it."""
    chosen = small_settings(folder, base, lora_dropout=0.0, num_train_epochs=1.0, **changed)
    chosen.folders.train_file.parent.mkdir(parents=True)
    for file, count in ((chosen.folders.train_file, 24), (chosen.folders.val_file, 4)):
        file.write_text("".join(json.dumps(pair) + "\n" for pair in small_pairs(count)))
    return chosen.folders.settings if chosen.save(chosen.folders.settings) else None


def launch(settings_file: Path, processes: int) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)),
            *("--master_addr", "127.0.0.1", "--master_port", str(port)),
            *("-m", "llm_finetuning.train", str(settings_file)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=TESTS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_two_processes_train_as_one_with_twice_the_accumulation(tiny_base, tmp_path):  # noqa: F811
    for processes in (1, 2):
        done = launch(write_run(tmp_path / str(processes), tiny_base, tokens_per_step=384), processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) > 2
    assert two == pytest.approx(one, abs=1e-3)
    found = checkpoints.complete(tmp_path / "2" / "checkpoints")
    assert checkpoints.step_of(found[-1]) == len(two)
    assert (tmp_path / "2" / "adapter" / "adapter_model.safetensors").is_file()


def test_every_process_stops_when_one_fails(tiny_base, tmp_path):  # noqa: F811
    file = write_run(tmp_path, tiny_base, tokens_per_step=384, learning_rate=1e30, max_grad_norm=0.0)
    done = launch(file, 2)
    assert done.returncode != 0
    assert "the loss is" in done.stderr
    assert not (tmp_path / "adapter").exists()


def test_settings_come_back_from_their_file(tmp_path):
    chosen = small_settings(tmp_path, "m")
    chosen.save(tmp_path / "settings.json")
    assert settings.from_file(settings.Finetuning, tmp_path / "settings.json") == chosen
    with pytest.raises(FileNotFoundError, match="the finetuning notebook writes it"):
        settings.from_file(settings.Finetuning, tmp_path / "other.json")
    (tmp_path / "settings.json").write_text("{\n oops")
    with pytest.raises(ValueError, match="settings.json:2: no JSON"):
        settings.from_file(settings.Finetuning, tmp_path / "settings.json")

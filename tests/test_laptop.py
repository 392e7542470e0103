"""The repository's own notebooks on a laptop, without Colab and without a network: one sentence, nothing is made."""

import os
from pathlib import Path

import huggingface_hub.constants
import nbformat
import pytest
from shell_fixtures import shown

from llm_finetuning import settings, tracebacks
from llm_finetuning.data import oasst
from llm_finetuning.data.generation.cache import AnswerCache
from llm_finetuning.files import drive
from llm_finetuning.files.atomic import write_json
from llm_finetuning.runner import notebooks
from llm_finetuning.training.metrics import Metrics

each = pytest.mark.parametrize("notebook", [step.notebook for step in notebooks.STEPS], ids=lambda path: path.stem)


def first_cells(notebook: Path) -> list[str]:
    """Parameters, set-up, settings."""
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"][:3]


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    """No Colab, no Hub."""
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@each
def test_colabs_folders_are_named_in_one_sentence_and_not_made(notebook, shell):
    before = os.path.exists("/content") and sorted(os.listdir("/content"))
    parameters, set_up, settings_cell = first_cells(notebook)
    assert shown(shell, parameters) == shown(shell, set_up) == ("", None)
    text, error = shown(shell, settings_cell)
    assert type(error) is ValueError and len(text.strip().splitlines()) == 1
    assert text.startswith("drive_folder = '/content/drive/MyDrive/llm_finetuning'")
    assert "Colab's, and this is not Colab. Say `make run` in a terminal" in text and "set drive_folder" in text
    assert (os.path.exists("/content") and sorted(os.listdir("/content"))) == before


@each
def test_with_folders_of_this_machine_the_next_thing_missing_is_a_sentence_too(notebook, shell, tmp_path):
    parameters, set_up, settings_cell = first_cells(notebook)
    shown(shell, parameters)
    text, error = shown(shell, settings_cell, drive_folder=str(tmp_path / "d"), work_folder=str(tmp_path / "w"))
    if "Data Prep" in str(notebook):
        assert type(error) is ConnectionError
        assert text.startswith("model_name = 'microsoft/phi-2' is not on this machine, and the Hub cannot be reached")
    elif "Inference" in str(notebook):
        assert type(error) is FileNotFoundError and "finetuned_phi2 is not there. Run the finetuning notebook" in text
    else:
        text, error = shown(shell, "from llm_finetuning.training.dataset import read_inputs; read_inputs(settings)")
        assert type(error) is FileNotFoundError and "finetuning_data_train.jsonl not found: run" in text
    assert len(text.strip().splitlines()) == 1


def test_a_dataset_of_the_hub_without_a_network_is_one_sentence(shell):
    text, error = shown(shell, "read('OpenAssistant/oasst1', 'train')", read=oasst.read_messages)
    assert type(error) is ConnectionError and len(text.strip().splitlines()) == 1
    assert text.startswith("source = 'OpenAssistant/oasst1' is not on this machine, and the Hub cannot be reached")


def test_a_script_on_a_colab_machine_may_use_its_folders(monkeypatch, tmp_path):
    """torchrun in Colab's terminal: google.colab is not imported there."""
    monkeypatch.setattr(drive, "CACHE", tmp_path)
    monkeypatch.setattr(drive, "MOUNT", tmp_path / "drive")
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    folders = {"drive_folder": str(tmp_path / "drive" / "MyDrive" / "x"), "work_folder": str(tmp_path / "work")}
    with pytest.raises(ValueError, match="this is not Colab"):
        drive.check_folders(folders)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external_20260801")
    assert drive.check_folders(folders) is None


def test_in_colab_a_drive_that_is_not_mounted_is_said_before_anything_is_made(on_colab):
    values = {name: getattr(settings.Finetuning(), name) for name in settings.Finetuning.__dataclass_fields__}
    values |= {"drive_folder": f"{drive.MOUNT}/MyDrive/x", "work_folder": str(on_colab / "work")}
    with pytest.raises(OSError, match="Drive is not mounted, or its connection is lost. Run the set-up cell"):
        settings.from_cell(settings.Finetuning, values)
    assert not drive.MOUNT.exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: Metrics(path).write({"step": 1, "loss": 2.0}),
        lambda path: Metrics(path).cut_after(1),
        lambda path: AnswerCache(path),
        lambda path: write_json(path, {}),
    ],
    ids=["metrics", "metrics of a run that goes on", "generated answers", "JSON"],
)
def test_on_a_drive_that_went_away_a_sentence_says_so_and_nothing_is_made(write, on_colab):
    with pytest.raises(OSError, match="Drive is not mounted, or its connection is lost. Run the set-up cell") as error:
        write(drive.MOUNT / "MyDrive" / "llm_finetuning" / "work" / "file.jsonl")
    assert tracebacks.is_curable(error.value, error.tb)
    assert not drive.MOUNT.exists()

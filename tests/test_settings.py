"""The hyperparameter cell: every mistake is named before anything is loaded."""

import dataclasses
import subprocess
import sys

import pytest
from training_fixtures import SMALL, small_settings

from llm_finetuning import settings


def test_a_name_missing_from_the_cell_is_named(tmp_path):
    cell = {name: value for name, value in SMALL.items() if name != "lora_r"}
    with pytest.raises(ValueError, match="lora_r is missing"):
        settings.from_cell(settings.Finetuning, cell | {"drive_folder": "d", "work_folder": "w", "model_name": "m"})


def test_whole_numbers_serve_as_rates(tmp_path):
    assert small_settings(tmp_path, "m", num_train_epochs=3).num_train_epochs == 3.0


def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        small_settings(tmp_path, "m", lora_r=0, learning_rate=-1.0, dtype="int3", publish_to="hub", eval_steps=-5)
    for name in ("lora_r", "learning_rate", "dtype", "hub_repository", "eval_steps"):
        assert name in str(error.value)


def test_wrong_types_are_named_with_what_was_found(tmp_path):
    with pytest.raises(ValueError, match="lora_r = '64': expected int, found str"):
        small_settings(tmp_path, "m", lora_r="64")
    with pytest.raises(ValueError) as error:
        small_settings(tmp_path, "m", own_questions="What is a haiku?", learning_rate=None, quick_trial="yes")
    assert sorted(str(error.value).splitlines()[1:]) == [
        "learning_rate = None: expected float, found nothing",
        'own_questions = \'What is a haiku?\': expected a list such as ["one", "two"], found str',
        "quick_trial = 'yes': expected True or False, found str",
    ]


@pytest.mark.parametrize(
    "settings_class", [settings.DataPrep, settings.Finetuning, settings.PreferenceTuning, settings.Inference]
)
def test_every_setting_says_what_it_is(settings_class):
    fields = settings_class.__pydantic_fields__
    assert [name for name, field in fields.items() if not field.description] == []


def test_what_depends_on_another_setting_is_told_with_the_rest(tmp_path):
    with pytest.raises(ValueError) as error:
        settings.Finetuning(
            lora_alpha=True,
            num_train_epochs=0,
            tokens_per_step=512,
            micro_batch_tokens=1,
            use_dora=True,
            lora_dropout=0.1,
            init_lora_weights="orthogonal",
            lora_r=3,
            publish_to="hub",
        )
    assert str(error.value).splitlines() == [
        "Finetuning settings:",
        "lora_alpha = True: expected int, found bool",
        "use_dora = True: needs lora_dropout = 0, for with dropout every weight is kept in 16 bits too",
        "init_lora_weights = 'orthogonal': needs use_4bit = 'no' and an even lora_r; else set 'default'",
        "num_train_epochs = 0.0: above 0, or set max_steps",
        "tokens_per_step = 512: at least max_seq_length (1024)",
        "micro_batch_tokens = 1: 0 or at least max_seq_length (1024)",
        "hub_repository = '': publish_to = 'hub' needs user/name",
    ]


def test_a_changed_copy_is_checked_too():
    with pytest.raises(ValueError, match="replies = 'most': one of best, all, joined"):
        dataclasses.replace(settings.DataPrep(), replies="most")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.Inference().seed = 1


@pytest.mark.parametrize(
    ("module", "heavy"), [("settings", {"torch", "transformers", "pandas"}), ("data.prepare", {"torch"})]
)
def test_settings_and_data_import_nothing_heavy(module, heavy):
    code = f"import sys, llm_finetuning.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy & set(done.stdout.split()) == set()


def test_folders_are_laid_out_as_documented(tmp_path):
    folders = small_settings(tmp_path, "m").folders
    assert folders.published == tmp_path / "finetuned_phi2"
    assert folders.train_file == tmp_path / "data" / "finetuning_data_train.jsonl"
    assert dataclasses.is_dataclass(folders)


def test_inference_takes_a_published_model_by_its_name_or_its_path(tmp_path):
    (tmp_path / "preferred_phi2").mkdir()
    for given, found in (("", "finetuned_phi2"), ("preferred_phi2", "preferred_phi2")):
        assert settings.Inference(drive_folder=str(tmp_path), model_folder=given).folder == tmp_path / found
    elsewhere = tmp_path / "elsewhere" / "model"
    assert settings.Inference(drive_folder=str(tmp_path), model_folder=str(elsewhere)).folder == elsewhere


def test_preference_tuning_leaves_the_folders_of_the_finetuning_alone(tmp_path):
    places = {"drive_folder": str(tmp_path / "drive"), "work_folder": str(tmp_path / "work")}
    names = ("checkpoints", "mirrored", "adapter", "published_adapter", "adapter_zip", "merged", "published")
    names += ("settings", "scoreboard", "metrics")
    ours, theirs = (s(**places).folders for s in (settings.PreferenceTuning, settings.Finetuning))
    assert not {getattr(ours, name) for name in names} & {getattr(theirs, name) for name in names}
    assert (ours.train_preferences, ours.base) == (theirs.train_preferences, theirs.base)


def test_a_micro_batch_holds_both_responses_of_the_longest_pair():
    with pytest.raises(ValueError) as error:
        settings.PreferenceTuning(max_seq_length=512, micro_batch_tokens=600, label_smoothing=0.5, loss="dpo")
    assert str(error.value).splitlines()[1:] == [
        "micro_batch_tokens = 600: 0 or at least twice max_seq_length (1024), a pair's two responses",
        "loss = 'dpo': one of sigmoid, sigmoid + sft, robust, sigmoid_norm, ipo",
        "label_smoothing = 0.5: from 0 to below 0.5",
    ]

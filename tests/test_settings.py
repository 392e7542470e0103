"""The hyperparameter cell: every mistake is named before anything is loaded."""

import dataclasses

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


def test_every_setting_says_what_it_is():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(settings))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in ("Finetuning", "DataPrep", "Inference"):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            for field in fields:
                after = node.body[node.body.index(field) + 1]
                assert isinstance(after, ast.Expr), f"{node.name}.{field.target.id} has no sentence under it"


def test_settings_import_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys; from llm_finetuning import settings;"
        " print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_folders_are_laid_out_as_documented(tmp_path):
    folders = small_settings(tmp_path, "m").folders
    assert folders.published == tmp_path / "finetuned_phi2"
    assert folders.train_file == tmp_path / "data" / "finetuning_data_train.jsonl"
    assert dataclasses.is_dataclass(folders)

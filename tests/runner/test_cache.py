"""Which change of the package makes which notebook run again."""

import json

import nbformat
import pytest

from llm_finetuning.runner import cache, notebooks

TRAINING_DATA, VALIDATION_DATA, FINETUNING, INFERENCE = (step.notebook for step in notebooks.STEPS)
ALL = {TRAINING_DATA, VALIDATION_DATA, FINETUNING, INFERENCE}


def code_of(notebook) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def used() -> dict:
    """{notebook: the package's files that it uses}"""
    return {notebook: cache.used_files(code_of(notebook)) for notebook in ALL}


@pytest.mark.parametrize(
    ("file", "run_again"),
    [
        ("inference/page/markup.py", set()),
        ("runner/cache.py", set()),
        ("colab.py", {FINETUNING}),  # not for the set-up cells, but for the token that publishing takes
        ("inference/tables.py", {INFERENCE}),
        ("inference/llama.py", {FINETUNING, INFERENCE}),  # imported inside a function
        ("training/trainer.py", {FINETUNING}),
        ("release/model_card.md.jinja", {FINETUNING}),
        ("data/leaks.py", {TRAINING_DATA, VALIDATION_DATA}),
        ("data/__init__.py", ALL),
        ("sample/trees-train.jsonl", ALL),
        ("files/atomic.py", ALL),
        ("__init__.py", ALL),
    ],
)
def test_a_notebook_depends_on_the_files_that_it_uses_and_on_no_others(used, file, run_again):
    assert (cache.PACKAGE / file).is_file()
    assert {notebook for notebook, files in used.items() if cache.PACKAGE / file in files} == run_again


def test_a_changed_file_is_a_changed_input(make_notebook, tmp_path, monkeypatch):
    notebook = make_notebook("a", "x = 1", "from llm_finetuning.settings import DataPrep")
    before, hash_file = cache.inputs(notebook, {}, tmp_path, ()), cache.hash_file
    monkeypatch.setattr(cache, "hash_file", lambda path: hash_file(path) + "0" * (path.name == "folders.py"))
    after = cache.inputs(notebook, {}, tmp_path, ())
    assert [kind for kind in before if before[kind] != after[kind]] == ["package"]


@pytest.mark.parametrize("value", ["You are " + "very " * 100 + "kind.", "a\0b", "ü" * 200, ["a" * 300], None, 3])
def test_a_text_that_could_be_no_path_is_an_input_as_any_other(make_notebook, tmp_path, value):
    notebook = make_notebook("a", "x = ''")
    now, other = (cache.inputs(notebook, {"x": x}, tmp_path, ()) for x in (value, "short"))
    assert [kind for kind in now if now[kind] != other[kind]] == ["parameters"]


def test_every_way_to_import_counts_and_a_shell_command_is_no_python():
    cells = ["!nvidia-smi", "import numpy, llm_finetuning.prompts as p", "if p:\n    from llm_finetuning import colab"]
    names = {path.name for path in cache.used_files(cells)}
    assert {"rendering.py", "colab.py", "__init__.py"} <= names and "trainer.py" not in names


def test_the_cache_of_an_earlier_version_is_read(make_notebook, tmp_path):
    now = cache.inputs(make_notebook("a", "x = 1"), {}, tmp_path, ())
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "finished.json").write_text(json.dumps({"a": now | {"package": "of all its files"}}))
    assert cache.changed("a", now, tmp_path) == ["package"]


def test_a_cell_that_is_no_python_is_left_to_fail_when_it_runs(make_notebook, tmp_path):
    notebook = make_notebook("broken", "x = 1", "from llm_finetuning import models", "this is no python")
    working = make_notebook("working", "x = 1", "from llm_finetuning import models")
    of_broken, of_working = (cache.inputs(path, {}, tmp_path, ())["package"] for path in (notebook, working))
    assert of_broken == of_working

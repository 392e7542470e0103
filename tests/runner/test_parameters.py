"""Parameters cells, profiles and -p: what is accepted, what is refused, and with which words."""

from pathlib import Path

import pytest

from llm_finetuning import __main__ as command
from llm_finetuning.runner import listing, parameters, steps


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("2e-4", 1.0, 2e-4),
        ("3", 1.0, 3),
        ("-1", 5, -1),
        ("true", False, True),
        ("False", True, False),
        ("[en, de]", [], ["en", "de"]),
        ("off", "auto", "off"),
        ("2", "main", "2"),
        ("You are: helpful", "", "You are: helpful"),
        ("ten", 5, "ten"),
        ("{not yaml", 5, "{not yaml"),
    ],
)
def test_a_typed_value_is_read_as_its_parameter_asks(text, default, value):
    found = parameters.parse(text, default)
    assert (found, type(found)) == (value, type(value))


def test_a_profile_reads_numbers_and_words_as_written(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text("learning_rate: 2e-4\ngradient_checkpointing: off\nresume: false\nmodel_revision: 2024-01-02\n")
    assert parameters.read_profile(str(profile)) == {
        "learning_rate": 2e-4,
        "gradient_checkpointing": "off",
        "resume": False,
        "model_revision": "2024-01-02",
    }


def test_an_unknown_profile_is_refused_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"profile 'smaple' not found: say one of .*rehearsal"):
        parameters.read_profile("smaple")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "a: [1\n", "", "seed: 1\nseed: 2\n"])
def test_a_profile_that_is_no_mapping_is_refused_by_its_name(tmp_path, text):
    profile = tmp_path / "mine.yaml"
    profile.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        parameters.read_profile(str(profile))


def test_defaults_are_the_literals_of_the_tagged_cell(make_notebook):
    notebook = make_notebook("a", 'drive_folder = "x"  # @param {type:"string"}\nrate = -1.5\nnames = ["a"]', "b = 2")
    assert parameters.defaults(notebook) == {"drive_folder": "x", "rate": -1.5, "names": ["a"]}


@pytest.mark.parametrize("line", ["b = a + 1", "a: int = 1", "import os", "a = b = 1"])
def test_anything_but_a_literal_in_the_parameters_cell_is_named(make_notebook, line):
    with pytest.raises(ValueError, match=r"a\.ipynb, line 2 of the parameters cell: "):
        parameters.defaults(make_notebook("a", f"a = 1\n{line}"))


def test_a_name_goes_to_every_notebook_that_has_it(tmp_path):
    cells = [{"drive_folder": "", "seed": 1}, {"drive_folder": "", "work_folder": "", "seed": 1, "rate": 1.0}]
    first, second = parameters.assign(cells, {"seed": 3, "rate": 0.5}, [("seed", "4")], tmp_path)
    assert first == {"drive_folder": str(tmp_path), "seed": 4}
    assert second == {"drive_folder": str(tmp_path), "work_folder": str(tmp_path), "seed": 4, "rate": 0.5}


def test_all_unknown_names_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)lora_rank: no notebook .* lora_r[?].*sede: no notebook") as refused:
        parameters.assign([{"lora_r": 8, "seed": 1}], {"lora_rank": 8}, [("sede", "1")], tmp_path)
    assert len(str(refused.value).splitlines()) == 2


def test_what_several_notebooks_refuse_is_said_once(tmp_path):
    with pytest.raises(ValueError) as refused:
        steps.prepare("sample", tmp_path, [("max_seq_length", "-1"), ("lora_target_modules", "")])
    first, length, second, modules = str(refused.value).splitlines()
    assert (first, second) == ("DataPrep settings:", "Finetuning settings:")
    assert length.startswith("max_seq_length = -1: ") and modules.endswith("names of modules")
    with pytest.raises(ValueError, match=r"^DataPrep settings:\nmax_seq_length = -1: [^\n]*$"):
        steps.prepare("sample", tmp_path, [("max_seq_length", "-1")])


def test_the_output_folder_is_set_by_output_alone(tmp_path):
    with pytest.raises(ValueError, match=r"drive_folder: .*--output"):
        parameters.assign([{"drive_folder": ""}], {}, [("drive_folder", "/elsewhere")], tmp_path)


def test_a_relative_path_is_made_absolute_and_a_hub_id_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("{}")
    Path("sample").mkdir()
    cell = {"source": "", "model_name": "", "tokenizer_folder": "", "seed": "mine.jsonl"}
    profile = {"source": "mine.jsonl", "model_name": "microsoft/phi-2", "seed": "mine.jsonl"}
    (values,) = parameters.assign([cell], profile, [], tmp_path)
    assert values == {
        "source": str(tmp_path / "mine.jsonl"),
        "model_name": "microsoft/phi-2",
        "seed": "mine.jsonl",
    }
    (values,) = parameters.assign([cell], {"model_name": "sample"}, [], tmp_path)
    assert values == {"model_name": "sample"}


@pytest.mark.parametrize("value", ["~/mine.jsonl", "~/ünder score/mine.jsonl"])
def test_the_home_that_a_shell_leaves_alone_is_found(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / value[2:]
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert parameters.absolute("source", value) == str(path)
    assert parameters.absolute("system_message", value) == value
    assert command._parser().parse_args(["run", f"--output={value}"]).output == path
    path.write_text("seed: 3")
    assert parameters.read_profile(value) == {"seed": 3}


@pytest.mark.parametrize("value", ["~nobody_of_that_name/x", "~/gone", "x" * 5000, "{% if a %}\n" * 100, "\0"])
def test_what_is_no_path_stays_as_it_was_typed(value):
    assert all(parameters.absolute(name, value) == value for name in parameters.PATH_NAMES)


@pytest.mark.parametrize("typed", ["LORA_R", "Lora_r", " lora_r", "lora-r", "lora_rank"])
def test_a_name_written_otherwise_is_recognised(tmp_path, typed):
    with pytest.raises(ValueError, match=r"no notebook has this parameter; did you mean lora_r"):
        parameters.assign([{"lora_r": 8, "seed": 1}], {}, [(typed, "8")], tmp_path)


def test_what_means_something_else_to_preference_tuning_is_named_so(tmp_path):
    """A learning rate of the finetuning would destroy what preference tuning begins with."""
    both = steps.named("finetuning,preference")
    typed = [("learning_rate", "1e-3"), ("preference.learning_rate", "1e-6"), ("beta", "0.3"), ("seed", "3")]
    finetuning, preference = steps.prepare("sample", tmp_path, typed, both)
    assert (finetuning["learning_rate"], preference["learning_rate"]) == (1e-3, 1e-6)
    assert (finetuning["seed"], preference["seed"], preference["beta"]) == (3, 3, 0.3)
    assert not {name for name in preference if name.startswith("preference.")} and "lora_r" not in preference
    alone = steps.named("preference")
    with pytest.raises(ValueError, match=r"^learning_rate: in this notebook it is preference\.learning_rate$"):
        steps.prepare("sample", tmp_path, [("learning_rate", "1e-3")], alone)
    with pytest.raises(ValueError, match=r"^preference\.beta: no notebook has this parameter"):
        steps.prepare("sample", tmp_path, [("preference.beta", "1")], alone)


def test_what_another_notebook_would_take_is_said_to_be_unused():
    typed = [("beta", "0.3"), ("lora_r", "8"), ("preference.learning_rate", "x")]
    beta, rate = steps.not_used(typed, steps.STEPS)
    assert beta.startswith("beta: not used") and rate.startswith("preference.learning_rate: not used")
    assert steps.not_used(typed, steps.named("finetuning,preference")) == []


def test_the_list_of_parameters_names_them_as_they_are_given():
    told = listing.text("sample", steps.named("finetuning,preference"))
    assert "preference.learning_rate = 5e-06 (sample: 0.0005)  [2]\n" in told
    assert "learning_rate = 0.0002 (sample: 0.003)  [1]\n" in told

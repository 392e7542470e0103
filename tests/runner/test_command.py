"""The command's own answers: help, version, the list of parameters and what is refused, without anything heavy."""

import os
import re
import subprocess
import sys

import pytest

from llm_finetuning import __main__ as command
from llm_finetuning import __version__
from llm_finetuning.runner import cache, listing, parameters
from llm_finetuning.runner.steps import STEPS

HEAVY = {"torch", "transformers", "papermill", "nbformat", "nbconvert", "pandas", "IPython", "numpy"}


@pytest.fixture
def answered(tmp_path):
    """answered(*arguments) → (exit code, stdout, stderr, imported modules) of the command in an empty folder."""
    code = (
        "import atexit, sys; from llm_finetuning.__main__ import main;"
        "atexit.register(lambda: open('modules', 'w').write(' '.join(sys.modules))); sys.exit(main(sys.argv[1:]))"
    )

    def answer(*arguments: str) -> tuple[int, str, str, set]:
        command = [sys.executable, "-c", code, *arguments]
        environment = os.environ | {"PYTHONPATH": str(cache.PACKAGE.parent)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr, set((tmp_path / "modules").read_text().split())

    return answer


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["--version"], 0),
        (["run", "--parameters"], 0),
        (["run", "-p", "lora_rank=8"], 2),
        (["run", "-p", "lora_r", "many"], 2),
        (["run", "-p", "lora_r"], 2),
        (["run", "--profile", "smaple"], 2),
        (["search", "--help"], 0),
        (["search", "-p", "lora_rank=8,16"], 2),
        (["search", "-p", "lora_r=8,16", "--seeds", "0"], 2),
        (["run", "--output="], 2),
        (["run", "--notebooks", " , "], 2),
        (["run", "-p", "=8"], 2),
        (["rum"], 2),
        ([], 2),
    ],
    ids=str,
)
def test_an_answer_needs_nothing_heavy(answered, arguments, code):
    found, out, err, modules = answered(*arguments)
    assert found == code
    assert (err if code else out) and "Traceback" not in err
    assert HEAVY & modules == set()


def test_a_pipe_that_takes_ascii_alone_gets_the_list_too(answered, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, err, _ = answered("run", "--parameters")
    assert (code, err) == (0, "") and '"wandb", ?' in out


def test_the_version_is_the_packages(answered):
    assert answered("--version")[1] == f"llm_finetuning {__version__}\n"


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (["-p", "seed", "1"], [("seed", "1")]),
        (["-p", "seed=1"], [("seed", "1")]),
        (["-p", "seed", "-1", "-p", "system_message="], [("seed", "-1"), ("system_message", "")]),
        (["-p", "source=a=b.jsonl", "seed=-1"], [("source", "a=b.jsonl"), ("seed", "-1")]),
        (["-p", "system_message", "x = y"], [("system_message", "x = y")]),
        (["--parameter=learning_rate=-1e-4"], [("learning_rate", "-1e-4")]),
    ],
)
def test_a_parameter_is_set_with_a_space_or_an_equals_sign(words, pairs):
    assert command._parser().parse_args(["run", *words]).parameter == pairs


@pytest.mark.parametrize("words", [["lora_r=8"], ["--lora_r", "8"], ["--seed=8"]])
def test_a_parameter_that_is_typed_bare_is_told_how_it_is_set(words, capsys):
    with pytest.raises(SystemExit) as refused:
        command.main(["run", *words])
    assert refused.value.code == 2 and "-p NAME=VALUE" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", [["seed"], ["seed", "1", "2"], ["seed=1", "lora_r"], []])
def test_half_an_assignment_is_refused(words, capsys):
    with pytest.raises(SystemExit) as refused:
        command._parser().parse_args(["run", "-p", *words])
    assert refused.value.code == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def test_the_list_has_every_parameter_with_its_default_and_its_sentence(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = listing.text("sample")
    assert max(len(line) for line in text.splitlines() if line.startswith(" ")) <= 60
    flat = " ".join(text.split())
    for step in STEPS:
        for name, default in parameters.defaults(step.notebook).items():
            assert f"{name} = {default!r}" in text
            field = step.settings_class.__pydantic_fields__.get(name)
            if field and name not in parameters.OUTPUT_NAMES:
                assert " ".join(field.description.split()) in flat, name
    rate = parameters.read_profile("sample")["learning_rate"]
    assert re.search(rf"^learning_rate = 0\.0002 \(sample: {rate}\)  \[3\]$", text, re.MULTILINE)

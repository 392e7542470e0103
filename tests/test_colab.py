"""The set-up cell and its helpers, against a stand-in for google.colab that writes to a temporary folder."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from colab_fixtures import STUB
from packaging.requirements import Requirement

from llm_finetuning import colab, tracebacks

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for folder in ("Data Prep", "Finetuning", "Inference") for p in (ROOT / folder).glob("*.ipynb"))


class Runtime:
    """Installed packages and a pip that changes them; `calls` keeps what pip was asked."""

    def __init__(self, **versions: str):
        self.versions = versions
        self.calls: list[list[str]] = []
        self.constraints = ""
        self.latest: dict[str, str] = {}

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise metadata.PackageNotFoundError(name)
        return self.versions[name]

    def pip(self, command, **_) -> SimpleNamespace:
        arguments = command[3:]
        self.calls.append(arguments)
        if arguments[0] == "uninstall":
            del self.versions[arguments[-1]]
        if "--constraint" in arguments:
            self.constraints = Path(arguments[arguments.index("--constraint") + 1]).read_text()
        self.versions.update(self.latest)
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    """Colab as it comes: an old datasets, no trl, and a torchao that PEFT refuses."""
    fake = Runtime(torch="2.11.0+cu128", numpy="2.1.3", datasets="4.0.0", torchao="0.10.0")
    fake.latest = {"datasets": "5.2.0", "trl": "1.16.0"}
    monkeypatch.setattr(colab.metadata, "version", fake.version)
    monkeypatch.setattr(colab.metadata, "packages_distributions", lambda: {"datasets": ["datasets"], "trl": ["trl"]})
    monkeypatch.setattr(colab.subprocess, "run", fake.pip)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    return fake


@pytest.fixture
def clone(tmp_path) -> Path:
    (tmp_path / "requirements.txt").write_text(
        "# comment\ntorch>=2.11\nnumpy>=2.0  # Colab's\n\ndatasets>=4.7\ntrl>=1.16,<1.17\n"
    )
    return tmp_path


def test_only_what_is_missing_or_too_old_is_installed(runtime, clone, capsys):
    colab.install(clone)
    assert runtime.calls[0][0] == "install"
    assert sorted(runtime.calls[0][-2:]) == ["datasets>=4.7", "trl<1.17,>=1.16"]
    assert runtime.constraints == "torch==2.11.0+cu128\nnumpy==2.1.3\n"
    assert "Installed datasets 5.2.0, trl 1.16.0" in capsys.readouterr().out


def test_an_old_torchao_is_removed_and_a_new_one_stays(runtime, clone, capsys):
    colab.install(clone)
    assert runtime.calls[1] == ["uninstall", "--quiet", "--yes", "torchao"]
    assert "Removed torchao 0.10.0" in capsys.readouterr().out
    runtime.versions["torchao"] = "0.16.0"
    colab.install(clone)
    assert len(runtime.calls) == 2


def test_a_second_run_of_the_cell_does_nothing(runtime, clone, capsys):
    colab.install(clone)
    done = len(runtime.calls)
    capsys.readouterr()
    colab.install(clone)
    assert len(runtime.calls) == done
    assert capsys.readouterr().out == ""


def test_a_package_replaced_while_in_use_asks_for_a_restart_in_one_sentence(runtime, clone, monkeypatch):
    used = ModuleType("datasets")
    used.__version__ = "4.0.0"
    monkeypatch.setitem(sys.modules, "datasets", used)
    for _ in range(2):  # also when the cell is run again without a restart
        with pytest.raises(colab.RestartNeeded) as asked:
            colab.install(clone)
        assert tracebacks.is_curable(asked.value, asked.tb), "notebooks show the sentence alone"
        assert str(asked.value) == (
            "Please choose Runtime > Restart session, then run all cells again: packages in use were updated "
            "(datasets)."
        )


def test_an_old_torch_is_never_replaced(runtime, clone):
    runtime.versions["torch"] = "2.6.0+cu124"
    with pytest.raises(RuntimeError, match=r"torch>=2\.11.*never replaced.*Runtime version: Latest"):
        colab.install(clone)
    assert runtime.calls == []


def test_what_pip_says_when_it_fails_is_shown(runtime, clone, monkeypatch):
    monkeypatch.setattr(
        colab.subprocess,
        "run",
        lambda *a, **k: SimpleNamespace(returncode=1, stderr="ERROR: no route to host\n"),
    )
    with pytest.raises(RuntimeError, match="no route to host"):
        colab.install(clone)


def test_the_versions_of_loaded_packages_are_read_right():
    requirements = colab.read_requirements(ROOT / "requirements.txt")
    for name in ("numpy", "pandas", "tqdm", "psutil", "jinja2", "IPython", "matplotlib", "pyarrow"):
        __import__(name)
    assert colab.replaced_after_import(requirements) == []


def test_this_environment_meets_the_requirements():
    requirements = colab.read_requirements(ROOT / "requirements.txt")
    assert Requirement("trl<1.17,>=1.16") in requirements
    assert [str(r) for r in requirements if not colab.is_met(r)] == []


def test_a_token_comes_from_the_environment_first(on_colab, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    assert colab.token() == "from the environment"
    assert not (on_colab / "calls.txt").exists()


def test_a_token_comes_from_colabs_secrets(on_colab, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (on_colab / "secrets").mkdir()
    (on_colab / "secrets" / "HF_TOKEN").write_text("from the secrets")
    assert colab.token() == "from the secrets"


@pytest.mark.parametrize("answer", [None, "no access", "timeout", "no browser"])
def test_without_a_secret_there_is_no_token_and_no_waiting(on_colab, monkeypatch, answer):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if answer:
        (on_colab / "secrets").mkdir()
        (on_colab / "secrets" / "HF_TOKEN").write_text(answer)
    assert colab.token(seconds=1) is None


def set_up_cell(notebook: Path) -> str:
    code = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    return code[1]


def run_cell(source: str, folder: Path, repository: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a set-up cell in a process of its own, then says what it brought."""
    source = f"repository = {repository.as_uri()!r}\n{source}\n"
    source += "import json, llm_finetuning\nprint(json.dumps(llm_finetuning.__file__))"
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_the_set_up_cell_brings_a_runtime_to_work(tmp_path, repository):
    """With the whole package and its requirements; which package it finds is told by test_set_up."""
    content, stub = tmp_path / "content", tmp_path / "stub"
    content.mkdir()
    stub.mkdir()
    for _ in range(2):  # "Run all" again finds the clone and uses it
        done = run_cell(set_up_cell(NOTEBOOKS[0]), content, repository, PYTHONPATH=str(STUB), COLAB_STUB=str(stub))
        assert done.returncode == 0, done.stderr
        used = Path(json.loads(done.stdout.splitlines()[-1]))
        assert used == content / "llm_finetuning" / "llm_finetuning" / "__init__.py"
    assert (stub / "calls.txt").read_text().splitlines() == ["drive.mount /content/drive"] * 2


def test_a_refused_drive_stops_before_anything_is_installed(runtime, clone, on_colab):
    (on_colab / "visits").write_text("0")
    (on_colab / "refuse").write_text("ValueError")
    with pytest.raises(ConnectionError, match=r"Drive was not mounted \(ValueError: mount failed\).*allow access"):
        colab.install(clone)
    assert runtime.calls == []


def test_files_where_drive_is_to_be_mounted_are_named(on_colab):
    (on_colab / "drive").mkdir()
    (on_colab / "drive" / "written while it was away").touch()
    with pytest.raises(ConnectionError, match=r"!mv .*drive .*drive-before"):
        colab.mount_drive()


def test_outside_colab_the_set_up_cell_does_nothing(tmp_path, repository):
    done = run_cell(set_up_cell(NOTEBOOKS[0]), tmp_path, repository, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)) == ROOT / "llm_finetuning" / "__init__.py"
    assert not (tmp_path / "llm_finetuning").exists()

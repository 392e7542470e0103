"""What several tests share: the checkout's sibling data, and small notebooks."""

import os
import shutil
import subprocess
from pathlib import Path

import filelock
import nbformat
import pytest

# Of tests/support, which pytest has on its path.
pytest_plugins = ["browser", "colab_fixtures", "disks", "inference_fixtures", "llama_programs"]
pytest_plugins += ["preference_fixtures", "shell_fixtures", "training_fixtures"]

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("LLM_FINETUNING_REAL_DATA") or ROOT.parent / "shared" / "data")
"""Real conversation trees and Phi-2's tokenizer, see CONTRIBUTING.md; tests that need them skip without."""


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="how often the training is killed in the long resume test")


def pytest_collection_modifyitems(items):
    """The longest files come first (slow tests, then training), so that the workers are done at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path in slow, item.path), reverse=True)


def pytest_make_parametrize_id(val):
    """Bytes are named by their number: a gzip holds the second of its making, and every worker collects for itself."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture
def real_trees() -> Path:
    """A file of real Open-Assistant conversation trees; the test is skipped without it."""
    return _existing(REAL_DATA / "oa_en_100.trees.jsonl")


@pytest.fixture(scope="session")
def phi2_tokenizer_folder() -> Path:
    """The folder of Phi-2's own tokenizer; the test is skipped without it."""
    return _existing(REAL_DATA / "phi-2-tokenizer")


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not there: set LLM_FINETUNING_REAL_DATA to the folder that holds {path.name}")
    return path


@pytest.fixture(scope="session")
def sample_base(tmp_path_factory) -> Path:
    """The sample's base, made once for all workers: it takes a minute, and a run that finds it makes none."""
    from llm_finetuning import models

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with filelock.FileLock(folder / "sample-base.lock"):
        return Path(models.locate("sample", folder / "sample-base"))


@pytest.fixture
def make_notebook(tmp_path):
    """make_notebook(name, parameters_source, *code) → the path of a notebook with these code cells."""

    def make(name: str, parameters: str, *code: str) -> Path:
        cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_code_cell(source) for source in code]
        path = tmp_path / f"{name}.ipynb"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    return make


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository of the package as it is on disk."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "llm_finetuning", folder / "llm_finetuning", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", folder)
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "all"], check=True)
    return folder

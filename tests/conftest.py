"""What several tests share: the checkout's sibling data, and small notebooks."""

import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from inference_fixtures import chat, published  # noqa: F401

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often the training is killed in the resume tests")


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


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

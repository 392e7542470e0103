"""The package as pip installs it, as a wheel or out of git, in an environment and a folder of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_pipeline import CUT

from llm_finetuning.runner.steps import STEPS

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", "shared")
FIRST_NOTEBOOK = """
from pathlib import Path
from llm_finetuning.runner import notebooks, steps
output = Path("out")
notebooks.run(steps.prepare("sample", output, [])[:1], output, steps.STEPS[:1])
"""

pytestmark = pytest.mark.slow


def run(*command: object, folder: Path) -> subprocess.CompletedProcess:
    """The command in `folder`, with nothing of this checkout on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    environment |= {"HF_HUB_OFFLINE": "1", "JUPYTER_PATH": f"{sys.prefix}/share/jupyter"}  # borrowed: nbconvert's files
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The checkout as it is on disk, without its history."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "checkout", ignore=LEFT_OUT)


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    done = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", ".", folder=source)
    assert done.returncode == 0, done.stderr
    return next(source.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("environment"), wheel)


def environment(folder: Path, package: object) -> Path:
    """The Python of an environment with the package; what it depends on is borrowed, and has no say in the package."""
    own = {"base": str(folder), "platbase": str(folder)}
    packages, python = Path(sysconfig.get_path("purelib", "venv", own)), folder / "bin" / "python"
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder).returncode == 0
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    done = run(*pip, "--no-build-isolation", package, folder=folder)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    folder = tmp_path / "another folder"
    folder.mkdir()
    return folder


def test_the_installed_command_knows_its_notebooks_and_profiles(python, elsewhere):
    code = "import llm_finetuning; from llm_finetuning.runner.steps import STEPS;"
    found = run(python, "-c", f"{code} print(llm_finetuning.__file__, *STEPS, sep='\\n')", folder=elsewhere)
    assert found.stdout.startswith(str(python.parents[1])), found
    assert found.stdout.count(f"{python.parents[1]}/lib") == 1 + len(STEPS)
    for profile in ("sample", "rehearsal"):
        listed = run(python, "-m", "llm_finetuning", "run", "--parameters", "--profile", profile, folder=elsewhere)
        assert f"({profile}: '{profile}')" in listed.stdout, listed.stderr
    refused = run(python, "-m", "llm_finetuning", "run", "-p", "lora_rank=8", folder=elsewhere)
    assert refused.returncode == 2 and "lora_r" in refused.stderr
    assert list(elsewhere.iterdir()) == []


def test_the_installed_notebooks_are_those_of_the_checkout(python):
    installed = next(python.parents[1].glob("lib/python*/site-packages/llm_finetuning/notebooks"))
    for step in STEPS:
        assert (installed / step.notebook.relative_to(ROOT)).read_bytes() == step.notebook.read_bytes()


def test_an_installed_notebook_runs_with_the_installed_package(python, elsewhere):
    done = run(python, "-c", FIRST_NOTEBOOK, folder=elsewhere)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "out" / "data" / "finetuning_data_train.jsonl").is_file()
    assert {path.suffix for path in (elsewhere / "out" / "notebooks").iterdir()} == {".ipynb", ".html", ".json"}


@pytest.mark.more
def test_a_tag_of_a_bare_repository_installs_as_the_wheel_does(source, elsewhere, tmp_path):
    tree, bare = shutil.copytree(source, tmp_path / "tree", ignore=LEFT_OUT), tmp_path / "project.git"
    shutil.copy(ROOT / ".gitignore", tree)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-C", tree]
    steps = [
        "init",
        "add .",
        "commit -m all",
        "tag v1",
        "rm -rq llm_finetuning",
        "commit -m gone",
        f"clone --bare . {bare}",
    ]
    for step in steps:
        done = run(*git, *step.split(), folder=tmp_path)
        assert done.returncode == 0, done.stderr
    (tmp_path / "environment").mkdir()
    python = environment(tmp_path / "environment", f"git+{bare.as_uri()}@v1")
    test_the_installed_command_knows_its_notebooks_and_profiles(python, elsewhere)
    test_the_installed_notebooks_are_those_of_the_checkout(python)
    test_an_installed_notebook_runs_with_the_installed_package(python, elsewhere)


@pytest.mark.more
def test_the_installed_command_runs_all_four(python, elsewhere, sample_base):
    shutil.copytree(sample_base, elsewhere / "out" / "base" / sample_base.name)
    cut = [word for name, value in CUT.items() for word in ("-p", f"{name}={value}")]
    done = run(python, "-m", "llm_finetuning", "run", "--output", "out", *cut, folder=elsewhere)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (elsewhere / "out" / "finetuned_phi2" / "SHA256SUMS").is_file()


def test_the_package_asks_for_what_a_run_needs_and_colab_for_no_more_than_the_notebooks(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    names = {Requirement(line.partition(": ")[2]).name for line in lines if line.startswith("Requires-Dist: ")}
    run_only = {"papermill", "nbclient", "nbconvert", "nbformat", "ipykernel", "grimp", "rich"}
    assert names >= run_only | {"torch", "trl", "bitsandbytes"}
    colab = (ROOT / "requirements.txt").read_text()
    assert not [name for name in run_only if name in colab]

"""What make says where an environment cannot be made: one sentence with the cure, before anything is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CURE = "say for example: make PYTHON=python3.12"


@pytest.fixture
def make(tmp_path):
    """make(source) → what `make run` says in a fresh folder where each Python runs `source` at its start."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", *(path.name for path in ROOT.glob("requirements*"))):
        shutil.copy(ROOT / name, tmp_path)

    def say(source: str) -> str:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(source, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PIP_NO_INDEX": "1"}
        command = ["make", f"PYTHON={sys.executable}", "run"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and not (tmp_path / ".venv").exists()
        assert "Installing" not in done.stdout
        return done.stderr

    return say


@pytest.mark.parametrize("missing", ["ensurepip", "venv"])  # Debian and Ubuntu leave out the first
def test_a_python_that_makes_no_environments_is_named_with_what_to_install(make, missing):
    first, *_ = make(f"import sys; sys.modules['{missing}'] = None").splitlines()
    begun = f"{sys.executable} cannot make environments: on Debian and Ubuntu apt-get install python3-venv"
    assert first == f"{begun}, or {CURE} run"


def test_a_python_that_is_too_old_is_named_with_its_version(make):
    first, *_ = make("import sys; sys.version_info, sys.version = (3, 10, 12), '3.10.12 (main)'").splitlines()
    assert first == f"Python 3.11 or later is needed, {sys.executable} is 3.10.12. S{CURE[1:]} run"

"""Earlier versions of transformers, each in a folder of its own that git ignores, for PYTHONPATH in a subprocess."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".readers"
NEEDED = {  # without their own requirements: the rest is what the tests run with
    "4.49.0": ("tokenizers==0.21.4", "huggingface_hub==0.36.0"),
    "4.57.6": ("tokenizers==0.22.2", "huggingface_hub==0.36.0"),
    "5.0.0": ("tokenizers==0.22.2", "huggingface_hub==1.27.0"),
}


def installed(version: str) -> Path:
    """The folder that holds the version, fetched once; the test is skipped where no registry answers."""
    folder = FOLDER / version
    if not folder.is_dir():
        partial = FOLDER / f".{version}.{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        result = subprocess.run(
            [*command, f"transformers=={version}", *NEEDED[version]], capture_output=True, text=True
        )
        if result.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"transformers {version} could not be fetched: {result.stderr.strip().splitlines()[-1:]}")
        partial.rename(folder)
    return folder


def run_with(version: str, arguments: list[str]) -> str:
    """What Python prints with this version of transformers."""
    environment = os.environ | {"PYTHONPATH": str(installed(version)), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def read_with(version: str, folders: list[Path]) -> dict:
    """What `read_folder.py` finds in each folder under this version: {folder's name: {"answers": …}}."""
    script = Path(__file__).with_name("read_folder.py")
    found = json.loads(run_with(version, [str(script), *map(str, folders)]).splitlines()[-1])
    assert found["version"] == version
    return {Path(folder).name: values for folder, values in found["folders"].items()}

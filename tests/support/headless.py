"""The headless command in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(output: Path, profile: str, *more: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m llm_finetuning run` of a profile into `output`, from elsewhere, without the Hub."""
    command = [sys.executable, "-m", "llm_finetuning", "run", "--profile", profile, "--output", str(output), *more]
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=output.parent, env=os.environ | own, capture_output=True, text=True)

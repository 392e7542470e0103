"""A run that is killed in any of the notebook's stages ends with the same adapter and the same merged model."""

import hashlib
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_small import STAGES

SUPPORT = Path(__file__).parents[1] / "support"
FILES = ("adapter/adapter_model.safetensors", "finetuned_phi2/model.safetensors")


def start(folder: Path, base: Path) -> subprocess.Popen:
    command = [sys.executable, str(SUPPORT / "run_small.py"), str(folder), str(base)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=SUPPORT.parents[1], **pipes)


def finish(folder: Path, base: Path) -> tuple[list[str], str]:
    """Runs to the end; returns (digests of what was made, what was printed)."""
    process = start(folder, base)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES], printed


@pytest.fixture(scope="module")
def undisturbed(tiny_base, tmp_path_factory) -> list[str]:
    digests, printed = finish(tmp_path_factory.mktemp("whole"), tiny_base)
    assert [line.removeprefix("STAGE ") for line in printed.splitlines() if line.startswith("STAGE")] == list(STAGES)
    return digests


def kill(folder: Path, base: Path, stage: str, seconds: float) -> None:
    """Starts the run and kills it so many seconds after a stage began; publishing may be over by then."""
    process = start(folder, base)
    for line in process.stdout:
        if line.strip() == f"STAGE {stage}":
            break
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), printed[-3000:]


@pytest.mark.more
def test_killed_in_any_stage_it_ends_with_the_same_bytes(undisturbed, tiny_base, tmp_path, request):
    chance = random.Random(5)
    for number in range(request.config.getoption("--kills")):
        kill(tmp_path, tiny_base, STAGES[number % len(STAGES)], chance.uniform(0.0, 1.5))
    digests, printed = finish(tmp_path, tiny_base)
    assert digests == undisturbed
    assert "went on from checkpoint-" in printed
    assert finish(tmp_path, tiny_base)[0] == undisturbed, "run all a second time after its end"

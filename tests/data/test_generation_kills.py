"""A generation that is killed at any moment pays nothing twice but what was in flight, and ends as if never killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from generation_kills import IN_FLIGHT

from llm_finetuning.data import pairs

SUPPORT = Path(__file__).parents[1] / "support"


def check_kills(folder: Path, kills: int) -> None:
    command = [sys.executable, str(SUPPORT / "generation_kills.py"), str(folder), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["died"] == kills, counts
    assert counts["needed"] <= counts["sent"] <= counts["needed"] + IN_FLIGHT * kills, counts
    (cache,) = (folder / "killed" / "generation").glob("*.jsonl")
    keys = [json.loads(line)["key"] for line in cache.read_text(encoding="utf-8").splitlines()]
    assert len(keys) == len(set(keys)) == counts["needed"]
    prompts = []
    for path in sorted((folder / "whole" / "data").glob("*.jsonl")):
        assert path.read_bytes() == (folder / "killed" / "data" / path.name).read_bytes()
        prompts += pairs.read_jsonl(path)["prompt"].tolist() if path.name.startswith("finetuning") else []
    assert len(prompts) == len(set(prompts)) == 60


def test_a_killed_generation_goes_on(tmp_path):
    check_kills(tmp_path, 2)


@pytest.mark.more
@pytest.mark.slow
def test_a_generation_killed_twenty_times_goes_on(tmp_path):
    check_kills(tmp_path, 20)

"""The notebook, headless: what it leaves, that no output holds the key, and that a second run asks nothing."""

import subprocess
from pathlib import Path

import headless
import pytest
from generation_world import KEY, every_file, files_with
from scripted_generator import Script, Server

from llm_finetuning.runner import steps


def command(output: Path, *more: str) -> subprocess.CompletedProcess:
    return headless.run(output, "generation", *more, OPENAI_API_KEY=KEY)


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.pipeline
def test_the_notebook_runs_headless_and_stops_once_for_its_taxonomy(tmp_path):
    with Server(Script(lambda purpose, number: "echo" if purpose == "answer" and number % 3 == 0 else None)) as server:
        wanted = ["--notebooks", "generation", "-p", "endpoint", f"{server.address}/v1", "-p", "pairs_wanted", "40"]
        first = command(tmp_path, *wanted, "-p", "review_taxonomy", "true")
        assert first.returncode == 1 and "run all cells again" in first.stderr
        assert len(server.script.requests) == 1
        done = command(tmp_path, *wanted, "-p", "review_taxonomy", "true")
        assert done.returncode == 0, done.stderr
        asked = len(server.script.requests)
        notebook = tmp_path / "notebooks" / "Task Data Generation.html"
        notebook.unlink()
        (tmp_path / "data" / "finetuning_data_val.jsonl").unlink()
        again = command(tmp_path, *wanted, "-p", "review_taxonomy", "true")
        assert again.returncode == 0 and len(server.script.requests) == asked
    names = {Path(name).name for name in every_file(tmp_path)}
    assert names >= {"finetuning_data_train.jsonl", "finetuning_data_val.report.json", "data_generated_funnel.png"}
    assert files_with(tmp_path, KEY) == [] and files_with(tmp_path, "[key]")
    assert not any(KEY in text for run in (first, done, again) for text in (run.stdout, run.stderr))


def test_notebooks_run_in_their_order_whatever_is_typed():
    assert steps.named("finetuning, generation") == (steps.NAMED["generation"], steps.NAMED["finetuning"])
    assert steps.named("") == steps.STEPS
    with pytest.raises(ValueError, match="generatoin not known; there are generation, training-data"):
        steps.named("generatoin")

"""The four notebooks chained on a cut-down sample: headless by the command, and on a stand-in for Colab."""

import json
import shutil
import subprocess
from pathlib import Path

import headless
import nbformat
import pytest
from colab_fixtures import STUB

from llm_finetuning import prompts
from llm_finetuning.evaluation import votes
from llm_finetuning.files import checksums
from llm_finetuning.inference.vote_box import vote_box
from llm_finetuning.inference.votes import BallotBox
from llm_finetuning.runner import notebooks, parameters

CUT = {
    "max_steps": 8,
    "save_steps": 4,
    "eval_steps": 4,
    "eval_pairs": 8,
    "eval_answers": 4,
    "max_new_tokens": 16,
}
pytestmark = pytest.mark.pipeline


def run(output: Path, **cut: object) -> subprocess.CompletedProcess:
    """`python -m llm_finetuning run` on the sample, from elsewhere, without the Hub."""
    words = (word for name, value in cut.items() for word in ("-p", name, str(value)))
    return headless.run(output, "sample", *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sample_base) -> tuple[Path, subprocess.CompletedProcess]:
    output = tmp_path_factory.mktemp("pipeline") / "out"
    shutil.copytree(sample_base, output / "base" / sample_base.name)
    return output, run(output, **CUT)


@pytest.mark.slow
def test_the_command_runs_all_four_and_leaves_what_is_promised(finished):
    output, done = finished
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (
        "data/finetuning_data_train.jsonl",
        "data/finetuning_data_val.jsonl",
        "data/finetuning_data_train.report.json",
        "data/finetuning_data_val.report.json",
        "adapter/adapter_model.safetensors",
        "finetuned_phi2/SHA256SUMS",
        "finetuned_phi2/README.md",
        "finetuned_phi2/settings.json",
        "scoreboard.json",
    ):
        assert (output / name).is_file(), name
    assert {p.name for p in (output / "checkpoints").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    assert len(list((output / "figures").glob("*.png"))) >= 4
    for step in notebooks.STEPS:
        assert (output / "notebooks" / step.notebook.name).is_file()
        assert (output / "notebooks" / f"{step.notebook.stem}.html").is_file()


@pytest.mark.slow
def test_the_scoreboard_shows_that_it_learned(finished):
    output, done = finished
    board = json.loads((output / "scoreboard.json").read_text(encoding="utf-8"))
    assert list(board) == ["before", "after", "merged"]
    for scores in board.values():
        assert {"loss", "perplexity", "stop_rate", "repetition_rate", "samples", "exact_match"} <= set(scores)
    assert board["after"]["loss"] < board["before"]["loss"]
    assert board["merged"]["loss"] == pytest.approx(board["after"]["loss"], rel=0.05)
    assert "before" in done.stdout and "merged" in done.stdout
    assert "user: " in done.stdout and "assistant: " in done.stdout


@pytest.mark.slow
def test_the_executed_notebooks_show_no_error_and_no_warning(finished):
    output, _ = finished
    for path in (output / "notebooks").glob("*.ipynb"):
        cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        shown = [o for c in cells for o in c.outputs if o.output_type == "stream" and o.name == "stderr"]
        assert not [o.text for o in shown if "warning" in o.text.lower()], path.name


@pytest.mark.slow
def test_the_same_command_again_runs_no_notebook(finished):
    output, first = finished
    again = run(output, **CUT)
    assert again.returncode == 0
    assert again.stdout.count("not run again") == len(notebooks.STEPS)
    assert _talk(again.stdout) == _talk(first.stdout)


@pytest.mark.slow
@pytest.mark.more
def test_preference_tuning_goes_on_from_a_finished_folder(finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    own = {f"preference.{name}": value for name, value in (("max_steps", 4), ("save_steps", 2), ("eval_steps", 2))}
    words = [word for name, value in own.items() for word in ("-p", f"{name}={value}")]
    words += ["-p", "eval_pairs=8", "-p", "eval_answers=4", "-p", "max_new_tokens=16", "--notebooks", "preference"]
    finetuned = (output / "finetuned_phi2" / "SHA256SUMS").read_bytes()
    done = headless.run(output, "sample", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("preferred_phi2", "preference_adapter"):
        checksums.verify_checksums(output / name)
    board = json.loads((output / "preference_scoreboard.json").read_text(encoding="utf-8"))
    assert list(board) == ["before", "after", "merged"]
    for scores in board.values():
        assert {"loss", "stop_rate", "accuracy", "margin"} <= set(scores)
    assert board["merged"]["accuracy"] == pytest.approx(board["after"]["accuracy"], abs=0.03)
    assert (output / "finetuned_phi2" / "SHA256SUMS").read_bytes() == finetuned
    again = headless.run(output, "sample", *words)
    assert again.returncode == 0 and again.stdout.count("not run again") == 1


@pytest.mark.slow
@pytest.mark.more
def test_votes_become_preferences_of_the_next_model(finished, tmp_path):
    """Voted in the notebook's box, given to the data notebooks as a source, and tuned on."""
    first, output = finished[0], tmp_path / "out"
    asked = [json.loads(line) for line in (first / "data" / "finetuning_data_train.jsonl").open(encoding="utf-8")][:60]
    box = BallotBox(tmp_path / "votes.jsonl")
    questions = [(prompts.question(pair), {"a": pair["response"], "b": "No idea."}) for pair in asked]
    view = vote_box(questions, box, str)
    shown, buttons = view.children[0], view.children[1].children
    while not buttons[0].disabled:
        buttons["No idea." not in shown.value.partition("<b>B</b>")[2]].click()
    cast = votes.read(box.path)
    assert {vote["models"][vote["choice"] == "right"] for vote in cast} == {"a"} and len(cast) > 40

    shutil.copytree(first / "base", output / "base")
    shutil.copytree(first / "adapter", output / "adapter")
    own = {f"preference.{name}": value for name, value in (("max_steps", 2), ("save_steps", 2), ("eval_steps", 0))}
    own |= {"source": box.path, "validation_share": 0.3, "eval_pairs": 8, "eval_answers": 2, "max_new_tokens": 16}
    words = [word for name, value in own.items() for word in ("-p", f"{name}={value}")]
    done = headless.run(output, "sample", *words, "--notebooks", "training-data,validation-data,preference")
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = {vote["answers"][vote["choice"] == "right"] for vote in cast}
    written = [json.loads(line) for split in ("train", "val")
               for line in (output / "data" / f"preferences_{split}.jsonl").open(encoding="utf-8")]  # fmt: skip
    assert {record["chosen"] for record in written} <= chosen and {r["rejected"] for r in written} == {"No idea."}
    assert checksums.verify_checksums(output / "preferred_phi2")


def _talk(stdout: str) -> list[str]:
    return [line for line in stdout.splitlines() if line.startswith(("user: ", "assistant: "))]


@pytest.mark.more
def test_the_four_run_on_colab_with_drive_between_them(tmp_path, monkeypatch, repository, sample_base):
    """Each notebook in a fresh working folder, as on a machine of its own: only Drive is common to them."""
    stub = tmp_path / "stub"
    stub.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    monkeypatch.setenv("COLAB_STUB", str(stub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    drive = stub / "drive" / "MyDrive" / "llm_finetuning"
    cloud = stub / "cloud" / drive.relative_to(stub / "drive")  # as others see it
    shutil.copytree(sample_base, cloud / "base" / sample_base.name)
    given = parameters.read_profile("sample") | CUT
    given |= {"max_steps": 2, "save_steps": 2, "eval_steps": 2, "eval_pairs": 4, "eval_answers": 2}
    for number, step in enumerate(notebooks.STEPS):
        machine = tmp_path / f"machine{number}"
        machine.mkdir()
        monkeypatch.chdir(machine)
        own = given | {
            "drive_folder": str(drive),
            "work_folder": str(machine),
            "repository": repository.as_uri(),
        }
        names = parameters.defaults(step.notebook)
        values = {name: own[name] for name in names if name in own}
        notebooks.execute(step.notebook, values, machine, step.notebook.stem)
        assert (machine / "llm_finetuning" / "llm_finetuning" / "colab.py").is_file()
    assert (drive / "finetuned_phi2" / "SHA256SUMS").is_file()
    assert set(json.loads((drive / "scoreboard.json").read_text())) == {"before", "after", "merged"}
    assert (stub / "calls.txt").read_text().count("drive.mount /content/drive\n") == len(notebooks.STEPS)

"""The headless runner, on small notebooks: order, parameters, going on, failing, refusing."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

from llm_finetuning.runner import cache, notebooks
from llm_finetuning.runner.notebooks import NotebookFailed
from llm_finetuning.runner.steps import Step, prepare

CELL = 'drive_folder = "/content"\n'


@pytest.fixture
def pipeline(make_notebook, tmp_path):
    """Two notebooks: one writes `words` to data/a.txt, one appends what it reads there to log.txt."""
    write = make_notebook(
        "write",
        CELL + 'words = "hello"',
        "from pathlib import Path\ndata = Path(drive_folder, 'data')\ndata.mkdir(exist_ok=True)",
        "(data / 'a.txt').write_text(words)",
    )
    read = make_notebook(
        "read",
        CELL + "divisor = 1",
        "from pathlib import Path\ntext = Path(drive_folder, 'data', 'a.txt').read_text()",
        "with open(Path(drive_folder, 'log.txt'), 'a') as log:\n    log.write(f'{text} {10 // divisor}\\n')",
    )
    steps = (Step(write, writes=("data/a.txt",)), Step(read, reads=("data/*.txt",)))
    profile = tmp_path / "profile.yaml"
    profile.write_text("divisor: 2\n")
    output = tmp_path / "out"

    def run(**typed: str) -> Path:
        assigned = prepare(str(profile), output, list(typed.items()), steps)
        notebooks.run(assigned, output, steps)
        return output

    run.output = output
    return run


def outcomes(capsys) -> list[str]:
    """The runner's own lines about notebooks: what was skipped or runs again."""
    return [line for line in capsys.readouterr().out.splitlines() if not re.search(r": [\d:]+$", line)]


def test_notebooks_run_in_order_and_leave_copies_and_pages(pipeline, capsys):
    output = pipeline(words="hi")
    assert (output / "log.txt").read_text() == "hi 5\n"
    assert {p.name for p in (output / "notebooks").iterdir()} == {
        "write.ipynb",
        "write.html",
        "read.ipynb",
        "read.html",
        "finished.json",
    }
    executed = nbformat.read(output / "notebooks" / "write.ipynb", 4)
    assert all(c.execution_count for c in executed.cells)
    page = (output / "notebooks" / "write.html").read_text(encoding="utf-8")
    assert 'words = "hi"' in re.sub(r"</?span[^>]*>", "", page)  # without the spans that colour the code
    shown = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d:]+$", "", line) for line in shown] == ["1/2 write: ", "2/2 read: "]


def test_the_same_command_again_runs_nothing(pipeline, capsys):
    pipeline()
    capsys.readouterr()
    output = pipeline()
    assert (output / "log.txt").read_text() == "hello 5\n"
    assert outcomes(capsys) == [
        "1/2 write: finished before with the same inputs, not run again",
        "2/2 read: finished before with the same inputs, not run again",
    ]


def test_a_changed_parameter_runs_the_notebook_that_has_it(pipeline, capsys):
    pipeline()
    capsys.readouterr()
    output = pipeline(divisor="5")
    assert (output / "log.txt").read_text() == "hello 5\nhello 2\n"
    assert outcomes(capsys)[1] == "2/2 read: runs again, changed: parameters"


def test_what_an_earlier_notebook_wrote_is_an_input_of_the_next(pipeline, capsys):
    pipeline()
    capsys.readouterr()
    output = pipeline(words="other")
    assert (output / "log.txt").read_text() == "hello 5\nother 5\n"
    assert outcomes(capsys)[1] == "2/2 read: runs again, changed: input files"


def test_a_lost_result_is_made_again(pipeline, capsys):
    (pipeline() / "data" / "a.txt").unlink()
    capsys.readouterr()
    output = pipeline()
    assert (output / "data" / "a.txt").read_text() == "hello"
    assert (output / "log.txt").read_text() == "hello 5\n"
    assert outcomes(capsys)[0] == "1/2 write: runs again, data/a.txt is gone"


def test_a_moved_output_folder_counts_as_finished(pipeline, tmp_path, capsys):
    pipeline().rename(tmp_path / "moved")
    capsys.readouterr()
    (tmp_path / "out").symlink_to(tmp_path / "moved")
    pipeline()
    assert all("not run again" in line for line in outcomes(capsys))


def test_a_failing_cell_ends_the_run_with_its_error_last(pipeline):
    with pytest.raises(NotebookFailed) as failed:
        pipeline(divisor="0")
    assert str(failed.value).startswith("read.ipynb failed.")
    assert str(failed.value).splitlines()[-1].startswith("ZeroDivisionError: ")
    assert "ZeroDivisionError" in (pipeline.output / "notebooks" / "read.html").read_text(encoding="utf-8")
    assert not list((pipeline.output / "notebooks").glob("*running*"))


def test_after_a_failure_the_run_goes_on_where_it_stopped(pipeline, capsys):
    with pytest.raises(NotebookFailed):
        pipeline(divisor="0")
    capsys.readouterr()
    output = pipeline()
    assert (output / "log.txt").read_text() == "hello 5\n"
    assert outcomes(capsys) == ["1/2 write: finished before with the same inputs, not run again"]


def test_a_notebook_that_failed_after_it_had_finished_is_not_finished(pipeline):
    pipeline()
    with pytest.raises(NotebookFailed):
        pipeline(divisor="0")
    finished = json.loads((pipeline.output / "notebooks" / "finished.json").read_text())
    assert list(finished) == ["write"]


def test_a_killed_kernel_is_told_apart_and_its_cell_shown(make_notebook, tmp_path):
    killed = make_notebook("killed", CELL, "before = 1", "import os\nos.kill(os.getpid(), 9)", "after = 1")
    (tmp_path / "notebooks").mkdir()
    with pytest.raises(NotebookFailed, match=r"(?s)killed\.ipynb failed: .*os\.kill.*memory|memory.*os\.kill"):
        notebooks.execute(killed, {}, tmp_path / "notebooks", "1/1")
    assert (tmp_path / "notebooks" / "killed.html").exists()


def test_kernels_are_this_interpreter_whatever_else_is_called_python3(make_notebook, tmp_path, monkeypatch):
    spec = tmp_path / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "Wrong", "language": "python"}))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebook = make_notebook(
        "which", CELL, "import sys, llm_finetuning\nprint(sys.executable, llm_finetuning.__file__)"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    notebooks.run([{"drive_folder": str(tmp_path)}], _ready(tmp_path / "out"), (Step(notebook),))
    cells = nbformat.read(tmp_path / "out" / "notebooks" / "which.ipynb", 4).cells
    executable, package = cells[-1].outputs[0].text.split()
    assert executable == sys.executable
    assert Path(package) == cache.PACKAGE / "__init__.py"


def _ready(output: Path) -> Path:
    (output / "notebooks").mkdir(parents=True)
    return output


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_runs(pipeline, tmp_path):
    (tmp_path / "out").write_text("a file stands here")
    with pytest.raises(OSError, match=r"cannot write to .*out: .*Choose another folder with --output"):
        pipeline()
    assert (tmp_path / "out").read_text() == "a file stands here"


def test_impossible_settings_are_refused_before_anything_runs(make_notebook, tmp_path):
    @dataclass
    class Positive:
        number: int

        def __post_init__(self):
            if self.number < 1:
                raise ValueError(f"number = {self.number}: at least 1")

    (tmp_path / "p.yaml").write_text("number: 0\n")
    steps = tuple(Step(make_notebook(name, CELL + "number = 1"), Positive) for name in ("a", "b"))
    with pytest.raises(ValueError, match="number = 0: at least 1"):
        prepare(str(tmp_path / "p.yaml"), tmp_path / "out", [], steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "lora_rank", "8", "-p", "sede", "1"], ["lora_rank: no notebook", "sede: no notebook"]),
        (["--profile", "nonsense"], ["profile 'nonsense' not found", "rehearsal"]),
        (["-p", "lora_r", "many", "-p", "lora_dropout", "7"], ["lora_r = 'many'"]),
    ],
)
def test_the_command_refuses_what_it_does_not_know(tmp_path, arguments, words):
    command = [sys.executable, "-m", "llm_finetuning", "run", "--output", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, cwd=cache.PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Nothing was run.\n")
    assert all(word in done.stderr for word in words)
    assert not (tmp_path / "out").exists()

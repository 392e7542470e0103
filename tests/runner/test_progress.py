"""What a run shows while it runs: read from real progress bars, drawn on a narrow terminal, and as plain lines."""

import io
import re
import subprocess
import time

import nbformat
import pytest
from terminal_runs import started, terminal, wait_for
from tqdm import tqdm

from llm_finetuning.runner import pages
from llm_finetuning.runner import progress as progress_module
from llm_finetuning.runner.progress import Progress, read_bar

TRAINING = """import sys, time
from tqdm import tqdm
bar = tqdm(total=160, initial=120, unit="step", desc="resumed from step 120", file=sys.stdout, mininterval=0)
def train():
    for step in range(40):
        time.sleep(0.1)
        bar.update(1)
        bar.set_postfix_str("loss 0.412, 1,234 tokens/s, MFU 31%, 38.2 GiB")
train()
"""


@pytest.fixture
def notebooks(make_notebook):
    """A notebook that trains, with a heading, and one whose title is as long as the longest of the house."""
    trains = make_notebook("Phi-2 QLoRA Finetuning", "drive_folder = ''", TRAINING, "print('after ' + 'all ' * 80)")
    notebook = nbformat.read(trains, 4)
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell("Some words.\n\n## Training\nOne bar."))
    nbformat.write(notebook, trains)
    return [trains, make_notebook("OpenAssistant Finetuning Validation Data Prep", "drive_folder = ''", "1")]


def bar(moments: int = 3, **options: object) -> list[str]:
    """What tqdm writes for a bar that is updated a few times."""
    file = io.StringIO()
    with tqdm(file=file, mininterval=0, **options) as made:
        for _ in range(moments):
            time.sleep(0.01)
            made.update(1)
    return re.split(r"[\r\n]", file.getvalue())[1:-1]


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ({"total": 40, "unit": "step"}, "", r"step 3/40, [\d:]+ left"),
        ({"total": 40, "unit": "step", "postfix": {"loss": 0.4}}, "", r"step 3/40, loss=0\.4, [\d:]+ left"),
        ({"total": 9, "desc": "Loading weights"}, "Loading weights", r"3/9, [\d:]+ left"),
        ({"total": 9, "desc": "Map (num_proc=2)", "unit": " examples"}, "Map (num_proc=2)", r"examples 3/9, .* left"),
        ({"total": 9, "desc": "a: b", "ascii": True, "ncols": 70}, "a: b", r"3/9, [\d:]+ left"),
        (
            {"total": 5e9, "initial": 2e9, "desc": "m.gguf", "unit": "B", "unit_scale": True},
            "m.gguf",
            r"2\.00G/5\.00G.*",
        ),
        ({"total": 1200, "unit": "step", "smoothing": 0, "initial": 1000}, "", r"step 1003/1200, .* left"),
    ],
)
def test_a_bar_is_read_as_what_matters_of_it(options, name, said):
    found = read_bar(bar(**options)[-1].strip())
    assert found and found[0] == name
    assert re.fullmatch(said, found[1]), found[1]


def test_a_finished_bar_says_nothing_more():
    progress = Progress("1/1 a")
    progress.write("\n".join(bar(3, total=3, desc="Loading weights", unit="step")) + "\n")
    assert len(progress.lines()) == 1


@pytest.mark.parametrize("line", ["12 trees", "50% of 8/9 [all]", "loss: 3%|", "100%", "a|b|c 3/4 [00:01]", ""])
def test_what_is_no_bar_is_not_read_as_one(line):
    assert read_bar(line) is None


def test_a_bar_is_read_whatever_pieces_it_comes_in():
    progress = Progress("1/1 a")
    written = "".join(f"\r{line}" for line in bar(total=40, unit="step"))
    for start in range(0, len(written), 7):
        progress.write(written[start : start + 7])
    assert progress.lines()[-1].startswith("step 3/40, ")


@pytest.mark.parametrize("piece", ["xxx", "a: ", "100%|", "111"])
def test_a_line_without_an_end_is_shown_in_part_and_holds_nothing_up(piece):
    """Pictures in base64, minified JSON: the search for a bar in one takes the square of its length."""
    progress, text = Progress("1/1 a"), piece * 1_000_000
    for start in range(0, len(text), 65536):
        progress.write(text[start : start + 65536])
    assert progress.lines()[-1] == text[: progress_module.LONGEST].strip()
    assert pages.on_screen(text, loading=True) == text
    progress.write(f"\r{bar(total=40, unit='step')[-1]}")
    assert progress.lines()[-1].startswith("step 3/40")


def test_a_cell_shows_its_last_line_and_the_next_cell_begins_with_none():
    progress = Progress("1/1 a")
    progress.cell("# Title\nwords\n## Two\n", is_code=False)
    progress.cell("x = 1  # not a heading", is_code=True)
    progress.write("one\ntwo\n\n")
    assert progress.lines()[1:] == ["Title", "two"]
    progress.cell("y", is_code=True)
    assert progress.lines()[1:] == ["Title"]


@pytest.mark.parametrize("columns", [60, pytest.param(80, marks=pytest.mark.more)])
def test_a_terminal_shows_heading_steps_loss_and_time_left_and_nothing_wider_than_it_is(notebooks, tmp_path, columns):
    with terminal(columns) as (end, read), started(tmp_path / "out", *notebooks, stdout=end, stderr=end) as run:
        wait_for(lambda: run.poll() is not None)
        text = read()
    assert run.returncode == 0, text
    lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "\r\n", text).replace("\r", "").split("\n")
    assert [line for line in lines if len(line) > columns] == []
    assert any(re.fullmatch(r"1/2 Phi-2 QLoRA Finetuning \d\d:\d\d", line) for line in lines)
    assert "  Training: resumed from step 120" in lines
    assert any(re.match(r"  step 1\d\d/160, loss 0\.412, \d\d:\d\d left", line) for line in lines)
    assert len({line for line in lines if re.fullmatch(r"1/2 .* \d\d:\d\d", line)}) > 2, "the time does not tick"
    assert text.count("\x1b[?25l") <= text.count("\x1b[?25h"), "the cursor stays hidden"


def test_a_pipe_gets_the_same_as_plain_lines_one_at_a_time(notebooks, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(tmp_path / "out", *notebooks, every=1, **pipes) as run:
        out, err = run.communicate()
    assert run.returncode == 0 and err == ""
    assert "\r" not in out and "\x1b" not in out
    facts = (
        r"1/2 Phi-2 QLoRA Finetuning [\d:]+, Training: resumed from step 120, step 1\d\d/160, loss 0\.412, [\d:]+ left"
    )
    trained = [line for line in out.splitlines() if re.match(facts, line)]
    assert 2 <= len(trained) <= 6, out  # four seconds of training, a line a second
    assert [line.rpartition(": ")[0] for line in out.splitlines() if re.fullmatch(r"\d/2 .*: [\d:]+", line)] == [
        "1/2 Phi-2 QLoRA Finetuning",
        "2/2 OpenAssistant Finetuning Validation Data Prep",
    ]

"""Executed notebooks as they are kept: what a screen would show in the end, pictures with words, no dead widgets."""

import html
import io
import re
import time

import nbformat
import pytest
from nbformat import v4
from tqdm import tqdm

from llm_finetuning import plotting
from llm_finetuning.runner import notebooks, pages

CELL = "drive_folder = ''"


def stream(text: str, name: str = "stdout"):
    return v4.new_output("stream", name=name, text=text)


def tidied(*outputs) -> list:
    notebook = v4.new_notebook(cells=[v4.new_code_cell("x", outputs=list(outputs))])
    return pages.tidy(notebook).cells[0].outputs


def bars(steps: int, **options: object) -> list[str]:
    """The pieces in which tqdm writes a bar of ten."""
    file = io.StringIO()
    bar = tqdm(total=10, file=file, mininterval=0, **options)
    for _ in range(steps):
        time.sleep(0.002)
        bar.update(1)
    if steps == 10:
        bar.close()
    return re.findall(r"\r[^\r]*", file.getvalue())


def test_a_stream_that_came_in_pieces_is_one():
    out = tidied(stream("one "), stream("two\n"), stream("bad\n", "stderr"), stream("three\n"))
    assert [(output.name, output.text) for output in out] == [
        ("stdout", "one two\n"),
        ("stderr", "bad\n"),
        ("stdout", "three\n"),
    ]


def test_of_a_bar_its_last_state_stays_and_of_a_finished_one_of_loading_nothing():
    (training,) = tidied(*map(stream, bars(10, unit="step", postfix="loss 0.4")))
    assert training.text.count("\n") == 1 and "10/10" in training.text and "\r" not in training.text
    (unfinished,) = tidied(*(stream(piece, "stderr") for piece in bars(4, desc="Loading weights")))
    assert unfinished.text.startswith("Loading weights:  40%|")
    loading = [stream(piece, "stderr") for piece in bars(10, desc="Loading weights")]
    assert tidied(*loading) == []
    assert [output.text for output in tidied(*loading, stream("a warning\n", "stderr"))] == ["a warning\n"]


def test_a_bar_around_a_figure_stands_once_and_below_it():
    figure = v4.new_output("display_data", data={"image/png": "AAAA"})
    pieces = [stream(piece) for piece in bars(10, unit="step")]
    before, after = tidied(stream("begins\n"), *pieces[:4], figure, *pieces[4:])[::2]
    assert before.text == "begins\n"
    assert "10/10" in after.text and after.text.count("|") == 2


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("a\r\nb\r\n", "a\nb\n"),
        ("10%\r20%\r100%\n", "100%\n"),
        ("done\r", "done"),
        ("words\r     \rnext\n", "next\n"),
        ("\x1b[31mred\x1b[0m\n", "\x1b[31mred\x1b[0m\n"),
        ("first\n\r a\n\r b\x1b[A\r c\n\r d\x1b[A\rlast\n", "first\nlast\n d"),
        ("\x1b[A\x1b[Aup\n", "up\n"),
        ("", ""),
    ],
)
def test_what_moves_the_cursor_is_applied(written, seen):
    assert pages.on_screen(written, loading=False) == seen


def test_nested_bars_end_as_on_a_screen(capsys):
    for _ in tqdm(range(2), desc="outer", position=0):
        for _ in tqdm(range(3), desc="inner", position=1, leave=False):
            pass
    lines = pages.on_screen(capsys.readouterr().err, loading=False).split("\n")
    assert [line[:12] for line in lines if line.strip()] == ["outer: 100%|"]


def test_a_page_keeps_no_bars_and_describes_its_figures_and_its_widgets(make_notebook, tmp_path):
    notebook = make_notebook(
        "all kinds",
        CELL,
        "from tqdm.auto import tqdm\nimport sys\nfor _ in tqdm(range(9), desc='Loading <weights>'): pass",
        "for _ in tqdm(range(9), file=sys.stdout, unit='step'): print('x', end='')",
        "import ipywidgets\nipywidgets.VBox([ipywidgets.Text(placeholder='Type a question')])",
        "from llm_finetuning import plotting\nfigure, axes = plotting.new_figure()\n"
        "axes[0, 0].set_title('Loss & \"more\"')\naxes[0, 0].set_xlabel('step')\naxes[0, 0].set_ylabel('nats')\nfigure",
        "print('last')",
    )
    (tmp_path / "pages").mkdir()
    notebooks.execute(notebook, {}, tmp_path / "pages", "1/1 all kinds")
    page = (tmp_path / "pages" / "all kinds.html").read_text(encoding="utf-8")
    assert "Loading &lt;weights&gt;: " not in page
    assert html.unescape(re.search(r"<img alt='([^']*)'", page)[1]) == 'Loss & "more": nats over step'
    assert "No description has been provided" not in page
    dark = page.partition('<style media="(prefers-color-scheme: dark)">')[2].partition("</style>")[0]
    assert re.search(r"--jp-layout-color0: #1", dark)
    assert pages.INSTEAD_OF_WIDGET in page and "application/vnd.jupyter.widget" not in page
    kept = nbformat.read(tmp_path / "pages" / "all kinds.ipynb", 4)
    nbformat.validate(kept)
    outputs = [output for cell in kept.cells for output in cell.outputs]
    assert "widgets" not in kept.metadata
    assert outputs[-1].text == "last\n"
    assert not [output.text for output in outputs if "\r" in output.get("text", "")]
    assert outputs[-2].metadata["image/png"]["alt"] == 'Loss & "more": nats over step'
    assert "text/html" not in outputs[-2].data  # a picture that any viewer shows


@pytest.mark.browser
def test_no_code_is_cut_off_in_a_narrow_window(new_window, tmp_path):
    long = "# " + "a sentence of words " * 6 + "\n    x = '" + "one_name" * 14 + "'"
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(long)]), tmp_path / "run.ipynb")
    page = new_window(500)
    page.goto(pages.write(tmp_path / "run.ipynb", tmp_path / "kept.ipynb").as_uri())
    code = page.locator(".jp-InputArea-editor")
    assert code.evaluate("code => code.scrollWidth <= code.clientWidth") and "    x =" in code.inner_text()


def test_a_figure_says_what_it_shows():
    figure, axes = plotting.new_figure(1, 2)
    figure.suptitle("Both")
    axes[0, 0].set_title("Left", loc="left")
    axes[0, 0].set_xlabel("tokens\nof it")
    axes[0, 1].set_ylabel("pairs")
    assert figure.alt_text() == "Both; Left: tokens of it; pairs"

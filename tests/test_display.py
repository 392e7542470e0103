"""Tables of texts as a reader sees them: in a real browser, and in a notebook turned into a page."""

from pathlib import Path

import nbformat
import pandas as pd
import pytest

from llm_finetuning.display import text_table

CODE = "def f(x):\n    if x < 1 && x > 0:\n\treturn `$x$`\n\n\n"
TEXTS = [
    "One line.\nA second.\n  A third, indented.",
    "It costs $5 and $10, or \\(x^2\\).",
    "<b>bold</b> <script>window.hacked = 1</script> &amp; &lt;",
    CODE,
    "\n leading and trailing \n",
    "word " * 400 + "END",
    "https://example.org/" + "a" * 500,
    "<table><tr><td></pre></td></tr></table>",
]


@pytest.fixture
def texts() -> pd.DataFrame:
    return pd.DataFrame({"prompt": TEXTS, "tokens": range(990, 990 + len(TEXTS)), "answer": TEXTS[::-1]})


def test_a_value_of_any_kind_is_shown():
    table = pd.DataFrame({"a": ["007", None], "<b>": [1.5, float("nan")], "c": [[{"role": "user"}], pd.NA]})
    html = text_table(table).data
    assert ">\n007<" in html and ">\n1.5<" in html and "&lt;b&gt;" in html and "{&#x27;role&#x27;" in html
    assert html.count(">\n<") == 3  # what is missing is empty
    assert text_table(table.head(0)).data.count("<tr>") == 1


def test_columns_on_two_levels_get_one_name():
    both = pd.concat({"": pd.DataFrame({"q": ["x"]}), "base": pd.DataFrame({"answer": ["y"]})}, axis="columns")
    assert [part.split("<")[0] for part in text_table(both).data.split('top">')[1:3]] == ["q", "base answer"]


@pytest.mark.browser
@pytest.mark.parametrize("as_notebook", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_each_text_is_there_whole_in_a_browser(new_window, texts, tmp_path, width, as_notebook):
    table = text_table(texts)
    page = tmp_path / "page.html"
    page.write_text(_notebook_page(table.data) if as_notebook else f"<!doctype html>{table.data}", encoding="utf-8")
    window = new_window(width)
    window.route("http*://**", lambda route: route.abort())
    window.goto(page.as_uri())
    assert window.evaluate("window.hacked") is None
    cells = window.locator("td pre")
    assert cells.evaluate_all("all => all.map(e => e.textContent)") == [
        str(value) for row in texts.itertuples(index=False) for value in row
    ]
    assert window.locator("th").all_inner_texts() == ["prompt", "tokens", "answer"]
    for style, expected in {"textAlign": "left", "whiteSpace": "pre-wrap"}.items():
        assert set(cells.evaluate_all(f"all => all.map(e => getComputedStyle(e).{style})")) == {expected}
    box = window.locator("table").bounding_box()
    assert box["x"] + box["width"] <= width
    assert cells.first.bounding_box()["height"] > 2 * cells.nth(1).bounding_box()["height"]


def _notebook_page(html: str) -> str:
    from nbconvert import HTMLExporter

    cell = nbformat.v4.new_code_cell("t", outputs=[nbformat.v4.new_output("display_data", {"text/html": html})])
    return HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0]


def test_every_table_of_texts_in_the_notebooks_is_shown_as_one():
    source = "\n".join(
        cell.source
        for path in Path(__file__).parents[1].glob("*/*.ipynb")
        for cell in nbformat.read(path, 4).cells
        if cell.cell_type == "code"
    )
    makers = ["dialogue", "sampled", "side_by_side"]
    for maker in [*(f"tables.{name}(" for name in makers), "scoreboard.side_by_side(", "preview.pairs("]:
        assert source.count(maker) == source.count(f"text_table({maker}") > 0, maker
    assert "max_colwidth" not in source


def test_a_table_of_findings_shows_its_sentences_whole():
    sentence = "isolated from one another (logits differ by 1.2e-06)" * 3
    assert sentence in pd.DataFrame({"found": [sentence]})._repr_html_()


@pytest.mark.browser
def test_texts_beside_many_columns_are_not_squeezed(new_window):
    """As a table of messages shows them: beside eight columns of one word, on a wide page."""
    texts = {"id": ["00c5e180-93d5-5362-b89b-110c226e8ba7"], "text": ["What does Nuri like to eat most? " * 3]}
    table = pd.DataFrame(texts).assign(**{f"number {n}": ["ready_for_export"] for n in range(8)})
    page = new_window(1100)
    page.set_content(text_table(table).data)
    boxes = [page.locator("td pre").nth(n).bounding_box() for n in range(2)]
    assert all(box["width"] > 150 and box["height"] < 160 for box in boxes), boxes
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the table scrolls, not the page"

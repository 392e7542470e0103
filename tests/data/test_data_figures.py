"""The data preparation's plots: what they show is what they were given, and nothing overlaps."""

import itertools

import pandas as pd
import pytest
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from llm_finetuning import plotting
from llm_finetuning.data import figures, preview

FUNNEL = pd.DataFrame(
    [("trees in the source", "tree", 9846, 0), ("tree state ready_for_export", "tree", 9000, 846)]
    + [("messages of these trees", "message", 84437, 0), ("prompt less than 90% like an earlier one", "pair", 1, 0)],
    columns=["step", "unit", "kept", "dropped"],
)
LENGTHS = pd.DataFrame({"prompt": [10, 20, 30], "history": [0, 0, 900], "response": [5, 50, 500]})
LENGTHS["total"] = LENGTHS.sum(axis=1)
MANY = {f"l{number}": 1000 - number for number in range(35)}

PLOTS = {
    "funnel": figures.funnel(FUNNEL, "Title"),
    "languages": figures.languages(MANY, {"en": 20}, "Title"),
    "pairs alone": figures.languages(None, {"unknown": 1}, "Title"),
    "shape": figures.shape(
        {
            label: {"in the source": {"0": 9846, "1": 27000}, "after the filters": {"0": 5}}
            for label in ("turns", "replies")
        },
        "Title",
    ),
    "lengths": figures.token_lengths(LENGTHS, 1024, "Title"),
}


def drawn(figure: Figure) -> list[Text]:
    """The texts that are drawn: all but the labels of ticks beyond an axis's end."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [*axes.texts, axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_text().strip()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in drawn(figure)]


@pytest.mark.parametrize("name", PLOTS)
def test_texts_stand_inside_the_figure_and_apart(name):
    canvas = FigureCanvasAgg(PLOTS[name])
    canvas.draw()
    width, height = canvas.get_width_height()
    boxes = {text: text.get_window_extent(canvas.get_renderer()) for text in drawn(PLOTS[name])}
    assert len(boxes) >= 4
    for text, box in boxes.items():
        assert text.get_fontsize() >= 9, text
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
    for (one, box), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not box.padded(-1).overlaps(second.padded(-1)), (one, other)


def test_the_funnel_shows_every_count():
    shown = " ".join(texts(PLOTS["funnel"]))
    for part in ("9,846", "9,000  (−846)", "84,437", *FUNNEL["step"]):
        assert part in shown


def test_rare_languages_are_shown_together():
    shown = texts(PLOTS["languages"])
    assert "24 others" in shown and f"{sum(range(966, 990)):,}" in shown


def test_bars_of_both_panels_are_equally_thick():
    heights = {round(bar.get_window_extent().height) for axes in PLOTS["languages"].axes for bar in axes.patches}
    assert len(heights) == 1


def test_the_cut_off_line_says_how_much_lies_beyond():
    assert any("limit 1,024" in text and "33.3% beyond" in text for text in texts(PLOTS["lengths"]))
    line = PLOTS["lengths"].axes[3].lines[0]
    assert list(line.get_xdata()) == [1024, 1024]


def test_a_saved_figure_is_a_whole_png(tmp_path):
    path = tmp_path / "figures" / "funnel.png"
    assert plotting.save(PLOTS["funnel"], path) is PLOTS["funnel"]
    assert path.read_bytes().startswith(b"\x89PNG") and list(path.parent.iterdir()) == [path]


def test_a_notebook_shows_the_picture():
    from IPython.core.formatters import DisplayFormatter

    data, metadata = DisplayFormatter().format(PLOTS["shape"])
    assert data["image/png"].startswith(b"\x89PNG") and metadata["image/png"]["width"] == 800


def test_the_outline_indents_replies_and_escapes_texts():
    messages = pd.DataFrame(
        [("q", None, "prompter", "<script>", None), ("a", "q", "assistant", "Answer", 0)],
        columns=["message_id", "parent_id", "role", "text", "rank"],
    ).assign(message_tree_id="t")
    html = preview.source(messages)
    assert "&lt;script&gt;" in html and "<script>" not in html
    assert html.index("margin-left:0px") < html.index("margin-left:22px") and "rank 0" in html
    pairs = pd.DataFrame(
        [{"prompt": "<b>", "response": "R", "history": [{"role": "user", "content": "H"}], "lang": None}]
    )
    read = preview.pairs(pairs)
    assert list(read.columns) == ["lang", "turns before", "prompt", "response"] and read["turns before"][0] == 1
    for shown in (preview.pair(preview.telling_pair(pairs)), preview.source(pairs)):
        assert "&lt;b&gt;" in shown and "R" in shown


@pytest.mark.parametrize("page", [(255, 255, 255), (13, 17, 23)], ids=["white page", "dark page"])
@pytest.mark.parametrize("name", PLOTS)
def test_a_saved_figure_is_read_on_a_light_and_on_a_dark_page(name, page, tmp_path):
    plotting.save(PLOTS[name], tmp_path / "figure.png")
    picture = Image.open(tmp_path / "figure.png").convert("RGBA")
    assert picture.getpixel((0, 0))[3] == 0, "the page's own background is seen"
    for text in drawn(PLOTS[name]):
        assert contrast(colors.to_rgb(text.get_color()), [value / 255 for value in page]) > 3.5, text.get_text()


def contrast(one, other) -> float:
    """The ratio of two colours' luminances as WCAG 2 defines it."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

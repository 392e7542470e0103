"""What a notebook shows besides figures: tables of texts, the loss mask in colour, and a figure that is updated."""

import html

import pandas as pd
import transformers
from IPython import get_ipython
from IPython.display import HTML, Image, display

from llm_finetuning import plotting, prompts

pd.set_option("display.max_colwidth", None)  # a table of findings shows its sentences whole

IN_LOSS_STYLE = "background:#cfe8cf;color:#103010;border-radius:3px;padding:1px 0"
MASKED_STYLE = "background:#ececec;color:#555"
CELL_STYLE = "text-align:left;vertical-align:top"
TEXT_STYLE = (
    "margin:0;padding:0;background:none;text-align:left;font:90% monospace;"
    "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere"
)
BREAKABLE = 24
"""A text of more characters than this may be broken anywhere beyond them; a shorter one keeps its words whole."""


def text_table(table: pd.DataFrame) -> HTML:
    """Shows a table that holds texts as HTML: whole and wrapped, with line breaks and indentation, without the index.

    Nothing in a text is read as markup or as mathematics: it is escaped, and MathJax leaves <pre> alone.
    """
    names = [" ".join(filter(None, name)) if isinstance(name, tuple) else str(name) for name in table.columns]
    head = "".join(f'<th style="{CELL_STYLE}">{html.escape(name)}</th>' for name in names)
    rows = table.itertuples(index=False, name=None)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    style = "width:100%;table-layout:auto;border-spacing:0"
    return HTML(
        f'<div style="overflow-x:auto"><table class="tex2jax_ignore mathjax_ignore" style="{style}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    """Formats a value as a table cell; the line break after <pre> is not part of its text."""
    text = "" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)
    style = f"{TEXT_STYLE};{f'min-width:min({BREAKABLE}ch,15vw)' if len(text) > BREAKABLE else 'overflow-wrap:normal'}"
    return f'<td style="{CELL_STYLE}"><pre style="{style}">\n{html.escape(text)}</pre></td>'


def loss_mask(example: dict, tokenizer: "transformers.PreTrainedTokenizerBase") -> HTML:
    """Shows the loss mask of an example as HTML: tokens in the loss in green, those that are masked out in grey."""
    spans = [
        _span(tokenizer.decode([token]), label != prompts.IGNORE_INDEX)
        for token, label in zip(example["input_ids"], example["labels"], strict=True)
    ]
    key = f"{_span(' in the loss ', True)} {_span(' masked ', False)}"
    return HTML(
        f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.7">{key}\n\n{"".join(spans)}</div>'
    )


def _span(text: str, in_loss: bool) -> str:
    shown = html.escape(text).replace("\n", "⏎\n")
    return f'<span style="{IN_LOSS_STYLE if in_loss else MASKED_STYLE}; border-right:1px solid #fff">{shown}</span>'


def live_figure(figure: plotting.Plot, name: str) -> None:
    """Shows a figure in the notebook; a later call with the same name replaces it. Nothing outside a notebook."""
    if get_ipython() is None:
        return
    picture, size = figure._repr_png_()
    image = Image(data=picture, format="png", **size)
    if name in _SHOWN:
        _SHOWN[name].update(image)
    else:
        _SHOWN[name] = display(image, display_id=True)


_SHOWN: dict = {}

"""What a notebook shows besides tables and figures: trained tokens in colour, and a figure that grows."""

import html

from llm_finetuning import prompts

TRAINED_STYLE = "background:#cfe8cf;color:#103010;border-radius:3px;padding:1px 0"
IGNORED_STYLE = "background:#ececec;color:#555"


def loss_mask(row: dict, tokenizer):
    """An encoded row as HTML: every token by itself, those that are trained in green, the others in grey."""
    from IPython.display import HTML

    spans = [
        _span(tokenizer.decode([token]), label != prompts.IGNORE_INDEX)
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    ]
    key = f"{_span(' trained ', True)} {_span(' not trained ', False)}"
    return HTML(
        f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.7">{key}\n\n{"".join(spans)}</div>'
    )


def _span(text: str, trained: bool) -> str:
    shown = html.escape(text).replace("\n", "⏎\n")
    return f'<span style="{TRAINED_STYLE if trained else IGNORED_STYLE}; border-right:1px solid #fff">{shown}</span>'


def live_figure(figure, name: str) -> None:
    """Shows a figure in the notebook; a later call with the same name replaces it. Nothing outside a notebook."""
    from IPython import get_ipython
    from IPython.display import Image, display

    if get_ipython() is None:
        return
    picture, size = figure._repr_png_()
    image = Image(data=picture, format="png", **size)
    if name in _SHOWN:
        _SHOWN[name].update(image)
    else:
        _SHOWN[name] = display(image, display_id=True)


_SHOWN: dict = {}

"""What a notebook shows besides tables and figures: the loss mask in colour, and a figure that is updated."""

import html

import transformers
from IPython import get_ipython
from IPython.display import HTML, Image, display

from llm_finetuning import plotting, prompts

IN_LOSS_STYLE = "background:#cfe8cf;color:#103010;border-radius:3px;padding:1px 0"
MASKED_STYLE = "background:#ececec;color:#555"


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

"""Shows a conversation tree, or a pair, as HTML in a notebook, and picks what there is to read of pairs."""

from html import escape

import pandas as pd

INDENT = 22  # pixels a level
LONGEST = 160  # characters shown of a message
COLOURS = {"prompter": "#3b6ea5", "assistant": "#d9822b"}


def source(rows: pd.DataFrame) -> str:
    """Shows one tree of the messages that were read, or one pair of ready-made ones."""
    if not len(rows):
        return "<p>Nothing was read for this split.</p>"
    return tree(rows) if "parent_id" in rows.columns else pair(telling_pair(rows))


def telling_pair(rows: pd.DataFrame) -> pd.Series:
    """Returns the first pair with turns before its prompt, or else the first."""
    with_history = rows[rows["history"].map(len) > 0]
    return (with_history if len(with_history) else rows).iloc[0]


def tree(messages: pd.DataFrame, tree_id: str | None = None) -> str:
    """Shows one tree as an indented outline, each message with its rank under the one it replies to.

    tree_id: the tree to show; None = the first with at least two levels of prompts and ranked siblings, or
    else the largest.
    """
    rows = messages[messages["message_tree_id"] == (tree_id or _telling_tree(messages))]
    depths: dict[str, int] = {}
    lines = []
    for row in rows.itertuples():
        depths[row.message_id] = depths.get(row.parent_id, -1) + 1
        rank = "" if pd.isna(row.rank) else f' <span style="color:#777">rank {row.rank}</span>'
        lines.append(
            f'<div style="margin-left:{INDENT * depths[row.message_id]}px;margin-bottom:3px">'
            f'<b style="color:{COLOURS[row.role]}">{row.role}</b>{rank} {escape(_short(row.text))}</div>'
        )
    return f'<div style="font-size:90%;line-height:1.35">{"".join(lines)}</div>'


def _telling_tree(messages: pd.DataFrame) -> str:
    sizes = messages["message_tree_id"].value_counts()
    ranked = messages.loc[messages["rank"].notna(), "message_tree_id"]
    middling = sizes[sizes.index.isin(ranked) & sizes.between(6, 14)]
    return middling.index[0] if len(middling) else sizes.index[0]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def pair(row: pd.Series) -> str:
    """Shows one pair in full: the turns before in grey, the prompt, and the response, whose tokens are in the loss."""
    before = "".join(_turn(turn["role"], turn["content"], "#777") for turn in row["history"])
    return (
        before
        + _turn("prompt", row["prompt"], COLOURS["prompter"])
        + _turn("response (in the loss)", row["response"], COLOURS["assistant"])
    )


def _turn(name: str, text: str, colour: str) -> str:
    return (
        f'<div style="margin:4px 0;white-space:pre-wrap"><b style="color:{colour}">{escape(name)}</b> '
        f"{escape(text)}</div>"
    )


def pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns what there is to read of pairs: language, number of turns before, prompt and response."""
    return rows.assign(**{"turns before": rows["history"].map(len)})[["lang", "turns before", "prompt", "response"]]

"""A conversation as HTML: what was typed is shown as typed, answers as Markdown, and nothing in either as markup."""

import time
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import Any

import pygments
from markdown_it import MarkdownIt
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from llm_finetuning.inference.votes import CHOICES, Ballot

STYLE = """
.gradio-container { width: 100% !important; max-width: 900px !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; }
#title h1 { font-size: 1.3rem; margin: 0.2rem 0; }
#about, #status { font-size: 0.85rem; opacity: 0.8; }
#status { min-height: 1.4rem; }
#conversation { height: max(14rem, calc(100dvh - 22rem)); overflow-y: auto !important; }
#conversation { border: 1px solid var(--border-color-primary); border-radius: 8px; }
#conversation .messages { padding: 0.8rem; display: flex; flex-direction: column; gap: 0.6rem; }
#conversation .placeholder { text-align: center; padding: 2rem 0.5rem; }
#conversation .example { display: block; margin: 0.5rem auto; padding: 0.7rem; border-radius: 8px; }
#conversation .message { max-width: 92%; min-width: 0; }
#conversation .user { align-self: flex-end; }
#conversation .text { padding: 0.5rem 0.8rem; border-radius: 8px; overflow-wrap: anywhere; tab-size: 4; }
#conversation .user .text { white-space: pre-wrap; background: var(--color-accent-soft); }
#conversation .assistant .text { background: var(--block-background-fill); }
#conversation .text > :first-child { margin-top: 0; }
#conversation .text > :last-child { margin-bottom: 0; }
#conversation .text p { margin: 0.5rem 0; }
#conversation .text pre { overflow-x: auto; padding: 0.6rem; background: var(--body-background-fill); }
#conversation .text code { font-family: ui-monospace, monospace; font-size: 0.9em; white-space: inherit; }
#conversation .text ul, #conversation .text ol { padding-left: 1.4rem; list-style: revert; }
#conversation th, #conversation td { border: 1px solid var(--border-color-primary); padding: 0.2rem 0.5rem; }
#conversation textarea { width: 100%; min-width: 15rem; min-height: 5rem; color: inherit; background: none; }
#conversation button { border: 1px solid var(--border-color-primary); color: inherit; cursor: pointer; }
#conversation .ballot { display: flex; flex-wrap: wrap; gap: 0.6rem; }
#conversation .ballot section { flex: 1 1 18rem; min-width: 0; }
#conversation .ballot h2 { font-size: 0.85rem; margin: 0 0 0.2rem; }
#conversation .ballot .text { background: var(--block-background-fill); overflow-y: auto; }
#conversation .ballot .text { max-height: max(8rem, calc(100dvh - 34rem)); }
#conversation .choices { flex-basis: 100%; display: flex; flex-wrap: wrap; gap: 0.5rem; justify-content: center; }
#conversation .choices { position: sticky; bottom: 0; padding: 0.6rem; background: var(--body-background-fill); }
#conversation .choices button { padding: 0.3rem 0.7rem; border-radius: 8px; font-size: 0.85rem; margin: 0 !important; }
#conversation .actions button { all: unset; cursor: pointer; font-size: 0.75rem; opacity: 0.7; margin: 0 0.4rem; }
#conversation .actions button:focus-visible { outline: 2px solid var(--color-accent); }
#conversation button:hover { text-decoration: underline; opacity: 1; }
footer { display: none !important; }
"""
COLOURING_SECONDS = 0.1
"""CPU time for the colours of one block of code: some are quadratic in its length, and every visitor would wait."""
COLOURS = HtmlFormatter(nowrap=True)


def _colours(style: str, place: str) -> str:
    """Returns the CSS for the code of answers in a style of Pygments."""
    return "\n".join(HtmlFormatter(style=style).get_token_style_defs(f"{place} #conversation pre"))


STYLE += _colours("xcode", "") + _colours("github-dark", ".dark")

SCRIPT = """
const copied = (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.body.appendChild(document.createElement('textarea'));  // a page that is not secure has no other
  area.value = text; area.select(); document.execCommand('copy'); area.remove();
};
const button = (label, click) => {
  const made = document.createElement('button');
  made.textContent = label; made.onclick = click;
  return made;
};
const edit = (place, index, text) => {
  const area = document.createElement('textarea');
  area.value = text; area.setAttribute('aria-label', 'Edited message');
  place.replaceChildren(area, button('Submit', () => trigger('submit', {index, text: area.value})), ' ',
    button('Cancel', () => { place.textContent = text; }));
  area.focus();
};
element.addEventListener('click', (event) => {
  const pressed = event.target.closest('button[data-action]');
  if (!pressed) return;
  const {action, text} = pressed.dataset, index = Number(pressed.dataset.index);
  if (action === 'copy') { copied(text); pressed.textContent = 'Copied'; }
  else if (action === 'edit') edit(pressed.closest('.message').querySelector('.text'), index, text);
  else trigger(action, {index, text});
});
"""

EXPORT = """(messages) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([JSON.stringify({messages}, null, 1)], {type: 'application/json'}));
  link.download = 'conversation.json';
  link.click();
}"""
"""Saves the conversation as `{"messages": […]}`, a shape that the data preparation reads."""


def _link_to_image(tokens: Sequence[Any], index: int, _options: Any, _env: Any) -> str:
    """Renders an image as a link to it: no answer makes the reader's browser ask another server for anything."""
    address = escape(str(tokens[index].attrGet("src")))
    return (
        f'<a href="{address}" target="_blank" rel="noopener noreferrer">{escape(tokens[index].content) or address}</a>'
    )


def _coloured(code: str, language: str, _attributes: str) -> str:
    """Renders a code block in the colours of its named language; "" = as it is, escaped by the caller."""
    try:
        found = get_lexer_by_name(language, stripnl=False, ensurenl=False).get_tokens(code)
    except ClassNotFound:
        return ""
    end, tokens = time.thread_time() + COLOURING_SECONDS, []
    for token in found:
        if time.thread_time() > end:
            return ""
        tokens.append(token)
    return pygments.format(tokens, COLOURS)


def _markdown() -> MarkdownIt:
    options = {"html": False, "breaks": True, "highlight": _coloured}
    markdown = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    markdown.renderer.rules["image"] = _link_to_image
    return markdown


MARKDOWN = _markdown()


@lru_cache(maxsize=256)
def _answer(text: str) -> str:
    """Renders an answer; the earlier ones of a conversation are not rendered again while the last one grows."""
    return MARKDOWN.render(text)


def conversation(messages: list[dict], examples: list[str], ballot: Ballot | None = None) -> str:
    """Renders a conversation, an empty one as questions to begin with; a ballot stands below its question."""
    if not messages:
        offered = "".join(_button("submit", 0, text, text, "example") for text in examples)
        inside = f'<div class="placeholder">Ask something. The answer comes word by word; Stop ends it.{offered}</div>'
    else:
        inside = "".join(_message(messages, index) for index in range(len(messages)))
        inside += _ballot(ballot) if ballot else ""
    return f'<div class="messages" role="log" aria-label="Conversation">{inside}</div>'


def _message(messages: list[dict], index: int) -> str:
    role, text = messages[index]["role"], messages[index]["content"]
    buttons = [_button("copy", index, text, "Copy")]
    if role == "user":
        shown = f'<div class="text" data-testid="user">{escape(text)}</div>'
        buttons.append(_button("edit", index, text, "Edit"))
    else:
        shown = f'<div class="text" data-testid="bot">{_answer(text)}</div>'
    if index == len(messages) - 1:
        asked = index if role == "user" else index - 1
        question = messages[asked]["content"]
        buttons += [_button("submit", asked, question, "Retry"), _button("undo", asked, question, "Undo")]
    return f'<div class="message {role}">{shown}<div class="actions">{"".join(buttons)}</div></div>'


def _ballot(ballot: Ballot) -> str:
    """Renders two answers side by side and what can be chosen; nothing in it tells whose they are."""
    answers = "".join(
        f'<section aria-label="Answer {letter}"><h2>{letter}</h2>'
        f'<div class="text" data-testid="answer-{letter}">{_answer(text) or "(no answer)"}</div></section>'
        for letter, text in zip("AB", ballot.answers, strict=True)
    )
    choices = "".join(_button("select", n, ballot.number, label) for n, label in enumerate(CHOICES.values()))
    return (
        f'<div class="ballot">{answers}'
        f'<div class="choices" role="group" aria-label="Which answer is better?">{choices}</div></div>'
    )


def _button(action: str, index: int, text: str, label: str, kind: str = "") -> str:
    return (
        f'<button class="{kind}" data-action="{action}" data-index="{index}" data-text="{escape(text)}"'
        f' aria-label="{escape(label)}">{escape(label)}</button>'
    )

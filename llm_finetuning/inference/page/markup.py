"""Texts on the chat page: Markdown is rendered, and HTML is shown as the text that it is."""

import html
import re
from collections.abc import Callable

CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
"""Fenced or inline code, in which Markdown shows HTML as text by itself."""

STYLE = """
.gradio-container { width: 100% !important; max-width: 900px !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; }
#conversation .placeholder-content { width: 100%; text-align: center; }
#conversation .example { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 0.7rem; }
#conversation .example:hover { border-color: var(--color-accent); }
#title h1 { font-size: 1.3rem; margin: 0.2rem 0; }
#status { min-height: 1.4rem; font-size: 0.85rem; opacity: 0.8; }
footer { display: none !important; }
"""


def as_shown(text: str) -> str:
    """Escapes text for a Markdown component: <, > and & outside code become entities."""
    return _outside_code(text, lambda part: html.escape(part, quote=False))


def as_typed(shown: str) -> str:
    """Reverses `as_shown`."""
    return _outside_code(shown, html.unescape)


def text_of(message: dict) -> str:
    """Returns the text of a message as Gradio hands it over: a string, or a list of blocks."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    parts = CODE.split(text)
    parts[::2] = [change(part) for part in parts[::2]]
    return "".join(parts)

"""A box to chat in, inside a notebook."""

import html
from typing import Any

from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters


def chat_box(chat: Chat, sampling: SamplingParameters) -> Any:
    """Makes a widget with a conversation, an input line and buttons; what was typed or answered is never markup."""
    return _Box(chat, sampling).view


class _Box:
    def __init__(self, chat: Chat, sampling: SamplingParameters):
        import ipywidgets as widgets  # not everywhere; the notebook looks first

        self.chat, self.sampling = chat, sampling
        self.messages: list[dict] = []
        self.shown = widgets.HTML()
        self.line = widgets.Text(placeholder="Type a question and press Enter", layout={"width": "100%"})
        self.line.continuous_update = False
        send = widgets.Button(description="Send", button_style="primary")
        clear = widgets.Button(description="New conversation")
        self.line.observe(self._typed, names="value")
        send.on_click(self._typed)
        clear.on_click(self._clear)
        self.view = widgets.VBox([self.shown, self.line, widgets.HBox([send, clear])])

    def _typed(self, _event: object) -> None:
        text, self.line.value = self.line.value, ""
        if not text.strip():
            return
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            stream = self.chat.stream(asked, self.sampling)
        except ValueError as error:
            self.shown.value = as_html(asked) + as_html([{"role": "note", "content": str(error)}])
            return
        answer = ""
        for piece in stream:
            answer += piece
            self.shown.value = as_html([*asked, {"role": "assistant", "content": answer}])
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        if stream.note:
            self.shown.value += as_html([{"role": "note", "content": stream.note}])

    def _clear(self, _event: object) -> None:
        self.messages, self.shown.value = [], ""


def as_html(messages: list[dict]) -> str:
    """Formats messages as HTML in which nothing that was typed is markup."""
    return "".join(
        f"<p style='white-space: pre-wrap; margin: 0.3em 0'><b>{html.escape(m['role'])}</b> "
        f"{html.escape(m['content'])}</p>"
        for m in messages
    )

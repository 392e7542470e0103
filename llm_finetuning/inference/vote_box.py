"""A box to vote in, inside a notebook: held-out questions with two models' answers each, without their names."""

import html
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from llm_finetuning.inference.chat_box import as_html
from llm_finetuning.inference.votes import CHOICES, Ballot, BallotBox, draw

COLUMN = "flex:1;min-width:0;white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #8888;padding:0.5em"
Question = tuple[list[dict], dict[str, str]]
"""(Messages, {model: answer})."""


def vote_box(questions: Iterable[Question], box: BallotBox, so_far: Callable[[], str]) -> Any:
    """Makes a widget that asks which of two answers is better, question by question; nothing in it is markup.

    Of more than two models two are drawn for each question; where their answers are alike, it is passed over.
    so_far: what is said of all votes, after each.
    """
    return _Box(questions, box, so_far).view


class _Box:
    def __init__(self, questions: Iterable[Question], box: BallotBox, so_far: Callable[[], str]):
        import ipywidgets as widgets  # not everywhere; the notebook looks first

        self.box, self.so_far, self.waiting = box, so_far, iter(questions)
        self.shown, self.status = widgets.HTML(), widgets.HTML()
        self.buttons = [widgets.Button(description=label) for label in CHOICES.values()]
        for choice, button in zip(CHOICES, self.buttons, strict=True):
            button.on_click(partial(self._cast, choice))
        self.view = widgets.VBox([self.shown, widgets.HBox(self.buttons), self.status])
        self._next()

    def _next(self) -> None:
        """Shows the next question, or that there is none."""
        for messages, answers in self.waiting:
            models = draw(list(answers))
            texts = [answers[model] for model in models]
            if texts[0] != texts[1]:
                self.ballot = self.box.hand_out("", messages, models, texts)
                self.shown.value = _as_html(self.ballot)
                return
        self.shown.value = "There are no more questions to vote on."
        for button in self.buttons:
            button.disabled = True

    def _cast(self, choice: str, _button: object) -> None:
        try:
            ballot, _ = self.box.vote("", self.ballot.number, choice)
        except (ValueError, OSError) as error:
            self.status.value = html.escape(str(error))
            return
        self.status.value = html.escape(f"{ballot.revealed} {self.so_far()}")
        self._next()


def _as_html(ballot: Ballot) -> str:
    columns = "".join(
        f'<div style="{COLUMN}"><b>{letter}</b>\n{html.escape(text)}</div>'
        for letter, text in zip("AB", ballot.answers, strict=True)
    )
    return f'{as_html(ballot.messages)}<div style="display:flex;gap:0.5em">{columns}</div>'

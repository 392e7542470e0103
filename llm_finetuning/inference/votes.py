"""Blind votes: two models' answers to one question, without names and in random order, and the file of the choices.

A vote holds the question with its history, both answers, the models and the choice; nothing of who voted.
"""

import json
import os
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path

from llm_finetuning.data.duplicates import normalise
from llm_finetuning.files import drive

CHOICES = {
    "left": "A is better",
    "right": "B is better",
    "tie": "Both are as good",
    "both bad": "Both are bad",
}
"""What a vote can be, and how it is offered: A is the answer on the left."""


@dataclass(frozen=True)
class Ballot:
    """Two answers to a conversation; whose they are is told after the vote."""

    number: str
    """By which a vote names its ballot; nothing can be learned from it."""
    messages: list[dict]
    models: list[str]
    """Whose answer stands on the left, and whose on the right."""
    answers: list[str]

    @property
    def revealed(self) -> str:
        """Whose answers they were, as a sentence for after the vote."""
        return f"A was {self.models[0]}, B was {self.models[1]}."

    def record(self, choice: str) -> dict:
        """Returns the vote as it is kept."""
        *history, question = self.messages
        models, answers = list(self.models), list(self.answers)
        return {"prompt": question["content"], "history": history, "models": models, "answers": answers,
                "choice": choice}  # fmt: skip

    def chosen(self, choice: str) -> str:
        """Returns the answer with which the conversation goes on: the better one, or else the left one."""
        return self.answers[1 if choice == "right" else 0]


def draw(models: list[str]) -> list[str]:
    """Draws two of the models, and which of them stands on the left, so that nobody can foresee it."""
    return secrets.SystemRandom().sample(models, 2)


class BallotBox:
    """The open ballot of each session, and the file that votes are added to; each question once a session."""

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, Ballot] = {}
        self._voted: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def hand_out(self, session: str, messages: list[dict], models: list[str], answers: list[str]) -> Ballot:
        """Opens a ballot, in place of one that the session has not used. models, answers: left and right."""
        ballot = Ballot(secrets.token_urlsafe(16), messages, models, answers)
        self._open[session] = ballot
        return ballot

    def vote(self, session: str, number: str, choice: str) -> tuple[Ballot, bool]:
        """Keeps a vote; returns (its ballot, whether it counts: the session's first on this question).

        Raises ValueError for a ballot that is not open or no choice, OSError where the file cannot be written; the
        ballot then stays open.
        """
        with self._lock:
            ballot = self._open.get(session)
            if ballot is None or ballot.number != number or choice not in CHOICES:
                raise ValueError("This vote is closed: ask a question, and vote on its answers.")
            voted = self._voted.setdefault(session, set())
            question = _alike(ballot.messages)
            counts = question not in voted
            if counts:
                append(self.path, ballot.record(choice))
                voted.add(question)
            del self._open[session]
        return ballot, counts

    def discard(self, session: str) -> None:
        """Takes back the open ballot of a session."""
        self._open.pop(session, None)

    def leave(self, session: str) -> None:
        """Forgets a session that is over."""
        self.discard(session)
        self._voted.pop(session, None)


def _alike(messages: list[dict]) -> str:
    """Returns a text that is the same for conversations which differ in letter case or white space alone."""
    return json.dumps([[message["role"], normalise(message["content"])] for message in messages])


def append(path: Path, record: dict) -> None:
    """Adds a record to a file of JSON lines, in one write, so that several processes can do so at once.

    It begins on a line of its own after one that a killed process left incomplete. Raises OSError for a full disk.
    """
    drive.make_parent(path)
    line = json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        if file.write(line) != len(line):
            raise OSError(f"{path} could not be written to its end: free some space on the disk")
        os.fsync(file.fileno())

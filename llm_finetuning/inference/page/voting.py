"""Blind votes on the page: both models answer, and whose answer is whose is said after the vote."""

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from llm_finetuning.inference import votes
from llm_finetuning.inference.page.visitors import Question, Visitors


@dataclass
class Vote:
    """Two models under the names that a vote keeps, the box for the ballots, and what is said of all votes so far."""

    models: list[str]
    box: votes.BallotBox
    so_far: Callable[[], str]

    def ask(self, visitors: Visitors, question: Question) -> "Both":
        """Puts a question to both models into the queue, in the order in which their answers will stand."""
        models = votes.draw(self.models)
        to_whom = (question.session, question.address, question.messages, question.sampling)
        asked = [Question(*to_whom, self.models.index(name)) for name in models]
        visitors.join(*asked)
        self.box.discard(question.session)
        return Both(models, *asked)

    def answered(self, both: "Both") -> votes.Ballot | None:
        """Opens the ballot on two complete answers; None where one is missing, or both are alike."""
        answers = [both.left.text, both.right.text]
        if both.incomplete or answers[0] == answers[1]:
            return None
        return self.box.hand_out(both.left.session, both.left.messages, both.models, answers)

    def cast(self, event: gr.EventData, request: gr.Request) -> tuple[list[dict], str]:
        """Keeps a vote; returns (the conversation, which goes on with the chosen answer, status line)."""
        pressed, number = getattr(event, "index", None), getattr(event, "text", None)  # whatever was sent
        choice = next((choice for place, choice in enumerate(votes.CHOICES) if place == pressed), "")
        ballot, counts = self.box.vote(request.session_hash, number, choice)
        asked = [message for message in ballot.messages if message["role"] != "system"]
        kept = "Your vote is counted." if counts else "Your first vote on this question is counted."
        return [
            *asked,
            {"role": "assistant", "content": ballot.chosen(choice)},
        ], f"{ballot.revealed} {kept} {self.so_far()}"


@dataclass(eq=False)
class Both:
    """One question to two models: nothing is shown, not even how far they are, before both answers are complete."""

    models: list[str]
    left: Question
    right: Question
    text = ""
    stream = None

    @property
    def over(self) -> bool:
        return self.left.over and self.right.over

    @property
    def forgotten(self) -> bool:
        return self.left.forgotten

    @property
    def incomplete(self) -> bool:
        return any(question.problem or question.stopped for question in (self.left, self.right))

    @property
    def status(self) -> str:
        if not self.over:
            return "Both models are answering …"
        if self.incomplete:
            return self.left.problem or self.right.problem or "Stopped."
        return "Both models give this answer." if self.left.text == self.right.text else "Which answer is better?"

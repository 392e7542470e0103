"""The questions of the page's visitors: whose turn it is, how long the others wait, and the thread that answers."""

import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field

import torch

from llm_finetuning import hardware
from llm_finetuning.inference import tables
from llm_finetuning.inference.chat import BATCH_TOKENS, Chat, Stream
from llm_finetuning.inference.generation import STOP, SamplingParameters
from llm_finetuning.inference.page.loading import Loading

PATIENCE = 10.0
"""Seconds after which a question is dropped to whose answer nobody listens."""
SIDE_BY_SIDE = 8
"""Answers that a GPU generates in one batch; a CPU gains nothing from a second one."""


@dataclass(eq=False)
class Question:
    """A visitor's conversation that waits for an answer, and what has been generated of it."""

    session: str
    address: str
    messages: list[dict]
    sampling: SamplingParameters
    model: int = 0
    """Which of the loaded models is asked."""
    heard: float = field(default_factory=time.monotonic)
    """When somebody last listened."""
    stream: Stream | None = None
    """Its answer, once it has begun."""
    stopped: bool = False
    forgotten: bool = False
    """Whether its conversation is gone from the page, so that the answer must not come back to it."""
    problem: str = ""
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.stopped or self.done.is_set()

    @property
    def text(self) -> str:
        return self.stream.text if self.stream else ""

    @property
    def status(self) -> str:
        """What stands below the conversation: a problem, or how long the answer is and how it ended."""
        if self.problem:
            return self.problem
        if self.stopped:
            return f"{self.stream.result.tokens if self.stream else 0} tokens, stopped"
        if self.stream is None:
            return ""
        return f"{tables.speed(self.stream.result) if self.over else ''} {self.stream.note}".strip()

    def end(self, problem: str = "") -> None:
        if not self.done.is_set():
            self.problem = problem
            self.done.set()


class Visitors:
    """The queue of questions: `limit` in all and `per_address` from one client address, one for each session.

    A place is held by work alone: a question counts, and is answered, only while its session listens
    (`listeners`, open streams by session, which the server counts).
    """

    def __init__(self, loading: Loading, limit: int, per_address: int, side_by_side: int = 0):
        self.loading, self.limit, self.per_address = loading, limit, per_address
        self.side_by_side = side_by_side or (SIDE_BY_SIDE if torch.cuda.is_available() else 1)
        self.listeners: Counter[str] = Counter()
        self.questions: list[Question] = []
        self.seconds = 0.0
        """How long an answer has taken of late."""
        self._lock = threading.Lock()
        self._working = False

    def join(self, question: Question, *more: Question) -> Question:
        """Puts a question into the queue and returns it; raises ValueError that says why it is refused.

        more: the same visitor's question to other models.
        """
        with self._lock:
            self._refuse(question)
            absent = [q for q in self.questions if not self.listeners[q.session] and q.stream is None]
            self._drop(absent[: max(0, len(absent) - self.limit + 1)])
            self.questions += question, *more
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="answers", daemon=True).start()
        return question

    def _refuse(self, question: Question) -> None:
        present = [q for q in self.questions if self.listeners[q.session] and not q.over]
        if any(q.session == question.session and not q.over for q in self.questions):
            raise ValueError("Your last question is still being answered.")
        if sum(q.address == question.address for q in present) >= self.per_address:
            raise ValueError("Too many questions from your network are waiting. Try again in a minute.")
        if len(present) >= self.limit:
            raise ValueError("Too many visitors are waiting. Try again in a minute.")

    def stop(self, session: str, forget: bool = False) -> None:
        """Ends the answer of a session after the token that is being computed, or its wait."""
        for question in list(self.questions):
            if question.session == session:
                question.stopped, question.forgotten = True, forget

    def place(self, question: Question) -> str:
        """Says which place in the queue a question has, and how long its wait will be; "" once it is answered."""
        with self._lock:
            line = self._line()
            if question not in line:
                return ""
            place = line.index(question) + 1
            batches = -(-place // self.side_by_side)
        wait = f", about {hardware.readable_seconds(batches * self.seconds)} to wait" if self.seconds else ""
        return f"⏳ Number {place} in the queue{wait}."

    def _line(self) -> list[Question]:
        """Returns the questions that wait, in their order: each address in turn, so that none holds up the others."""
        waiting = [q for q in self.questions if q.stream is None and not q.over and self.listeners[q.session]]
        earlier: Counter[str] = Counter()
        keys = {}
        for number, question in enumerate(waiting):
            keys[question] = (earlier[question.address], number)
            earlier[question.address] += 1
        return sorted(waiting, key=keys.__getitem__)

    def _work(self) -> None:
        """Answers questions until none is left."""
        while True:
            self.loading.done.wait()
            with self._lock:
                self._forget()
                batch = self._next_batch()
                if not self.questions:
                    self._working = False
                    return
            if batch:
                self._answer(batch)
            else:
                time.sleep(0.05)  # nobody listens yet to those that are left

    def _forget(self) -> None:
        """Takes questions out that are over, or to which nobody has listened for long."""
        now = time.monotonic()
        for question in self.questions:
            if self.listeners[question.session]:
                question.heard = now
        self._drop([q for q in self.questions if now - q.heard > PATIENCE])
        self.questions = [q for q in self.questions if not q.over]

    def _drop(self, questions: list[Question]) -> None:
        for question in questions:
            question.end("⚠️ The connection was lost. Ask again.")
        self.questions = [q for q in self.questions if q not in questions]

    def _next_batch(self) -> list[Question]:
        """Returns the first in line, and those after it that are answered side by side with it."""
        line = self._line()
        alike = [q for q in line if (q.model, q.sampling) == (line[0].model, line[0].sampling)]
        return alike[: self.side_by_side]

    def _answer(self, batch: list[Question]) -> None:
        start = time.monotonic()
        try:
            self._generate(self.loading.chat(batch[0].model), batch)
        except ValueError as error:
            for question in batch:
                question.end(f"⚠️ {error}")
        except Exception as error:
            traceback.print_exc()
            for question in batch:
                question.end(f"⚠️ The answer failed: {error}")
        seconds = time.monotonic() - start
        self.seconds = (self.seconds + seconds) / 2 if self.seconds else seconds

    def _generate(self, chat: Chat, batch: list[Question]) -> None:
        """Generates the answers of a batch; those that do not fit into it stay in line."""
        begun, longest = [], 0
        for question in batch[: chat.engine.max_batch_size]:
            try:
                stream = chat.stream(question.messages, question.sampling)
            except ValueError as error:
                question.end(f"⚠️ {error}")
                continue
            longest = max(longest, len(stream.request.prompt_ids) + question.sampling.max_new_tokens)
            if begun and (len(begun) + 1) * longest > BATCH_TOKENS:
                break
            question.stream = stream
            begun.append(question)
        for _ in chat.together([question.stream for question in begun]):
            for question in begun:
                self._follow(question)

    def _follow(self, question: Question) -> None:
        """Ends an answer that its visitor has stopped or to which nobody listens, and notes one that is complete."""
        if self.listeners[question.session]:
            question.heard = time.monotonic()
        if question.stopped or time.monotonic() - question.heard > PATIENCE:
            question.stream.request.ended_by = question.stream.request.ended_by or STOP
        if question.stream.request.ended_by:
            question.end()

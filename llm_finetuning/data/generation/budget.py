"""What a data set has cost in tokens and money, and whether the next request still fits the budget."""

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce

from llm_finetuning.data.generation.requests import Answer, Request, estimate_tokens


@dataclass
class Usage:
    """Tokens of prompts and of answers."""

    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    def plus(self, other: "Usage | Answer", sign: int = 1) -> "Usage":
        """Returns the sum of both (sign 1), or their difference (sign -1)."""
        prompt, answer = sign * other.prompt_tokens, sign * other.answer_tokens
        return Usage(self.prompt_tokens + prompt, self.answer_tokens + answer)

    def times(self, factor: float) -> "Usage":
        return Usage(round(self.prompt_tokens * factor), round(self.answer_tokens * factor))


def total(usages: Iterable[Usage | Answer]) -> Usage:
    """Returns the sum of all."""
    return reduce(Usage.plus, usages, Usage())


@dataclass
class Budget:
    """The limits of a data set, 0 = none; prices are per million tokens. Shared by the threads that ask.

    A request is admitted only if the limits hold even where its answer is as long as allowed.
    """

    tokens: int = 0
    money: float = 0.0
    prompt_price: float = 0.0
    answer_price: float = 0.0
    spent: Usage = field(default_factory=Usage)
    reserved: Usage = field(default_factory=Usage)
    correction: float = 1.0
    """Tokens that the server counted for a prompt, by those that were estimated: the most so far."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def cost(self, usage: Usage | Answer) -> float:
        """Returns the money that so many tokens cost."""
        return (usage.prompt_tokens * self.prompt_price + usage.answer_tokens * self.answer_price) / 1e6

    def holds(self, usage: Usage) -> bool:
        """Whether so many tokens lie within both limits."""
        in_tokens = not self.tokens or usage.tokens <= self.tokens
        return in_tokens and (not self.money or self.cost(usage) <= self.money)

    def count(self, answers: Iterable[Answer]) -> None:
        """Adds what was paid for answers."""
        with self.changed:
            self.spent = self.spent.plus(total(answers))

    def reserve(self, request: Request) -> Usage | None:
        """Sets aside the most that a request can take; None = it does not fit.

        Waits while what other requests have set aside may still become free.
        """
        estimate = estimate_tokens(json.dumps(request.messages, ensure_ascii=False))
        with self.changed:
            most = Usage(round(estimate * self.correction), request.max_tokens)
            while not self.holds(self.spent.plus(self.reserved).plus(most)):
                if not self.reserved.tokens:
                    return None
                self.changed.wait(1.0)
            self.reserved = self.reserved.plus(most)
        return most

    def release(self, most: Usage, answer: Answer | None) -> None:
        """Frees what was set aside, and counts what was really paid."""
        with self.changed:
            self.reserved = self.reserved.plus(most, -1)
            if answer:
                self.spent = self.spent.plus(answer)
                self.correction *= max(1.0, answer.prompt_tokens / max(1, most.prompt_tokens))
            self.changed.notify_all()

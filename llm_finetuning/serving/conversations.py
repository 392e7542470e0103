"""A conversation on its way to the model: checked, and cut to the context at its oldest turns."""

from bisect import bisect_left
from dataclasses import dataclass

from llm_finetuning import prompts

SHARE_FOR_ANSWER = 4
"""At least a quarter of the context is kept free for an answer while there is history to leave out."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation, and how many of its oldest turns (question and answer) were left out."""

    ids: list[int]
    dropped_turns: int = 0

    @property
    def note(self) -> str:
        """One sentence for the reader where turns were left out, else ""."""
        if not self.dropped_turns:
            return ""
        turns = "the oldest turn was" if self.dropped_turns == 1 else f"the oldest {self.dropped_turns} turns were"
        return f"The conversation is longer than the model's context: {turns} left out."


def prepare(messages: list[dict], template: prompts.Template, context: int, max_new_tokens: int) -> Prompt:
    """The ids that the model answers. Raises ValueError for what no answer can be given to.

    The oldest turns go first, until the answer has room; a system message and the last question always stay.
    """
    check(messages)
    room = context - min(max_new_tokens, context // SHARE_FOR_ANSWER)
    start = 1 if messages[0]["role"] == "system" else 0
    turns = (len(messages) - start) // 2  # that could be left out

    def ids_without(dropped: int) -> list[int]:
        return prompts.render(messages[:start] + messages[start + 2 * dropped :], template)

    dropped = bisect_left(range(turns), True, key=lambda n: len(ids_without(n)) <= room)
    ids = ids_without(dropped)
    if len(ids) >= context:
        raise ValueError(
            f"the message is too long: {len(ids):,} tokens with what the template adds, and the model reads"
            f" {context:,}, its answer included. Send a shorter one."
        )
    return Prompt(ids, dropped)


def check(messages: list[dict]) -> None:
    """Raises ValueError unless the messages are a conversation that waits for an answer."""
    prompts.check_messages(messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s: the user's has to come last")
    for number, message in enumerate(messages, 1):
        _check_characters(message["content"], number)
    if not messages[-1]["content"].strip():
        raise ValueError("the message is empty: type a question")


def _check_characters(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"message {number} holds half a character (a lone surrogate, U+{ord(text[error.start]):04X},"
            f" at position {error.start}): send it as valid Unicode"
        ) from error

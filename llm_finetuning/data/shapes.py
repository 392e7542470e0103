"""The shapes of a user's own records, as a table, and which of them a record has."""

from dataclasses import dataclass, replace
from functools import lru_cache

from llm_finetuning.data.comparisons import LISTS, Comparison, canonical_record, comparison_of
from llm_finetuning.data.transcripts import dialogue_of
from llm_finetuning.data.turns import is_given

OWN_COLUMNS = ("lang", "message_tree_id", "message_id", "rank")
"""What a record of any shape may say of its pairs."""
SYSTEMS, HISTORY, CONTEXT = ("system", "system_prompt", "system_message"), "history", ("input", "context")
SCORES = ("score_chosen", "score_rejected")
IN_ONE_TEXT = ("text", "content", "formatted_text", "formatted_chat")
"""Columns of which a text may hold a whole dialogue."""


@dataclass(frozen=True)
class Shape:
    """The columns of one shape: those of a prompt and its response, each a text or a list of turns, or of a whole chat.

    rejected: the response that people liked less. context: whether `input` or `context` belongs to the prompt.
    """

    prompt: str = ""
    response: str = ""
    rejected: str = ""
    chat: str = ""
    context: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns without which a record has another shape."""
        return tuple(filter(None, (self.prompt, self.response, self.rejected, self.chat)))

    def uses(self, system: str) -> set[str]:
        """Returns all columns that are read."""
        optional = () if self.chat else (HISTORY, *CONTEXT * self.context)
        return {*self.needs, *OWN_COLUMNS, system, *optional, *SCORES * bool(self.rejected)}


PROMPTS = ("prompt", "instruction", "question", "query", "input", "human", "user")
RESPONSES = ("response", "completion", "output", "answer", "assistant", "generation")
COMPARED = (*PROMPTS, "messages", "conversations", "conversation", "context", "history", "info", "post", "user_input")
COMPARED += ("question.full_text", "info.post", "info.article")
"""Names of a prompt beside several responses."""
PREFERRED = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
    *((better, "rejected") for better in ("preferred", "accepted")),
    *((better, "rejected_response") for better in ("chosen_response", "preferred_response", "response")),
)
"""Names of a response that people preferred and of one that they did not."""
EXPLAINED = {"instruction", "question", "query", "prompt", "input"}
"""Prompts that a column `input` or `context` belongs to (Alpaca, Dolly)."""
SUMMARY = "summary"
"""Of a text, or of a dialogue that is written as one."""
SHAPES = (
    *(Shape(prompt, *two, context=prompt in EXPLAINED) for two in PREFERRED for prompt in (*PROMPTS, "conversations")),
    Shape("", "chosen", "rejected"),
    *(Shape("", "messages", rejected) for rejected in ("rejected_messages", "rejected_response")),
    Shape(chat="messages"),
    Shape(chat="conversations"),
    *(Shape(prompt, response, context=prompt in EXPLAINED) for prompt in PROMPTS for response in RESPONSES),
    *(Shape(chat=name) for name in ("conversation", "dialogue", "dialog", "chat", "contents")),
    *(Shape(text, SUMMARY) for text in ("document", "article")),
    Shape("inputs", "targets"),
)
"""The first whose columns a record has is its shape."""


def known_shapes() -> str:
    """Names all shapes in words."""
    special = [shape for shape in SHAPES if shape.chat or shape.response == "chosen" and shape.prompt in ("", "prompt")]
    pairs = f"one of {', '.join(PROMPTS)} + one of {', '.join(RESPONSES)} (+ input or context) or chosen + rejected"
    several = f"or one of {', '.join(LISTS)} with ranks or scores, or two such as response_a + response_b and a winner"
    shapes = (" + ".join(shape.needs) for shape in special)
    return "; ".join(["trees and messages of Open-Assistant", *shapes, f"{pairs}, {several}"])


@dataclass(frozen=True)
class Columns:
    """Names of a source's own columns; "" = those of the known shapes."""

    prompt: str = ""
    response: str = ""
    system: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, value.strip().casefold())

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The table with these names; where prompt or response is named, without the shapes that lack it."""
        if not self.prompt and not self.response:
            return SHAPES
        texts = [shape for shape in SHAPES if not shape.chat and (shape.prompt or not self.prompt)]
        named = [
            replace(shape, prompt=self.prompt or shape.prompt, response=self.response or shape.response)
            for shape in texts
            if not (self.response and shape.rejected)
        ]
        return tuple(dict.fromkeys(named))


USUAL = Columns()


@lru_cache(4096)
def layout_of(names: tuple[str, ...], columns: Columns = USUAL) -> Shape | Comparison | None:
    """Returns the first shape whose columns stand among the names, or where several responses to a prompt do."""
    shape = next((shape for shape in columns.shapes if set(shape.needs) <= set(names)), None)
    if columns.response or shape and not shape.chat:
        return shape
    several = comparison_of(names, (columns.prompt,) if columns.prompt else COMPARED)
    if shape is None or several and several.by and several.responses[1:]:
        return several
    return shape


def recognise(record: dict, columns: Columns = USUAL) -> Shape | Comparison | None:
    """Returns the shape of a record, whatever the case of its names, or where its several responses stand."""
    record = canonical_record(record)
    return layout_of(given_names(record), columns) or in_one_text(record, columns)


def in_one_text(record: dict, columns: Columns) -> Shape | None:
    """Returns the shape of a record of which one text holds a dialogue, with a marker before each turn."""
    if columns.prompt or columns.response or "message_id" in record:
        return None
    return next((Shape(chat=name) for name in IN_ONE_TEXT if dialogue_of(record.get(name))), None)


def given_names(record: dict) -> tuple[str, ...]:
    return tuple(name for name, value in record.items() if is_given(value))

"""The one place where a conversation becomes token ids: training, evaluation, notebook and app all come here.

A message is `{"role": "system" | "user" | "assistant", "content": str}`. What a user types is text and nothing
else: a special token's name inside a message is encoded as its characters.
"""

from llm_finetuning.prompts.examples import (
    IGNORE_INDEX,
    Truncated,
    encode,
    encode_all,
    lengths,
    truncate_histories,
    without_oldest_turns,
)
from llm_finetuning.prompts.rendering import (
    FIXED_DATE,
    Template,
    check_messages,
    conversation,
    question,
    render,
    render_texts,
    text_pieces,
)
from llm_finetuning.prompts.templates import PHI2_FORMAT, template_for

__all__ = [
    "FIXED_DATE",
    "IGNORE_INDEX",
    "PHI2_FORMAT",
    "Template",
    "Truncated",
    "check_messages",
    "conversation",
    "encode",
    "encode_all",
    "lengths",
    "question",
    "render",
    "render_texts",
    "template_for",
    "text_pieces",
    "truncate_histories",
    "without_oldest_turns",
]

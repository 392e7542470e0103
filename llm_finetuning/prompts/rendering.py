"""Conversations as a chat template writes them, and as the tokens of that text; what was typed stays text."""

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from os.path import commonprefix

import transformers

from llm_finetuning import template_process

FIXED_DATE = datetime.date(2024, 7, 26)
"""What training and measuring take for today, where a chat template writes it: what Llama 3 writes without a clock.

Under the date of the day a run could not go on tomorrow, for all its tokens would differ, nor could figures of two days
be compared. An answer to a user is asked for under the date of the day.
"""
CURE = "set chat_template to a file with a Jinja template that writes each response once, as it is, after its prompt"


@dataclass(frozen=True)
class Template:
    """A tokenizer whose chat template holds the system message that is trained with."""

    tokenizer: "transformers.PreTrainedTokenizerBase"
    name: str = "this model's chat template"
    """What an error calls it."""
    date: datetime.date | None = None
    """What it takes for today; None = the day on which it is rendered."""
    special_tokens: re.Pattern = field(init=False)
    """Finds a special token's name in a text, the longest where several begin; one group, for `split`."""

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("this tokenizer has no end-of-text token: an answer could never end")
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted(special | {self.tokenizer.eos_token}, key=len, reverse=True)
        object.__setattr__(self, "special_tokens", re.compile(f"({'|'.join(map(re.escape, longest_first))})"))

    @cached_property
    def stop_token_ids(self) -> set[int]:
        """Ids that end an answer: EOS, and the end-of-turn token that the template itself puts after one."""
        ((_, response, _),) = rendered_pairs([{"prompt": "a", "response": "b"}], self)
        ends = self.special_tokens.findall(response)
        return {self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(ends)}


def check_messages(messages: list[dict]) -> None:
    """Raises ValueError unless the roles are an optional system message, then user and assistant in turn."""
    if not messages:
        raise ValueError("the conversation is empty: it needs at least one user message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} of the conversation is no {{'role': …, 'content': text}}")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if not turns or turns != expected:
        raise ValueError(
            f"the roles are {', '.join(roles)}: a conversation is an optional system message, then user and"
            " assistant in turn, user first"
        )


def render(messages: list[dict], template: Template, add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation, ready for the model to answer it.

    The chat template's own special tokens become special ids; those that stand in a message's text stay text.
    Equal to `tokenizer.apply_chat_template` for messages that hold no special token. Raises ValueError for
    roles out of order.
    """
    return encode_texts(rendered([messages], template, add_generation_prompt), template)[0]


def rendered(
    conversations: Iterable[list[dict]], template: Template, add_generation_prompt: bool
) -> list[tuple[str, str]]:
    """(text, mark) of each conversation, with `mark` inside every special token's name that stands in a message."""
    guarded = [guard(messages, template) for messages in conversations]
    texts = render_texts([(messages, add_generation_prompt) for messages, _ in guarded], template)
    return [(text, mark) for text, (_, mark) in zip(texts, guarded, strict=True)]


def guard(messages: list[dict], template: Template) -> tuple[list[dict], str]:
    """The messages with a mark behind each character of a special token's name, so that none is found; the mark."""
    check_messages(messages)
    mark = _unused_character(messages)

    def guard(name: re.Match) -> str:
        return "".join(character + mark for character in name[0])

    return [m | {"content": template.special_tokens.sub(guard, m["content"])} for m in messages], mark


def encode_texts(texts: Iterable[tuple[str, str]], template: Template) -> list[list[int]]:
    """Token ids of rendered texts, each with its mark, with one call of the tokenizer.

    A text without a mark is tokenized as `apply_chat_template` does it.
    """
    texts = list(texts)
    plain = [text for text, mark in texts if mark not in text]
    ids = iter(template.tokenizer(plain, add_special_tokens=False, verbose=False).input_ids if plain else [])
    return [_encode_guarded(text, mark, template) if mark in text else next(ids) for text, mark in texts]


def text_pieces(
    conversations: list[list[dict]], template: Template, add_generation_prompt: bool
) -> list[list[tuple[bool, str]]]:
    """Each rendered conversation cut at the template's own special tokens: [(is special token, text), …]."""
    cut = []
    for text, mark in rendered(conversations, template, add_generation_prompt):
        pieces = enumerate(template.special_tokens.split(text))  # every second one is a special token
        cut.append([(bool(place % 2), piece.replace(mark, "")) for place, piece in pieces if piece])
    return cut


def _encode_guarded(text: str, mark: str, template: Template) -> list[int]:
    """Token ids of a text that is cut at the template's own special tokens; what is typed between stays text."""
    pieces = template.special_tokens.split(text)
    typed, special = [piece.replace(mark, "") for piece in pieces[::2]], pieces[1::2]
    encoded = template.tokenizer(typed, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    ids = [[token] for token in template.tokenizer.convert_tokens_to_ids(special)]
    return list(chain.from_iterable(chain.from_iterable(zip(encoded, [*ids, []], strict=True))))


def _unused_character(messages: list[dict]) -> str:
    """A private-use character that stands nowhere in the conversation."""
    texts = [message["content"] for message in messages]
    codes = chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
    return next(mark for mark in map(chr, codes) if not any(mark in text for text in texts))


def render_texts(conversations: list[tuple[list[dict], bool]], template: Template) -> list[str]:
    """The text of each conversation; the bool says whether an assistant turn is opened behind it.

    Raises ValueError for a template that does not render them, or takes too much time or memory for it.
    """
    tokenizer = template.tokenizer
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    try:
        return template_process.render(tokenizer.get_chat_template(), conversations, variables, template.date)
    except template_process.RenderingError as error:
        raise ValueError(f"{template.name} {error}") from error


def conversation(pair: dict) -> list[dict]:
    """The messages of a pair: its history, the prompt, the response."""
    return [*question(pair), {"role": "assistant", "content": pair["response"]}]


def question(pair: dict) -> list[dict]:
    """The messages of a pair that wait for its response: its history and the prompt."""
    history = pair.get("history")
    return [*(history if isinstance(history, list) else []), {"role": "user", "content": pair["prompt"]}]


def rendered_pairs(pairs: list[dict], template: Template) -> list[tuple[str, str, str]]:
    """(prompt, response, mark) of each pair, rendered together; see `_turn` for the first two."""
    guarded = [guard(conversation(pair), template) for pair in pairs]
    prompts = render_texts([(messages[:-1], True) for messages, _ in guarded], template)
    wholes = render_texts([(messages, False) for messages, _ in guarded], template)
    return [
        (*_turn(prompt, whole, messages[-1]["content"], mark, template), mark)
        for prompt, whole, (messages, mark) in zip(prompts, wholes, guarded, strict=True)
    ]


def _turn(prompt: str, whole: str, response: str, mark: str, template: Template) -> tuple[str, str]:
    """(prompt, response): the text up to where the answer begins, and from there to the token that ends it.

    What the template writes after that token is never generated, and left out.
    """
    text = response.strip() or response  # many templates trim a message
    at = whole.find(text, len(prompt))
    if not whole.startswith(prompt) or at < 0 or whole[len(prompt) : at].strip():
        written = response.replace(mark, "")[:60]
        raise ValueError(
            f"{template.name} writes the response {written!r} in other words, or elsewhere than after its"
            f" prompt: take the pair out of the data, or {CURE}"
        )
    end = at + len(text)
    if stop := template.special_tokens.search(whole, end):
        return prompt, whole[len(prompt) : stop.end()]
    blank = commonprefix([whole[end:], response[len(response.rstrip()) :]])
    return prompt, whole[len(prompt) : end] + blank

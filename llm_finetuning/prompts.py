"""The one place where a conversation becomes token ids: training, evaluation, notebook and app all come here.

A message is `{"role": "system" | "user" | "assistant", "content": str}`. What a user types is text and nothing
else: a special token's name inside a message is encoded as its characters.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import jinja2
import transformers

IGNORE_INDEX = -100
"""Label of a token that is masked out of the loss (torch.nn.CrossEntropyLoss's default ignore_index)."""

PHI2_FORMAT = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] + '\\n' }}
{%- elif message['role'] == 'user' -%}
{%- if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' -%}
{{ '\\n' }}
{%- endif -%}
{{ 'Instruct: ' + message['content'] + '\\nOutput:' }}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
"""Phi-2's own prompt format (model card of microsoft/phi-2), each answer closed by the end-of-text token."""

DEFAULT_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages -%}
{%- endif -%}
"""


@dataclass(frozen=True)
class Template:
    """A tokenizer whose chat template holds the system message that is trained with."""

    tokenizer: "transformers.PreTrainedTokenizerBase"
    special_tokens: list[str] = field(init=False)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("this tokenizer has no end-of-text token: an answer could never end")
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        object.__setattr__(self, "special_tokens", sorted(special, key=len, reverse=True))

    @cached_property
    def stop_token_ids(self) -> set[int]:
        """Ids that end an answer: EOS, and the end-of-turn token that the template itself puts after one."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tail = render(probe, self, add_generation_prompt=False)
        start = len(render(probe[:1], self))
        special = set(self.tokenizer.convert_tokens_to_ids(self.special_tokens))
        return {self.tokenizer.eos_token_id} | set(tail[start:]) & special


def template_for(tokenizer: "transformers.PreTrainedTokenizerBase", system_message: str = "") -> Template:
    """The tokenizer's own chat template, or Phi-2's format if it has none; with `system_message` as the default.

    The default becomes part of `tokenizer.chat_template`, so it travels with the saved tokenizer. Raises
    ValueError if the template takes no system message.
    """
    base = tokenizer.chat_template or PHI2_FORMAT
    if system_message:
        literal = "'" + system_message.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
        base = DEFAULT_SYSTEM.replace("SYSTEM", literal) + base
    tokenizer.chat_template = base
    template = Template(tokenizer)
    if system_message:
        _check_system(template, system_message)
    return template


def _check_system(template: Template, system_message: str) -> None:
    try:
        text = _text([{"role": "user", "content": "a"}], template, True)
    except ValueError as error:
        text = str(error)
    if system_message.strip() not in text:
        raise ValueError(
            "this model's chat template takes no system message: set system_message = '' in the parameters cell"
        )


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
    return _render_all([messages], template, add_generation_prompt)[0]


def _render_all(conversations: list[list[dict]], template: Template, add_generation_prompt: bool) -> list[list[int]]:
    """`render` of many conversations with one call of the tokenizer."""
    pieces = [_pieces(messages, template, add_generation_prompt) for messages in conversations]
    texts = [text for piece in pieces for is_special, text in piece if not is_special]
    encoded = iter(
        template.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        if texts
        else []
    )
    to_id = template.tokenizer.convert_tokens_to_ids
    return [
        list(chain.from_iterable([to_id(text)] if special else next(encoded) for special, text in piece))
        for piece in pieces
    ]


def _pieces(messages: list[dict], template: Template, add_generation_prompt: bool) -> list[tuple[bool, str]]:
    """The rendered conversation cut at the template's own special tokens: [(is special token, text), …]."""
    check_messages(messages)
    mark = _unused_character(messages)
    guarded = [m | {"content": _guard(m["content"], template, mark)} for m in messages]
    pieces, rest = [], _text(guarded, template, add_generation_prompt)
    while rest:
        found = [(at, -len(token), token) for token in template.special_tokens if (at := rest.find(token)) >= 0]
        at, _, token = min(found, default=(len(rest), 0, ""))
        if at:
            pieces.append((False, rest[:at].replace(mark, "")))
        if token:
            pieces.append((True, token))
        rest = rest[at + len(token) :]
    return pieces


def _guard(text: str, template: Template, mark: str) -> str:
    """`text` with `mark` inside every special token's name, so that none is found in it."""
    for token in template.special_tokens:
        if token in text:
            text = text.replace(token, token[0] + mark + token[1:])
    return text


def _unused_character(messages: list[dict]) -> str:
    """A private-use character that stands nowhere in the conversation."""
    used = set().union(*(message["content"] for message in messages))
    return next(chr(code) for code in chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)) if chr(code) not in used)


def _text(messages: list[dict], template: Template, add_generation_prompt: bool) -> str:
    try:
        return template.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"this model's chat template refuses the conversation: {error}") from error


def conversation(pair: dict) -> list[dict]:
    """The messages of a pair: its history, the prompt, the response."""
    return [*question(pair), {"role": "assistant", "content": pair["response"]}]


def question(pair: dict) -> list[dict]:
    """The messages of a pair that wait for its response: its history and the prompt."""
    history = pair.get("history")
    return [*(history if isinstance(history, list) else []), {"role": "user", "content": pair["prompt"]}]


def encode(pair: dict, template: Template) -> dict:
    """`{"input_ids": [T], "labels": [T]}`: the response and its EOS are in the loss, all other labels are -100."""
    return encode_all([pair], template)[0]


def encode_all(pairs: list[dict], template: Template) -> list[dict]:
    """`encode` of many pairs at once. The last label of every example is an id that ends an answer."""
    prompts = _render_all([question(pair) for pair in pairs], template, True)
    conversations = _render_all([conversation(pair) for pair in pairs], template, False)
    return [_masked(prompt, ids, template) for prompt, ids in zip(prompts, conversations, strict=True)]


def _masked(prompt: list[int], ids: list[int], template: Template) -> dict:
    """An example with its loss mask: `labels` are -100 over the prompt, and the ids themselves over the response.

    prompt: ids up to where the answer begins; ids: of the whole conversation. What the template writes after the
    token that ends the answer is cut, for it is never generated; where it writes none, EOS is added. Raises
    ValueError where the conversation does not begin with the prompt.
    """
    if ids[: len(prompt)] != prompt:
        raise ValueError(
            "this model's chat template writes a finished turn in other words than an open one, so the answer's"
            " tokens cannot be told apart: set another chat_template on the tokenizer"
        )
    response, stops = ids[len(prompt) :], template.stop_token_ids
    while response and response[-1] not in stops and stops & set(response):
        response = response[:-1]
    if not response or response[-1] not in stops:
        response = [*response, template.tokenizer.eos_token_id]
    mask = [IGNORE_INDEX] * len(prompt)
    return {"input_ids": prompt + response, "labels": mask + response}


@dataclass(frozen=True)
class Truncated:
    """A pair on its way to a length: its history cut as far as it had to be, and what that gave."""

    pair: dict
    example: dict | None
    """As `encode` gives it; None where prompt and response alone are too long."""
    full_length: int
    """Tokens before anything was cut."""

    @property
    def truncated(self) -> bool:
        return self.example is not None and len(self.example["input_ids"]) < self.full_length


def truncate_histories(pairs: list[dict], template: Template, max_length: int) -> list[Truncated]:
    """Encodes each pair, without the oldest turns of its history where it is too long; no response is ever cut."""
    pairs, examples = list(pairs), dict(enumerate(encode_all(pairs, template)))
    full_lengths = [len(example["input_ids"]) for example in examples.values()]
    while too_long := [i for i, example in examples.items() if len(example["input_ids"]) > max_length]:
        examples = {i: example for i, example in examples.items() if len(example["input_ids"]) <= max_length}
        shorter = [i for i in too_long if pairs[i].get("history")]
        for i in shorter:
            pairs[i] = pairs[i] | {"history": _without_oldest_turn(pairs[i]["history"])}
        examples |= zip(shorter, encode_all([pairs[i] for i in shorter], template), strict=True)
    return [Truncated(pair, examples.get(i), full_lengths[i]) for i, pair in enumerate(pairs)]


def _without_oldest_turn(history: list[dict]) -> list[dict]:
    """Without the oldest user message and its answer; a system message stays."""
    start = 1 if history[0]["role"] == "system" else 0
    return history[:start] + history[start + 2 :] if len(history) > start + 1 else []


def lengths(pairs: list[dict], template: Template) -> list[dict]:
    """Token counts of each pair: `prompt` (with what the template adds), `history`, `response`, `total`."""
    bare = _render_all([question({"prompt": pair["prompt"]}) for pair in pairs], template, True)
    rows = []
    for alone, example in zip(map(len, bare), encode_all(pairs, template), strict=True):
        asked, total = example["labels"].count(IGNORE_INDEX), len(example["labels"])
        rows.append({"prompt": alone, "history": asked - alone, "response": total - asked, "total": total})
    return rows

"""The one place where a conversation becomes token ids: training, evaluation, notebook and app all come here.

A message is `{"role": "system" | "user" | "assistant", "content": str}`. What a user types is text and nothing
else: a special token's name inside a message is encoded as its characters.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from os.path import commonprefix
from pathlib import Path

import transformers

from llm_finetuning import template_process

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

OPEN_TURN = """\
{% if add_generation_prompt %}{% set whole_text %}
TEMPLATE{{ '' }}{% endset %}
{%- if whole_text.endswith(OPENED) -%}
{%- set whole_text = whole_text[:whole_text | length - LENGTH] ~ FINISHED -%}
{%- endif -%}
{{ whole_text }}{% else %}
TEMPLATE{{ '' }}{% endif %}"""
"""A template whose open assistant turn ends in OPENED, LENGTH characters, made to end in FINISHED.

A finished conversation stays outside the block, in which `{% generation %}` would mark other tokens.
"""

CURE = "set chat_template to a file with a Jinja template that writes each response once, as it is, after its prompt"


@dataclass(frozen=True)
class Template:
    """A tokenizer whose chat template holds the system message that is trained with."""

    tokenizer: "transformers.PreTrainedTokenizerBase"
    name: str = "this model's chat template"
    """What an error calls it."""
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
        ((_, response, _),) = _turns([{"prompt": "a", "response": "b"}], self)
        ends = self.special_tokens.findall(response)
        return {self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(ends)}


def template_for(
    tokenizer: "transformers.PreTrainedTokenizerBase", system_message: str = "", chat_template: str = ""
) -> Template:
    """The tokenizer's own chat template, or Phi-2's format if it has none; with `system_message` as the default.

    chat_template: a file with a Jinja template that takes the place of both.
    Phi-2's format stands behind what the tokenizer prepends (BOS). The default and the opening of a turn
    (`_open_as_finished`) become part of `tokenizer.chat_template`, so they travel with the saved tokenizer. Raises
    FileNotFoundError for a file that is not there, ValueError for a template that is no valid Jinja, takes no system
    message, or in which a response cannot be found.
    """
    base, name = _source(tokenizer, chat_template)
    tokenizer.chat_template = base
    template = Template(tokenizer, name)
    if system_message:
        tokenizer.chat_template = DEFAULT_SYSTEM.replace("SYSTEM", _literal(system_message)) + base
    takes_system = not system_message or _takes_system(template, system_message)
    if not takes_system:
        tokenizer.chat_template = base  # what else is wrong with it is told first
    try:
        _open_as_finished(template)
    except ValueError as error:
        raise ValueError(f"{error}: {CURE}") from error
    if not takes_system:
        raise ValueError(f"{name} takes no system message: set system_message = '' in the parameters cell")
    return template


def _source(tokenizer: "transformers.PreTrainedTokenizerBase", chat_template: str) -> tuple[str, str]:
    """(Jinja source, name in errors) of a file, of the tokenizer's own template, or of the fallback."""
    if chat_template:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"chat_template {chat_template} is no file: give one that holds a Jinja chat template, or '' for the"
                " tokenizer's own"
            )
        try:
            return path.read_text(encoding="utf-8"), f"chat_template {chat_template}"
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template {chat_template} is no text in UTF-8: {error}") from error
    if tokenizer.chat_template:
        return tokenizer.get_chat_template(), f"the chat template of {tokenizer.name_or_path or 'this tokenizer'}"
    prepended = _prepended(tokenizer)
    return (f"{{{{ {_literal(prepended)} }}}}" if prepended else "") + PHI2_FORMAT, "the fallback template"


def _prepended(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """What a tokenizer puts before every text, such as BOS: a base that was trained with it does not do without.

    With a space behind it where the tokenizer marks the first word of a text as one that a space precedes.
    """
    bare, ids = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    start = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
    names = "".join(tokenizer.convert_ids_to_tokens(ids[:start]))
    spaced = names and tokenizer(f"{names} a", add_special_tokens=False).input_ids == ids[: start + len(bare)]
    return f"{names} " if spaced else names


def _literal(text: str) -> str:
    """A text as a string of Jinja's."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _takes_system(template: Template, system_message: str) -> bool:
    try:
        (text,) = render_texts([([{"role": "user", "content": "a"}], True)], template)
        return system_message.strip() in text
    except ValueError:
        return False


def _open_as_finished(template: Template) -> None:
    """Makes a template open an assistant turn with all that it writes before the response of a finished one.

    Reasoning templates open a turn with `<think>`, and write a finished one without reasoning as an empty thought or
    as none. Pairs hold no reasoning: left as it is, such a template would ask at inference for what was never
    trained, or would train the empty thought in place of the answer. Opened as it is closed, what is asked is what
    was trained, and the response alone is in the loss. Blank space before the response (Phi-2's ` `) stays in the
    loss, because it is part of the response's first token.
    """
    user, assistant = (
        {"role": role, "content": f"\ue000{text}"} for role, text in (("user", "q"), ("assistant", "aB"))
    )
    bare, opened, whole = render_texts([([user], False), ([user], True), ([user, assistant], False)], template)
    if (count := whole.count(assistant["content"])) != 1:
        raise ValueError(f"{template.name} writes the response of a finished turn {count} times as it is")
    before, _, _ = whole.partition(assistant["content"])
    start = len(commonprefix([bare, opened, before]))
    if user["content"] not in before[:start]:
        raise ValueError(f"{template.name} does not write the response after its prompt")
    if not (before.startswith(opened) and not before[len(opened) :].strip()):
        _set_opening(template, opened[start:], before[start:].rstrip(" "))
    tokenizer = template.tokenizer
    if render([user], template)[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError(f"{template.name} begins with {tokenizer.bos_token} twice")


def _set_opening(template: Template, opened: str, finished: str) -> None:
    """Replaces what the template opens an assistant turn with, where that is `opened`, by `finished`."""
    values = {"OPENED": _literal(opened), "LENGTH": str(len(opened)), "FINISHED": _literal(finished)}
    values["TEMPLATE"] = template.tokenizer.chat_template.removesuffix("\n")  # as Jinja itself drops the last one
    template.tokenizer.chat_template = re.sub("|".join(values), lambda name: values[name[0]], OPEN_TURN)


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
    return _encode(_rendered([messages], template, add_generation_prompt), template)[0]


def _rendered(
    conversations: Iterable[list[dict]], template: Template, add_generation_prompt: bool
) -> list[tuple[str, str]]:
    """(text, mark) of each conversation, with `mark` inside every special token's name that stands in a message."""
    guarded = [_guarded(messages, template) for messages in conversations]
    texts = render_texts([(messages, add_generation_prompt) for messages, _ in guarded], template)
    return [(text, mark) for text, (_, mark) in zip(texts, guarded, strict=True)]


def _guarded(messages: list[dict], template: Template) -> tuple[list[dict], str]:
    """The messages with a mark behind each character of a special token's name, so that none is found; the mark."""
    check_messages(messages)
    mark = _unused_character(messages)

    def guard(name: re.Match) -> str:
        return "".join(character + mark for character in name[0])

    return [m | {"content": template.special_tokens.sub(guard, m["content"])} for m in messages], mark


def _encode(texts: Iterable[tuple[str, str]], template: Template) -> list[list[int]]:
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
    for text, mark in _rendered(conversations, template, add_generation_prompt):
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
    used = set().union(*(message["content"] for message in messages))
    return next(chr(code) for code in chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)) if chr(code) not in used)


def render_texts(conversations: list[tuple[list[dict], bool]], template: Template) -> list[str]:
    """The text of each conversation; the bool says whether an assistant turn is opened behind it.

    Raises ValueError for a template that does not render them, or takes too much time or memory for it.
    """
    tokenizer = template.tokenizer
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    try:
        return template_process.render(tokenizer.get_chat_template(), conversations, variables)
    except template_process.RenderingError as error:
        raise ValueError(f"{template.name} {error}") from error


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
    """`encode` of many pairs at once. The last label of every example is an id that ends an answer.

    Raises ValueError for a pair whose response the template does not write as it is.
    """
    turns = _turns(pairs, template)
    prompts = _encode(((prompt, mark) for prompt, _, mark in turns), template)
    wholes = _encode(((prompt + response, mark) for prompt, response, mark in turns), template)
    examples = []
    for (_, response, mark), prompt, ids in zip(turns, prompts, wholes, strict=True):
        # Blank space at the seam may merge into one token; but the model is asked with the prompt's own tokens.
        seamless = ids[: len(prompt)] == prompt
        labels = ids[len(prompt) :] if seamless else _encode([(response, mark)], template)[0]
        examples.append(_masked(prompt, labels, template))
    return examples


def _masked(prompt: list[int], response: list[int], template: Template) -> dict:
    """An example with its loss mask: -100 over the prompt, the ids themselves over the response and its end.

    EOS is added to a response that the template does not end.
    """
    if not response or response[-1] not in template.stop_token_ids:
        response = [*response, template.tokenizer.eos_token_id]
    return {"input_ids": prompt + response, "labels": [IGNORE_INDEX] * len(prompt) + response}


def _turns(pairs: list[dict], template: Template) -> list[tuple[str, str, str]]:
    """(prompt, response, mark) of each pair, rendered together; see `_turn` for the first two."""
    guarded = [_guarded(conversation(pair), template) for pair in pairs]
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
            pairs[i] = pairs[i] | {"history": without_oldest_turns(pairs[i]["history"])}
        examples |= zip(shorter, encode_all([pairs[i] for i in shorter], template), strict=True)
    return [Truncated(pair, examples.get(i), full_lengths[i]) for i, pair in enumerate(pairs)]


def without_oldest_turns(history: list[dict], number: int = 1) -> list[dict]:
    """Without the oldest user messages and their answers; a system message goes when no turn is left to cut."""
    start = 1 if history and history[0]["role"] == "system" else 0
    return [] if start and 2 * number > len(history) - start else history[:start] + history[start + 2 * number :]


def lengths(pairs: list[dict], template: Template) -> list[dict]:
    """Token counts of each pair: `prompt` (with what the template adds), `history`, `response`, `total`."""
    bare = _encode(_rendered((question({"prompt": pair["prompt"]}) for pair in pairs), template, True), template)
    rows = []
    for alone, example in zip(map(len, bare), encode_all(pairs, template), strict=True):
        asked, total = example["labels"].count(IGNORE_INDEX), len(example["labels"])
        rows.append({"prompt": alone, "history": asked - alone, "response": total - asked, "total": total})
    return rows

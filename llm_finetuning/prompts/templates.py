"""The chat template of a run: the tokenizer's own, a file's or Phi-2's format, made to ask for what is trained."""

import datetime
import re
from os.path import commonprefix
from pathlib import Path

import transformers

from llm_finetuning.prompts.rendering import CURE, Template, render, render_texts

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


def template_for(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    system_message: str = "",
    chat_template: str = "",
    date: datetime.date | None = None,
) -> Template:
    """The tokenizer's own chat template, or Phi-2's format if it has none; with `system_message` as the default.

    chat_template: a file with a Jinja template that takes the place of both; date: see `Template`.
    Phi-2's format stands behind what the tokenizer prepends (BOS). The default and the opening of a turn
    (`_open_as_finished`) become part of `tokenizer.chat_template`, so they travel with the saved tokenizer. Raises
    FileNotFoundError for a file that is not there, ValueError for a template that is no valid Jinja, takes no system
    message, or in which a response cannot be found.
    """
    base, name = _source(tokenizer, chat_template)
    tokenizer.chat_template = base
    template = Template(tokenizer, name, date)
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

"""The Modelfile that Ollama reads, with a template in its language that is derived from the chat template.

The chat template is a program; what it writes around the messages is found by asking it for conversations of marks. The
result is compared with it on other conversations: one that Ollama's language cannot write is refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers

from llm_finetuning import models, prompts

SYSTEM, USER, ANSWER, NEXT = "\ue001", "\ue002", "\ue003", "\ue004"
"""Marks that stand for the messages of a conversation."""
CONTENTS = (
    "Hello", "two\nlines\n\n  indented", 'a "quoted" word, and """three"""', "{{ .System }} {% raw %} $5", "日本 😀 é",
    "<b>x</b> & 'y' \\n", "1. one\n2. two", "<|user|> [INST]", "#hash\n# comment",
)  # fmt: skip
BLANKS = (" a ", "b\n")
LONGEST = 8192
"""Tokens of context that Ollama sets aside at most; a larger one is set by hand."""


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the messages of a conversation that waits for an answer."""

    start: str
    """Before the first user message, where there is no system message: with the default one, if there is any."""
    system: tuple[str, str] | None
    """Before and after a system message; None for a template that takes none."""
    opened: str
    """After a user message: what opens the answer."""
    middle: str
    """Between that and the text of a finished answer."""
    end: str
    """Between an answer and the next user message."""

    def render(self, messages: list[dict]) -> str:
        """What Ollama makes of a conversation with `template`."""
        first, *_ = messages
        before, after = self.system or ("", "")
        parts = [before + first["content"] + after if first["role"] == "system" and self.system else self.start]
        for i, message in enumerate(messages):
            if message["role"] == "user":
                parts.append(message["content"] + self.opened)
            elif message["role"] == "assistant":
                parts.append(self.middle + message["content"] + (self.end if i + 1 < len(messages) else ""))
        return "".join(parts)

    def template(self) -> str:
        """Returns Ollama's template, in the language of Go's text/template."""
        start = _literal(self.start)
        if self.system:
            before, after = map(_literal, self.system)
            start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end }}}}"
        return (
            start
            + '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
            + _literal(self.opened)
            + '{{ else if eq .Role "assistant" }}'
            + _literal(self.middle)
            + "{{ .Content }}{{ if gt (len (slice $.Messages $i)) 1 }}"
            + _literal(self.end)
            + "{{ end }}{{ end }}{{ end }}"
        )


def _literal(text: str) -> str:
    """A text in Go's template language; as a string where it would end the value or begin an action."""
    plain = not any(part in text for part in ("{{", '"', "\r"))
    return text if plain else f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"


def turns(tokenizer: "transformers.PreTrainedTokenizerBase") -> Turns:
    """Derives what a chat template writes around messages. Raises ValueError where that depends on anything else."""
    start, opened = _split(_rendered(tokenizer, USER), USER)
    found, between, end, closing = _split(_rendered(tokenizer, USER, ANSWER, NEXT), USER, ANSWER, NEXT)
    try:
        system = _split(_rendered(tokenizer, USER, system=SYSTEM), SYSTEM, USER)
    except ValueError:
        system = None
    if found != start or closing != opened or not between.startswith(opened) or (system and system[2] != opened):
        raise ValueError("the chat template writes a turn otherwise when others stand before it")
    derived = Turns(start, system and (system[0], system[1]), opened, between.removeprefix(opened), end)
    if messages := _different(tokenizer, derived, CONTENTS):
        raise ValueError(f"the chat template writes {messages[-1]['content']!r} otherwise than other messages")
    return derived


def _conversations(contents: tuple[str, ...], with_system: bool) -> Iterator[list[dict]]:
    """Conversations of one to three turns, each message another of `contents`, with and without a system message."""
    for shift in range(len(contents)):
        texts = contents[shift:] + contents[:shift]
        for count in (1, 3, 5):
            talk = [{"role": ("user", "assistant")[i % 2], "content": texts[i % len(texts)]} for i in range(count)]
            yield talk
            if with_system:
                yield [{"role": "system", "content": texts[-1]}, *talk]


def _different(
    tokenizer: "transformers.PreTrainedTokenizerBase", derived: Turns, contents: tuple[str, ...]
) -> list[dict] | None:
    """The first conversation of `contents` that the chat template writes otherwise than was derived; None if none."""
    talks = list(_conversations(contents, bool(derived.system)))
    texts = _texts(tokenizer, talks)
    return next((talk for talk, text in zip(talks, texts, strict=True) if derived.render(talk) != text), None)


def _rendered(tokenizer: "transformers.PreTrainedTokenizerBase", *contents: str, system: str = "") -> str:
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    (text,) = _texts(tokenizer, [[{"role": "system", "content": system}] * bool(system) + talk])
    return text


def _texts(tokenizer: "transformers.PreTrainedTokenizerBase", conversations: list[list[dict]]) -> list[str]:
    """Conversations as the chat template writes them, without what llama.cpp puts before every text (BOS)."""
    template = prompts.Template(tokenizer, "the chat template")
    texts = prompts.render_texts([(messages, True) for messages in conversations], template)
    bos = tokenizer.bos_token
    if bos is None or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return texts
    if not all(text.startswith(bos) for text in texts):
        raise ValueError(f"llama.cpp begins every text with {bos}, and the chat template does not")
    return [text.removeprefix(bos) for text in texts]


def _split(text: str, *marks: str) -> list[str]:
    """What stands around the marks. Raises ValueError unless each stands there once, in this order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError("the chat template does not write each message once, in order")
        parts.append(before)
    return [*parts, text]


def modelfile(folder: Path, gguf_name: str) -> str:
    """Returns what `ollama create NAME -f Modelfile` reads: weights, template, stop tokens, greedy answers.

    Raises ValueError, with the reason, for a chat template that Ollama's language cannot write.
    """
    tokenizer = models.read_tokenizer(str(folder))
    derived = turns(tokenizer)
    config = models.configuration(str(folder)).get_text_config()
    stops = tokenizer.convert_ids_to_tokens(sorted(prompts.Template(tokenizer).stop_token_ids))
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{derived.template()}"""',
        *_notes(tokenizer, derived),
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
        f"PARAMETER num_ctx {min(config.max_position_embeddings, LONGEST)}",
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"


def _notes(tokenizer: "transformers.PreTrainedTokenizerBase", derived: Turns) -> list[str]:
    """What Ollama's template does otherwise than the chat template, as comments."""
    notes = [] if derived.system else ["# This model was not taught to read a system message: none is passed on."]
    if _different(tokenizer, derived, BLANKS):
        notes.append("# The chat template takes blank space off both ends of a message, Ollama does not.")
    return notes

"""What is asked of a generator model: a request, its answer, and the wording of each kind of request."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from llm_finetuning.settings import Generation

JSON_ONLY = "Answer with JSON alone, in the form {form}, without any text around it."
TRANSIENT = ("server error", "timeout", "rate limit", "no connection")
"""Faults of a server that may be over later."""
CUT, EMPTY, REFUSED = "cut", "empty", "refused by the server"
MOST_AVOIDED = 30
"""Earlier prompts of a cell that a request names, so that they are not written again."""


@dataclass(frozen=True)
class Request:
    """One request to a chat model. `number` tells apart requests that are equal in everything else."""

    purpose: str
    messages: tuple[dict, ...]
    model: str
    temperature: float
    max_tokens: int
    keys: tuple[str, ...] = ()
    """Of the JSON object that is asked for, its one name and the type of its value; () = plain text."""
    number: int = 0

    @property
    def key(self) -> str:
        """SHA-256 of what decides the answer."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()

    @property
    def response_format(self) -> dict | None:
        """The JSON schema of the answer, as servers with structured output take it."""
        if not self.keys:
            return None
        name, kind = self.keys
        value = {"type": "string"} if kind == "text" else {"type": "array", "items": {"type": kind}}
        schema = {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}
        return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


@dataclass(frozen=True)
class Answer:
    """What came of a request: its text, or a fault; tokens as the server counted them, or estimated."""

    text: str = ""
    fault: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0


def estimate_tokens(text: str) -> int:
    """Returns about how many tokens a text has where nobody counted: one for every three bytes of UTF-8."""
    return -(-len(text.encode("utf-8", "replace")) // 3)


def _json(settings: Generation, purpose: str, text: str, keys: tuple[str, str], model: str = "") -> Request:
    """A request whose answer is a JSON object with one name."""
    form = {"text": '{"%s": "…"}', "string": '{"%s": ["…", "…"]}', "integer": '{"%s": [7, …]}'}[keys[1]] % keys[0]
    message = {"role": "user", "content": f"{text}\n\n{JSON_ONLY.format(form=form)}"}
    temperature = 0.0 if purpose == "judge" else settings.temperature
    name = model or settings.generator_model
    return Request(purpose, (message,), name, temperature, settings.max_answer_tokens, keys)


def _about(settings: Generation) -> str:
    """The task with its style and examples, as every request tells them."""
    shown = [f"User: {one['prompt']}\nAssistant: {one['response']}" for one in settings.examples]
    parts = [f"An assistant is being built for this task:\n{settings.task.strip()}"]
    parts += [f"Its style: {settings.style.strip()}"] * bool(settings.style.strip())
    parts += ["Examples of what it should do:\n\n" + "\n\n".join(shown)] * bool(shown)
    return "\n\n".join(parts)


def system_message(settings: Generation) -> Request:
    """Asks for the system message of the finetuned model."""
    wanted = "Write the system message of this assistant: one or two sentences that say what it does and how."
    return _json(settings, "system message", f"{_about(settings)}\n\n{wanted}", ("system_message", "text"))


def topics(settings: Generation, passages: Sequence[str]) -> Request:
    """Asks for the topics of the taxonomy."""
    about = _about(settings)
    if passages:
        about += "\n\nThe topics come from texts that begin like this:\n" + "\n".join(p[:200] for p in passages[:20])
    text = (
        f"{about}\n\nName {settings.topics_wanted} different topics that users of this assistant ask about, each in at"
        " most six words. Together they cover the whole task, and no two overlap."
    )
    return _json(settings, "topics", text, ("topics", "string"))


def prompts(settings: Generation, cell: dict, number: int, passage: str, avoided: Sequence[str]) -> Request:
    """Asks for `number` prompts of one cell of the taxonomy, other than those of `avoided`."""
    lines = [
        _about(settings),
        f"Write {number} different messages that users send to this assistant.",
        f"Topic: {cell['topic']}\nDifficulty: {cell['difficulty']}\nForm: {cell['form']}\nLanguage: {cell['lang']}",
        "Each stands by itself and can be answered without anything else.",
    ]
    if passage:
        lines.append(
            f"Each asks for something that this text answers, without mentioning that there is a text:\n{passage}"
        )
    if avoided:
        lines.append(
            "None of them repeats one of these:\n" + "\n".join(f"- {text}" for text in avoided[-MOST_AVOIDED:])
        )
    return _json(settings, "prompts", "\n\n".join(lines), ("prompts", "string"))


def answer(settings: Generation, system: str, prompt: str, lang: str, passage: str, number: int) -> Request:
    """Asks for the answer to one prompt, in the role of the assistant; the examples stand before it as turns."""
    rules = [system, f"The task: {settings.task.strip()}", f"Answer in the language with the code {lang}."]
    rules += [f"Style: {settings.style.strip()}"] * bool(settings.style.strip())
    rules += [f"What you know, and may use without mentioning it:\n{passage}"] * bool(passage)
    turns = [{"role": "system", "content": "\n\n".join(rules)}]
    for one in settings.examples:
        turns += [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["response"]}]
    turns.append({"role": "user", "content": prompt})
    limit = settings.max_answer_tokens
    return Request("answer", tuple(turns), settings.generator_model, settings.temperature, limit, number=number)


def judge(settings: Generation, prompt: str, responses: Sequence[str]) -> Request:
    """Asks a judge for a score of each response, from 1 to 10."""
    shown = "\n\n".join(f"Response {number}:\n{text}" for number, text in enumerate(responses, 1))
    text = (
        f"{_about(settings)}\n\nA user wrote:\n{prompt}\n\n{shown}\n\nScore each response from 1 (useless) to 10 (what"
        " an expert would send): is it right, does it do the task, and is it in the right style? Length is no merit."
    )
    return _json(settings, "judge", text, ("scores", "integer"), settings.judge_model)

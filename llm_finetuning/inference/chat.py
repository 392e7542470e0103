"""Talk to a published folder: one answer, a streamed answer, many answers.

Template, end ids and suppressed ids come from the folder. The same prompt ids go in and the same rule ends an
answer, whichever engine computes it.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_finetuning import prompts
from llm_finetuning.inference import generation
from llm_finetuning.inference.generation import SamplingParameters, TokenRules

DEFAULTS = SamplingParameters()
BATCH_TOKENS = 8192
"""Tokens of all conversations that are answered side by side, answers included: their keys and values take memory."""


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


@dataclass(frozen=True)
class Answer:
    """An answer and what is known about it."""

    text: str
    tokens: int
    """Tokens that were generated, without the one that ended the answer."""
    ended_by: str
    """ "end" (by itself), "length" or "time"."""
    prompt_tokens: int
    first_token_seconds: float
    """Time until the first token, the reading of the prompt included."""
    seconds: float
    note: str = ""
    """What the reader should know, such as turns that were left out."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Chat:
    """A model that answers conversations: lists of `{"role": system, user or assistant, "content": text}`."""

    def __init__(self, engine, template: prompts.Template, rules: TokenRules):
        self.engine = engine
        self.template = template
        self.rules = rules

    @classmethod
    def load(cls, folder: str | Path, backend: str = "auto") -> "Chat":
        """The model of a published folder, after its `SHA256SUMS` was checked.

        `backend`: "auto", or a name of `backends.NAMES`. Raises FileNotFoundError for a missing folder,
        ValueError for a damaged one or one of another kind.
        """
        from llm_finetuning.inference import backends

        check_folder(folder)
        tokenizer = load_tokenizer(folder)
        engine = backends.load(folder, backend)
        return cls(engine, prompts.template_for(tokenizer), token_rules(Path(folder), tokenizer, engine))

    @classmethod
    def of(cls, model, template: prompts.Template) -> "Chat":
        """A model that is in memory already, such as the one in training, with its template."""
        from llm_finetuning.inference.engines import TorchEngine

        engine = TorchEngine(model)
        unused = tuple(range(len(template.tokenizer), engine.vocabulary_rows))
        return cls(engine, template, TokenRules(frozenset(template.stop_token_ids), unused))

    def base(self, model_path: str, backend: str = "auto") -> "Chat":
        """Another model, such as the base before finetuning, with this one's template and rules."""
        from llm_finetuning.inference import backends

        return Chat(backends.load(model_path, backend), self.template, self.rules)

    def answer(self, messages: list[dict], options: SamplingParameters = DEFAULTS) -> str:
        return self.generate(messages, options).text

    def generate(self, messages: list[dict], options: SamplingParameters = DEFAULTS) -> Answer:
        """The answer with its length, times and note."""
        stream = self.stream(messages, options)
        for _ in stream:
            pass
        return stream.result

    def stream(self, messages: list[dict], options: SamplingParameters = DEFAULTS) -> "Stream":
        """The answer piece by piece. Raises ValueError before the first piece for what cannot be answered."""
        return Stream(self, self.prepare(messages, options), options)

    def answer_batch(self, conversations: list[list[dict]], options: SamplingParameters = DEFAULTS) -> list[str]:
        return [reply.text for reply in self.generate_batch(conversations, options)]

    def generate_batch(self, conversations: list[list[dict]], options: SamplingParameters = DEFAULTS) -> list[Answer]:
        """The answers in the order of `conversations`; computed side by side, the longest prompts first."""
        prepared = [self._prepare_numbered(number, c, options) for number, c in enumerate(conversations, 1)]
        order = sorted(range(len(prepared)), key=lambda i: -len(prepared[i].ids))
        replies: list[Answer | None] = [None] * len(prepared)
        while order:
            longest = len(prepared[order[0]].ids) + options.max_new_tokens
            rows = max(1, min(self.engine.max_batch_size, BATCH_TOKENS // longest))
            places, order = order[:rows], order[rows:]
            for place, reply in zip(places, self._batch([prepared[i] for i in places], options), strict=True):
                replies[place] = reply
        return replies

    def prepare(self, messages: list[dict], options: SamplingParameters = DEFAULTS) -> Prompt:
        """The ids of a conversation as they go in, oldest turns left out where they do not fit."""
        return encode_question(messages, self.template, self.engine.context, options.max_new_tokens)

    def _prepare_numbered(self, number: int, messages: list[dict], options: SamplingParameters) -> Prompt:
        try:
            return self.prepare(messages, options)
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from error

    def _batch(self, prepared: list[Prompt], options: SamplingParameters) -> list[Answer]:
        rows = generation.requests_for([p.ids for p in prepared], options, self.engine.context)
        start = time.perf_counter()
        first = 0.0
        for _ in generation.decode(self.engine, rows, self.rules, options):
            first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        return [self._reply(row, p, first, seconds) for row, p in zip(rows, prepared, strict=True)]

    def _reply(self, row: generation.Request, prompt: Prompt, first: float, seconds: float) -> Answer:
        return Answer(self.text(row.new), len(row.new), row.ended_by, len(row.prompt), first, seconds, prompt.note)

    def text(self, ids: list[int]) -> str:
        """Answer ids as text, without the one space that stands before an answer in the template."""
        decoded = self.template.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded.removeprefix(" ")


class Stream(Iterator[str]):
    """An answer as it comes. Nothing is computed between two pieces, nor after `close()`.

    `note` is there at once; `reply` (what was answered so far) from the first piece on.
    """

    def __init__(self, chat: Chat, prompt: Prompt, options: SamplingParameters):
        self.note = prompt.note
        self._chat, self._prompt = chat, prompt
        (self._row,) = generation.requests_for([prompt.ids], options, chat.engine.context)
        self._steps = generation.decode(chat.engine, [self._row], chat.rules, options)
        self._shown = ""
        self._start = self._first = self._seconds = 0.0

    def __next__(self) -> str:
        """The next piece of text; an incomplete character waits for the token that completes it."""
        self._start = self._start or time.perf_counter()
        for _ in self._steps:
            self._seconds = time.perf_counter() - self._start
            self._first = self._first or self._seconds
            text = self._chat.text(self._row.new)
            if not self._row.ended_by:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            piece = text[len(self._shown) :]
            if piece:
                self._shown = text
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stops computing. What was answered so far stays in `reply`."""
        self._steps.close()

    @property
    def result(self) -> Answer:
        return self._chat._reply(self._row, self._prompt, self._first, self._seconds)


def check_folder(folder: str | Path) -> dict[str, str]:
    """{file: SHA-256} of a published model folder, every file compared.

    Raises FileNotFoundError when it is missing, ValueError when it is damaged or of another kind.
    """
    from llm_finetuning.files import checksums

    folder = Path(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        what = "an adapter without its base" if (folder / "adapter_config.json").is_file() else "no model folder"
        raise ValueError(
            f"{folder} is {what} (config.json is missing): give the published folder, finetuned_phi2,"
            " that the finetuning notebook writes"
        )
    return checksums.verify_checksums(folder)


def load_tokenizer(folder: str | Path):
    """The tokenizer of a published folder. Raises ValueError where it has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder} has no chat template, so the prompt it was trained with is not known:"
            " publish it with the finetuning notebook"
        )
    return tokenizer


def token_rules(folder: Path, tokenizer, engine) -> TokenRules:
    """End ids and suppressed ids from generation_config.json; rows that no token uses never come."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(str(folder))
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends == [None]:
        raise ValueError(
            f"{folder}/generation_config.json names no eos_token_id, so no answer could end:"
            " publish the folder with the finetuning notebook"
        )
    unused = range(len(tokenizer), engine.vocabulary_rows)
    return TokenRules(frozenset(ends), tuple(sorted({*(config.suppress_tokens or ()), *unused})))


def encode_question(messages: list[dict], template: prompts.Template, context: int, max_new_tokens: int) -> Prompt:
    """The ids that the model answers. Raises ValueError for what no answer can be given to.

    The oldest turns go first, until the answer has room; a system message and the last question always stay.
    """
    check_question(messages)
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


def check_question(messages: list[dict]) -> None:
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

"""Conversations with the model of a published folder: one answer, a streamed answer, many answers.

Template, stop token ids and suppressed token ids come from the folder. Every engine gets the same prompt ids, and
the same rule ends its answers.
"""

import json
import re
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers

from llm_finetuning import models, prompts
from llm_finetuning.files import checksums
from llm_finetuning.inference import backends, generation, published
from llm_finetuning.inference.engines import TorchEngine
from llm_finetuning.inference.generation import Engine, Request, SamplingParameters, TokenRules

GREEDY = SamplingParameters()
BATCH_TOKENS = 8192
"""Tokens of all conversations that are answered side by side, answers included: their keys and values take memory."""
SHARE_FOR_ANSWER = 4
"""At least a quarter of the context is kept free for an answer while there is history to leave out."""
SURROGATE = re.compile("[\ud800-\udfff]")


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
    """The text of an answer, how it ended and how long it took."""

    text: str
    tokens: int
    """Tokens that were generated, without the stop token."""
    ended_by: str
    """`generation.END` (by itself), `LENGTH` or `TIME`."""
    prompt_tokens: int
    first_token_seconds: float
    """Time to first token: the prefill and one step."""
    seconds: float
    note: str = ""
    """What the reader should know, such as turns that were left out."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Chat:
    """A model that answers conversations: lists of `{"role": system, user or assistant, "content": text}`."""

    def __init__(
        self, engine: Engine, template: prompts.Template, rules: TokenRules, is_sample: bool = False, digest: str = ""
    ):
        self.engine = engine
        self.template = template
        self.rules = rules
        self.is_sample = is_sample
        """Whether this is the sample's tiny model."""
        self.digest = digest
        """What tells a published model from others; "" for a model in memory, or a base."""

    @classmethod
    def load(cls, folder: str | Path, backend: str = "auto") -> "Chat":
        """Loads the model of a published folder, after its `SHA256SUMS` was checked.

        backend: "auto", or a name of `backends.NAMES`.
        Raises FileNotFoundError for a missing folder, ValueError for a damaged one or one of another kind.
        """
        template, rules = published.read(Path(folder))
        engine, folder = backends.load(folder, backend), Path(folder)
        return cls(engine, template, rules, is_sample(folder), checksums.digest(folder))

    @classmethod
    def of(cls, model: "transformers.PreTrainedModel", template: prompts.Template) -> "Chat":
        """Makes a chat of a model that is in memory already, such as the one in training, and its template."""
        engine = TorchEngine(model)
        unused = tuple(range(len(template.tokenizer), engine.vocab_size))
        return cls(engine, template, TokenRules(frozenset(template.stop_token_ids), unused))

    def base(self, model_path: str | Path, backend: str = "auto") -> "Chat":
        """Loads another model, such as the base before finetuning, with this one's template and token rules."""
        return Chat(backends.load(model_path, backend), self.template, self.rules)

    def answer(self, messages: list[dict], sampling: SamplingParameters = GREEDY) -> str:
        return self.generate(messages, sampling).text

    def generate(self, messages: list[dict], sampling: SamplingParameters = GREEDY) -> Answer:
        """Returns the answer with its length, times and note."""
        stream = self.stream(messages, sampling)
        for _ in stream:
            pass
        return stream.result

    def stream(self, messages: list[dict], sampling: SamplingParameters = GREEDY) -> "Stream":
        """Returns the answer as a stream. Raises ValueError before its first piece for what cannot be answered."""
        return Stream(self, self.prepare(messages, sampling), sampling)

    def together(self, streams: list["Stream"]) -> Iterator[None]:
        """Computes streams of the same sampling parameters in one batch; yields after each token, `text` is new then.

        A stream whose request gets an `ended_by` in between leaves the batch.
        """
        for stream in streams:
            stream.begin()
        requests = [stream.request for stream in streams]
        active = streams
        for _ in generation.decode(self.engine, requests, self.rules, streams[0].sampling) if streams else ():
            for stream in active:
                stream.advance()
            yield
            active = [stream for stream in active if not stream.request.ended_by]

    def answer_batch(self, conversations: list[list[dict]], sampling: SamplingParameters = GREEDY) -> list[str]:
        return [answer.text for answer in self.generate_batch(conversations, sampling)]

    def generate_batch(self, conversations: list[list[dict]], sampling: SamplingParameters = GREEDY) -> list[Answer]:
        """Returns the answers in the order of `conversations`; computed in batches, the longest prompts first."""
        prepared = []
        for number, messages in enumerate(conversations, 1):
            try:
                prepared.append(self.prepare(messages, sampling))
            except ValueError as error:
                raise ValueError(f"conversation {number}: {error}") from error
        order = sorted(range(len(prepared)), key=lambda i: -len(prepared[i].ids))
        answers: dict[int, Answer] = {}
        while order:
            longest = len(prepared[order[0]].ids) + sampling.max_new_tokens
            size = max(1, min(self.engine.max_batch_size, BATCH_TOKENS // longest))
            batch, order = order[:size], order[size:]
            answers |= zip(batch, self._batch([prepared[i] for i in batch], sampling), strict=True)
        return [answers[i] for i in range(len(prepared))]

    def prepare(self, messages: list[dict], sampling: SamplingParameters = GREEDY) -> Prompt:
        """Returns the prompt ids of a conversation, its oldest turns left out where they do not fit."""
        return encode_question(messages, self.template, self.engine.context, sampling.max_new_tokens)

    def _batch(self, prepared: list[Prompt], sampling: SamplingParameters) -> list[Answer]:
        requests = generation.requests_for([p.ids for p in prepared], sampling, self.engine.context)
        start = time.perf_counter()
        first = 0.0
        for _ in generation.decode(self.engine, requests, self.rules, sampling):
            first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        return [self.result(r, p.note, first, seconds) for r, p in zip(requests, prepared, strict=True)]

    def result(self, request: Request, note: str, first: float, seconds: float) -> Answer:
        """Returns what `request` has generated so far, with the seconds to its first and to its last token."""
        text, tokens = self.text(request.output_ids), len(request.output_ids)
        return Answer(text, tokens, request.ended_by, len(request.prompt_ids), first, seconds, note)

    def text(self, ids: list[int]) -> str:
        """Decodes answer ids, without the one space that stands before an answer in the template."""
        decoded = self.template.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded.removeprefix(" ")


class Stream(Iterator[str]):
    """The pieces of an answer as they are generated. Nothing is computed between two pieces, nor after `close()`.

    `note` is there at once; `text` and `result`, the answer so far, from the first piece on.
    """

    def __init__(self, chat: Chat, prompt: Prompt, sampling: SamplingParameters):
        self.note, self.sampling, self.text = prompt.note, sampling, ""
        (self.request,) = generation.requests_for([prompt.ids], sampling, chat.engine.context)
        self._chat = chat
        self._steps = generation.decode(chat.engine, [self.request], chat.rules, sampling)
        self._start = self._first = self._seconds = 0.0

    def __next__(self) -> str:
        self.begin()
        for _ in self._steps:
            if piece := self.advance():
                return piece
        raise StopIteration

    def begin(self) -> None:
        """Starts the clock, unless it runs."""
        self._start = self._start or time.perf_counter()

    def advance(self) -> str:
        """Takes what was generated since into `text` and returns it; an incomplete character waits for its end."""
        self._seconds = time.perf_counter() - self._start
        self._first = self._first or self._seconds
        text = self._chat.text(self.request.output_ids)
        if not self.request.ended_by:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        piece, self.text = text[len(self.text) :], text
        return piece

    def close(self) -> None:
        """Stops computing; the answer so far stays in `result`."""
        self._steps.close()

    @property
    def result(self) -> Answer:
        return self._chat.result(self.request, self.note, self._first, self._seconds)


def is_sample(folder: Path) -> bool:
    """Returns whether the settings of a published folder name the sample as its base."""
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # they are for people to read: none are needed to answer
        return False
    return isinstance(settings, dict) and settings.get("model_name") == models.SAMPLE


def encode_question(messages: list[dict], template: prompts.Template, context: int, max_new_tokens: int) -> Prompt:
    """Encodes a conversation so that the answer has room in the context; the oldest turns are left out first.

    A system message and the last question always stay. Raises ValueError for what no answer can be given to.
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
        if half := SURROGATE.search(message["content"]):
            raise ValueError(
                f"message {number} holds half a character (a lone surrogate, U+{ord(half[0]):04X},"
                f" at position {half.start()}): send it as valid Unicode"
            )
    if not messages[-1]["content"].strip():
        raise ValueError("the message is empty: type a question")

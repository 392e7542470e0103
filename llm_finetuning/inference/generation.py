"""The decoding loop, which turns prompt ids into answer ids, and the interface of the engines that compute logits."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch

from llm_finetuning.settings import Inference, sampling_rules

END, LENGTH, TIME, STOP = "end", "length", "time", "stop"
"""Why an answer is over: it ended by itself, reached the limit of new tokens or of time, or was stopped."""


class Session(Protocol):
    """The sequences of one batch, with their keys and values so far."""

    logits: torch.Tensor
    """(B, V): of the next token of each sequence."""

    def push(self, ids: list[int]) -> None:
        """Appends one token to each sequence and computes the logits of the next ones."""

    def keep(self, indices: list[int]) -> None:
        """Drops all sequences from the batch but those at `indices`."""

    def close(self) -> None:
        """Ends the session; the engine may use its cache for the next one."""


class Engine(Protocol):
    """A model that computes the logits of the next token, by whichever backend."""

    name: str
    context: int
    """Tokens that prompt and answer may have together."""
    vocab_size: int
    max_batch_size: int
    """Sequences that one session takes, at most."""

    def session(self, sequences: list[list[int]]) -> Session:
        """Runs the prefill of the sequences (token ids) and returns their session."""


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is chosen and when an answer ends. Greedy unless a temperature is set."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    max_seconds: float = 0.0
    """Stop an answer after this time; 0 = no limit."""
    temperature: float = 0.0
    """0 = greedy; 1 = the model's own probabilities."""
    top_p: float = 1.0
    """Sample from the most probable tokens that together have this probability (arXiv 1904.09751)."""
    top_k: int = 0
    """Sample from this many of the most probable tokens; 0 = all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there already (arXiv 1909.05858); 1 = off."""
    seed: int = 0
    """Of the sampling; the same seed gives the same answer. -1 = another one each time."""

    def __post_init__(self) -> None:
        problems = [message for holds, message in sampling_rules(self) if not holds]
        if problems:
            raise ValueError("\n".join(problems))


def sampling_parameters(settings: Inference) -> SamplingParameters:
    """Returns the sampling parameters among the settings of the inference notebook."""
    return SamplingParameters(**{f.name: getattr(settings, f.name) for f in fields(SamplingParameters)})


@dataclass(frozen=True)
class TokenRules:
    """The token ids that end an answer, and those that must never be generated."""

    stop_token_ids: frozenset[int]
    suppressed_token_ids: tuple[int, ...] = ()


@dataclass
class Request:
    """A prompt whose answer is being generated."""

    prompt_ids: list[int]
    max_new_tokens: int
    generator: torch.Generator
    output_ids: list[int] = field(default_factory=list)
    ended_by: str = ""

    def append(self, token: int, stop_token_ids: frozenset[int], too_late: bool) -> None:
        """Takes the next token of the answer and notes whether it is the last one; a stop token is not part of it."""
        if token in stop_token_ids:
            self.ended_by = END
            return
        self.output_ids.append(token)
        if len(self.output_ids) >= self.max_new_tokens:
            self.ended_by = LENGTH
        elif too_late:
            self.ended_by = TIME


def requests_for(prompts: list[list[int]], sampling: SamplingParameters, context: int) -> list[Request]:
    """Makes a request for each prompt, with a generator of its own, so that no answer depends on the others."""
    return [
        Request(prompt, min(sampling.max_new_tokens, context - len(prompt)), _generator(sampling.seed))
        for prompt in prompts
    ]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(torch.Generator().seed() if seed == -1 else seed)


@torch.inference_mode()
def decode(engine: Engine, requests: list[Request], rules: TokenRules, sampling: SamplingParameters) -> Iterator[None]:
    """Generates one token a step for every request, and yields after each step; nothing is computed in between.

    Closing the generator ends the work. Requests that have ended leave the batch. Raises ValueError where the logits
    are not numbers: the most probable token would be any one.
    """
    deadline = time.monotonic() + sampling.max_seconds if sampling.max_seconds else float("inf")
    session = engine.session([request.prompt_ids for request in requests])
    suppressed = torch.tensor(rules.suppressed_token_ids, dtype=torch.long, device=session.logits.device)
    active = requests
    try:
        while True:
            logits = session.logits.float().index_fill(1, suppressed, float("-inf"))
            if logits.isnan().any():
                raise ValueError(
                    f"{engine.name}: the model computes NaN in place of logits: its weights or sizes are damaged, or"
                    " too large for this dtype. Fetch the folder again, or take another backend, such as float32"
                )
            for request, token in zip(active, next_tokens(logits, active, sampling), strict=True):
                request.append(token, rules.stop_token_ids, time.monotonic() > deadline)
            yield
            unfinished = [index for index, request in enumerate(active) if not request.ended_by]
            if not unfinished:
                return
            if len(unfinished) < len(active):
                session.keep(unfinished)
            active = [active[index] for index in unfinished]
            session.push([request.output_ids[-1] for request in active])
    finally:
        session.close()


def next_tokens(logits: torch.Tensor, requests: list[Request], sampling: SamplingParameters) -> list[int]:
    """Chooses the next token of each request from `logits` (B, V), in which suppressed tokens are -inf."""
    if sampling.repetition_penalty != 1:
        seen = [torch.tensor(sorted({*r.prompt_ids, *r.output_ids}), device=logits.device) for r in requests]
        penalty = sampling.repetition_penalty
        logits = torch.stack([penalised(line, ids, penalty) for line, ids in zip(logits, seen, strict=True)])
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    return [sample(line.cpu(), r.generator, sampling) for line, r in zip(logits, requests, strict=True)]


def penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Makes the logits (V,) of `seen` ids smaller by the factor `penalty` (arXiv 1909.05858, section 4.1)."""
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def sample(logits: torch.Tensor, generator: torch.Generator, sampling: SamplingParameters) -> int:
    """Draws one token from logits (V,) after temperature, top-k and top-p."""
    values, ids = (logits / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])

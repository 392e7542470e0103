"""Token by token: the loop that turns prompt ids into answer ids, whichever engine computes the logits.

An engine offers `session(rows)`; a session has `logits` (B, V) for the next token, `push(ids)` that appends
one token to each row, `keep(indices)` that goes on with some rows only, and `close()`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch

from llm_finetuning.settings import sampling_rules

END, LENGTH, TIME = "end", "length", "time"
"""Why an answer is over: it ended by itself, or reached the limit of new tokens or of time."""


@dataclass(frozen=True)
class SamplingParameters:
    """How to answer. Greedy unless a temperature is set."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    max_seconds: float = 0.0
    """Stop an answer after this time; 0 = no limit."""
    temperature: float = 0.0
    """0 = always the likeliest token; 1 = the model's own probabilities."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 = all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there already (arXiv 1909.05858); 1 = off."""
    seed: int = 0
    """Of the sampling; the same seed gives the same answer. -1 = another one each time."""

    def __post_init__(self):
        problems = [message for holds, message in sampling_rules(self) if not holds]
        if problems:
            raise ValueError("\n".join(problems))


def sampling_parameters(settings) -> SamplingParameters:
    """The options among the fields of a notebook's settings."""
    return SamplingParameters(**{f.name: getattr(settings, f.name) for f in fields(SamplingParameters)})


@dataclass(frozen=True)
class TokenRules:
    """What the folder says about its tokens: ids that end an answer, and ids that must never be generated."""

    stop_token_ids: frozenset[int]
    suppressed_token_ids: tuple[int, ...] = ()


@dataclass
class Request:
    """One answer in the making."""

    prompt: list[int]
    limit: int
    """Most new tokens for this row."""
    generator: torch.Generator
    new: list[int] = field(default_factory=list)
    ended_by: str = ""

    def take(self, token: int, stop_token_ids: frozenset[int], too_late: bool) -> None:
        if token in stop_token_ids:
            self.ended_by = END
            return
        self.new.append(token)
        if len(self.new) >= self.limit:
            self.ended_by = LENGTH
        elif too_late:
            self.ended_by = TIME


def requests_for(prompts: list[list[int]], options: SamplingParameters, context: int) -> list[Request]:
    """One row for each prompt, with random numbers of its own: its answer does not depend on the others."""
    return [
        Request(prompt, min(options.max_new_tokens, context - len(prompt)), _generator(options.seed))
        for prompt in prompts
    ]


def _generator(seed: int) -> torch.Generator:
    generator = torch.Generator()
    if seed == -1:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


@torch.inference_mode()
def decode(engine, rows: list[Request], rules: TokenRules, options: SamplingParameters) -> Iterator[None]:
    """Fills `rows` one token a step and yields after each; between two steps nothing is computed.

    Closing the generator ends the work. Rows that have ended leave the batch.
    """
    deadline = time.monotonic() + options.max_seconds if options.max_seconds else float("inf")
    session = engine.session([row.prompt for row in rows])
    suppressed = torch.tensor(rules.suppressed_token_ids, dtype=torch.long, device=session.logits.device)
    active = list(range(len(rows)))
    try:
        while True:
            logits = session.logits.float().index_fill(1, suppressed, float("-inf"))
            tokens = choose(logits, [rows[i] for i in active], options)
            for index, token in zip(active, tokens, strict=True):
                rows[index].take(token, rules.stop_token_ids, time.monotonic() > deadline)
            yield
            kept = [place for place, index in enumerate(active) if not rows[index].ended_by]
            if not kept:
                return
            if len(kept) < len(active):
                session.keep(kept)
            active = [active[place] for place in kept]
            session.push([rows[index].new[-1] for index in active])
    finally:
        session.close()


def choose(logits: torch.Tensor, rows: list[Request], options: SamplingParameters) -> list[int]:
    """The next id of each row from `logits` (B, V), in which what must not come is -inf."""
    if options.repetition_penalty != 1:
        seen = [torch.tensor(sorted({*row.prompt, *row.new}), device=logits.device) for row in rows]
        logits = torch.stack(
            [penalised(line, s, options.repetition_penalty) for line, s in zip(logits, seen, strict=True)]
        )
    if options.temperature == 0:
        return logits.argmax(-1).tolist()
    return [sample(line.cpu(), row.generator, options) for line, row in zip(logits, rows, strict=True)]


def penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (V,) with those of `seen` ids made smaller by a factor (arXiv 1909.05858, section 4.1)."""
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def sample(logits: torch.Tensor, generator: torch.Generator, options: SamplingParameters) -> int:
    """One id drawn from logits (V,) after temperature, top-k and top-p."""
    values, ids = (logits / options.temperature).sort(descending=True)
    if options.top_k:
        values, ids = values[: options.top_k], ids[: options.top_k]
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= options.top_p, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])

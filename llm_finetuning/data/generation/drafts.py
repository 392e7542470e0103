"""Drafts are pairs in the making: cell of the taxonomy, prompt, responses and scores, and the step of each loss."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from llm_finetuning.data.duplicates import like_earlier
from llm_finetuning.data.generation import parsing, requests, rules
from llm_finetuning.data.generation.generator import Generator
from llm_finetuning.data.generation.requests import Answer
from llm_finetuning.settings import Generation

PROMPTS_PER_REQUEST = 5
MOST_DRAFTS = 4
"""Drafts for each pair that is wanted, at most: where three of four are lost, the generator does not fit the task."""
AFFORDED, PROMPTED, NEW, ANSWERED = "within the budget", "prompt written", "prompt not asked before", "answered"
UNCUT, FILLED, WILLING = "response not cut off", "response not empty", "no refusal"
HUMAN, WHOLE, SHORT, LONG = 'no "as an AI"', "whole markup", "response long enough", "response short enough"
SPOKEN, OWN, FITTING, LIKED = (
    "in the language asked for",
    "no copy of the prompt",
    "short enough in tokens",
    "liked by the judge",
)
STEPS = {
    AFFORDED: "",
    PROMPTED: "",
    NEW: "near_duplicates = 0",
    ANSWERED: "",
    UNCUT: "a larger max_answer_tokens",
    FILLED: "",
    WILLING: "",
    HUMAN: "",
    WHOLE: "",
    SHORT: "min_response_chars = 0",
    LONG: "max_response_chars = 0",
    SPOKEN: "",
    OWN: "",
    FITTING: "a larger max_seq_length",
    LIKED: "min_score = 0",
}
"""The steps at which a response can be lost, in their order, and the parameter that turns each off."""


@dataclass
class Draft:
    """One prompt in the making. A response that was lost has the name of a step in `losses`, "" stands for one left."""

    number: int
    cell: dict
    passage: str = ""
    prompt: str = ""
    responses: list[str] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    fault: str = ""
    """What the server did, where that is why something was lost."""

    @property
    def is_kept(self) -> bool:
        """Whether at least one response is left."""
        return "" in self.losses

    def lose(self, step: str, fault: str = "") -> None:
        """Marks every response that is left as lost at `step`."""
        self.losses, self.fault = [loss or step for loss in self.losses], fault or self.fault


class Drafts:
    """Makes drafts in a fixed order, so that what is in the cache is asked for again, and not paid again."""

    def __init__(
        self,
        settings: Generation,
        generator: Generator,
        system: str,
        cells: list[dict],
        passages: Sequence[str],
        fits: Callable[[list[dict]], list[bool]],
    ):
        """fits: tells of pair records whether each is short enough to train on."""
        self.settings, self.generator, self.system, self.fits = settings, generator, system, fits
        self.cells, self.passages = cells, passages or [""]
        self.all: list[Draft] = []
        self.batches: dict[int, tuple[Answer | None, list[str]]] = {}
        """Of each batch of prompts its answer, and the prompts that stand in it."""

    @property
    def kept(self) -> list[Draft]:
        return [draft for draft in self.all if draft.is_kept]

    def fill(self, wanted: int) -> None:
        """Makes drafts until `wanted` are kept, their bound is reached, or the budget is spent."""
        while (missing := wanted - len(self.kept)) > 0 and not self.generator.exhausted:
            room = MOST_DRAFTS * wanted - len(self.all)
            if room <= 0:
                return
            self._make(min(missing, room))
        if len(self.kept) >= wanted:
            self.generator.settle()

    def _make(self, number: int) -> None:
        """Takes the next drafts through all steps."""
        new = [self._draft(len(self.all) + place) for place in range(number)]
        for _, lap in groupby(new, key=lambda draft: draft.number // PROMPTS_PER_REQUEST // len(self.cells)):
            lap = list(lap)
            self._prompt(lap)
            self.all += lap
        self._drop_duplicates(new)
        self._answer([draft for draft in new if draft.is_kept])
        for draft in new:
            draft.losses = [
                loss or broken_rule(self.settings, draft, text)
                for loss, text in zip(draft.losses, draft.responses, strict=True)
            ]
        self._drop_long(new)
        self._judge([draft for draft in new if draft.is_kept])

    def _draft(self, number: int) -> Draft:
        batch, answers = number // PROMPTS_PER_REQUEST, 1 + self.settings.second_answer
        cell, passage = self.cells[batch % len(self.cells)], self.passages[batch % len(self.passages)]
        return Draft(number, cell, passage, responses=[""] * answers, losses=[""] * answers)

    def _prompt(self, lap: list[Draft]) -> None:
        """Asks for the prompts of drafts, all of whose cells differ from one another within the lap."""
        firsts = {draft.number // PROMPTS_PER_REQUEST: draft for draft in lap}
        new = [batch for batch in firsts if batch not in self.batches]
        asked = [
            requests.prompts(
                self.settings, firsts[b].cell, PROMPTS_PER_REQUEST, firsts[b].passage, self._avoided(b, firsts[b])
            )
            for b in new
        ]
        for batch, answer in zip(new, self.generator.ask(asked), strict=True):
            self.batches[batch] = answer, parsing.strings(answer.text, "prompts") if answer else []
        for draft in lap:
            batch, place = divmod(draft.number, PROMPTS_PER_REQUEST)
            answer, written = self.batches[batch]
            draft.prompt = written[place] if place < len(written) else ""
            if answer is None:
                draft.lose(AFFORDED)
            elif not draft.prompt:
                draft.lose(PROMPTED, answer.fault or "no prompt in the answer")

    def _avoided(self, batch: int, draft: Draft) -> list[str]:
        """The prompts that earlier laps have for the same cell."""
        earlier = range(batch % len(self.cells), batch, len(self.cells))
        return [text for b in earlier for text in self.batches.get(b, (None, []))[1]]

    def _drop_duplicates(self, new: list[Draft]) -> None:
        """Drops prompts like earlier ones, of any topic, before their answers are paid for."""
        asked = [draft for draft in self.all if draft.prompt]
        pairs = [{"prompt": draft.prompt, "history": []} for draft in asked]
        like = like_earlier(pairs, range(len(asked)), self.settings.near_duplicates)
        numbers = {draft.number for draft in new}
        for draft, earlier in zip(asked, like, strict=True):
            if earlier is not None and draft.number in numbers:
                draft.lose(NEW)

    def _answer(self, drafts: list[Draft]) -> None:
        """Asks for one or two responses to each prompt."""
        both = [(draft, number) for draft in drafts for number in range(len(draft.responses))]
        answers = self.generator.ask(
            [
                requests.answer(self.settings, self.system, draft.prompt, draft.cell["lang"], draft.passage, number)
                for draft, number in both
            ]
        )
        for (draft, number), answer in zip(both, answers, strict=True):
            draft.losses[number] = _loss_of(answer)
            draft.responses[number] = answer.text.strip() if answer else ""
            draft.fault = answer.fault if answer and answer.fault else draft.fault

    def _drop_long(self, new: list[Draft]) -> None:
        """Drops responses that are too long for training, with their prompt."""
        left = [(d, n) for d in new for n, loss in enumerate(d.losses) if not loss]
        fits = self.fits([{"prompt": d.prompt, "response": d.responses[n], "history": []} for d, n in left])
        for (draft, number), fit in zip(left, fits, strict=True):
            draft.losses[number] = "" if fit else FITTING

    def _judge(self, drafts: list[Draft]) -> None:
        """Asks for scores where responses are to be ranked or measured; what the judge did not score has no rank."""
        lowest = self.settings.min_score
        asked = [d for d in drafts if lowest or len(_in_turn(d)) > 1]
        answers = self.generator.ask(
            [requests.judge(self.settings, d.prompt, [d.responses[n] for n in _in_turn(d)]) for d in asked]
        )
        for draft, answer in zip(asked, answers, strict=True):
            scores, order = parsing.numbers(answer.text, "scores") if answer else [], _in_turn(draft)
            draft.scores = dict(zip(order, scores, strict=True)) if len(scores) == len(order) else {}
            for number in order:
                draft.losses[number] = LIKED if draft.scores.get(number, 0) < lowest else ""


def _in_turn(draft: Draft) -> list[int]:
    """Returns the responses that are left; every other draft's last one first, for a judge prefers the first."""
    left = [number for number, loss in enumerate(draft.losses) if not loss]
    return left[::-1] if draft.number % 2 else left


def _loss_of(answer: Answer | None) -> str:
    """Returns the step at which an answer was lost, "" for one with a text that is whole."""
    if answer is None:
        return AFFORDED
    return {"": "", requests.CUT: UNCUT, requests.EMPTY: FILLED}.get(answer.fault, ANSWERED)


def broken_rule(settings: Generation, draft: Draft, response: str) -> str:
    """Returns the first step whose rule a response breaks, or ""."""
    longest = settings.max_response_chars or len(response)
    broken = {
        FILLED: not response,
        WILLING: rules.refuses(response),
        HUMAN: rules.speaks_of_itself(response),
        WHOLE: rules.is_broken(response) or rules.is_broken(draft.prompt),
        SHORT: len(response) < settings.min_response_chars,
        LONG: len(response) > longest,
        SPOKEN: not rules.is_language(response, draft.cell["lang"]),
        OWN: response.casefold() == draft.prompt.strip().casefold(),
    }
    return next((step for step, found in broken.items() if found), "")


def records(draft: Draft) -> list[dict]:
    """Returns the pair record of each response of a draft; ranks are those of different scores."""
    better = sorted(set(draft.scores.values()), reverse=True)
    return [
        {
            "prompt": draft.prompt,
            "response": response,
            "history": [],
            "lang": draft.cell["lang"],
            "message_tree_id": draft.cell["topic"],
            "message_id": f"{draft.number}-{number}",
            "rank": better.index(draft.scores[number]) if len(better) > 1 and number in draft.scores else None,
        }
        for number, response in enumerate(draft.responses)
    ]


def faults(drafts: Iterable[Draft], step: str) -> Counter[str]:
    """Counts what the server did to the drafts that were lost at `step`."""
    return Counter(draft.fault for draft in drafts if step in draft.losses and draft.fault)

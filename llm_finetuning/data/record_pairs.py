"""Makes pairs of a user's own records, of whatever shape they are, and counts what of them is not used."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from llm_finetuning.data.comparisons import (
    TWO,
    Comparison,
    canonical_record,
    inside,
    is_vote,
    of_list,
    of_two,
    of_vote,
    opinion,
    rated_chat,
    renaming,
    with_chats,
)
from llm_finetuning.data.reading import all_of, as_number, excerpt, is_text
from llm_finetuning.data.shapes import (
    CONTEXT,
    EXPLAINED,
    HISTORY,
    OWN_COLUMNS,
    PROMPTS,
    RESPONSES,
    SCORES,
    SUMMARY,
    SYSTEMS,
    Columns,
    Shape,
    given_names,
    in_one_text,
    known_shapes,
    layout_of,
)
from llm_finetuning.data.transcripts import answered, asked, dialogue_of, opened
from llm_finetuning.data.turns import BETWEEN, Turn, Unusable, as_turns, is_given, pairs_of, text_of, turns_of

NO_SHAPE = "no known shape"
TIE = "votes for neither of two different answers"
SHORT = 20
"""Characters that may follow the response in a prompt that ends with it, as the marks of an end do."""
HEADED = re.compile(r"(?:response|output|answer|assistant|solution)\W*$", re.IGNORECASE)
"""What stands before a response in a text that holds all of a record."""


@dataclass
class Reader:
    """Makes pairs of records, and counts what it did not use.

    not_used: column → records in which it held something. reasons: why something could not be used, and how often.
    shapes: columns of each shape that was recognised → records.
    """

    columns: Columns = field(default_factory=Columns)
    not_used: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    shapes: Counter = field(default_factory=Counter)

    def pairs(self, record: dict) -> tuple[list[dict], list[Unusable]]:
        """Returns (the pairs of a record, what in it could not be used); raises ValueError if it has no known shape."""
        keys, record = list(record), canonical_record(record)
        if is_vote(record):
            if (preference := of_vote(record)) is None:
                self.reasons[TIE] += 1
                return [], []
            record = preference
        names = given_names(record)
        shape = self._layout(record, names)
        if shape is None:
            raise self._no_shape(keys, names)
        if several := isinstance(shape, Comparison):
            needs, parts = shape.needs, self._responses(record, shape)
            shape = Shape(shape.prompt)
        else:
            said, by = ({}, ()) if shape.rejected else opinion(record)
            needs, parts = (*shape.needs, *by), [(record, shape, said)]
            self.shapes[" + ".join(needs)] += 1
        system = self.columns.system or next((name for name in SYSTEMS if name in names), SYSTEMS[0])
        used = {*needs, *parts[0][1].uses(system)} if parts else {*names}
        self.not_used.update(name for name in names if name not in used)
        before = self._before(record, shape, system)
        own = {name: record[name] for name in OWN_COLUMNS[: 3 if several else 4] if is_given(record.get(name))}
        if "rank" in own:
            own["rank"] = as_number(own["rank"])
        found, faults = [], {}
        for each, its_shape, said in parts:
            pairs, problems = self._pairs(each, its_shape, before)
            if its_shape.chat:
                pairs, said = rated_chat(pairs, said, not problems), {}
            found += [pair | said | own for pair in pairs]
            if problems:
                faults |= {str(fault): fault for fault in problems}
        return found, list(faults.values())

    def _layout(self, record: dict, names: tuple[str, ...]) -> Shape | Comparison | None:
        """Returns what `recognise` does, without a `prompt` that holds the response beside the instruction."""
        shape = layout_of(names, self.columns) or in_one_text(record, self.columns)
        shape = shape or layout_of(tuple(record), self.columns)
        if isinstance(shape, Shape) and shape.chat and SUMMARY in names and _is_one_text(record[shape.chat]):
            return Shape(shape.chat, SUMMARY)
        if isinstance(shape, Shape) and not self.columns.prompt and _is_in_prompt(record, shape):
            return layout_of(tuple(name for name in names if name != shape.prompt), self.columns)
        return shape

    def _responses(self, record: dict, where: Comparison) -> list[tuple[dict, Shape, dict]]:
        """Returns (record, its shape, its rank) of each of several responses, or of the better one with the other."""
        record = record | {name: inside(record[name]) for name in [where.prompt] if name}
        shape, label = Shape(where.prompt, context=where.prompt in EXPLAINED), " + ".join(where.needs)
        if len(where.responses) == 1:
            responses, by = of_list(record, where, self.not_used, self.reasons)
            shape, label = replace(shape, response=RESPONSES[0]), label + f" by {by}" * (by not in ("", *where.by))
            parts = [(record | {shape.response: text}, shape, rank) for text, rank in responses]
        else:
            two = of_two(record, where)
            self.reasons[TIE] += not two
            record = with_chats(record, where)
            parts = [(record, replace(shape, response=one, rejected=other), {}) for one, other in filter(None, [two])]
        self.shapes[label] += 1
        return parts

    def _no_shape(self, keys: list[str], names: tuple[str, ...]) -> Unusable:
        """Says what a record lacks of the shape that it comes closest to, or else what is known and what it has."""
        lacks = {shape: [name for name in shape.needs if name not in names] for shape in self.columns.shapes}
        lacks = {shape: missing for shape, missing in lacks.items() if len(missing) < len(shape.needs)}
        listed = ", ".join(keys[:20]) + ", …" * (len(keys) > 20)
        if lacks:
            closest = min(lacks, key=lambda shape: (len(lacks[shape]), -self.shapes[" + ".join(shape.needs)]))
            alone = next((name for name in names if any(name in two for two in TWO)), "")
            missing = f"the response to compare {alone} with" if alone else lacks[closest][0]
            cure = "" if self.shapes else _columns_to_name(closest, missing, listed, names)
            return Unusable("columns that are missing", f"{missing} is missing{cure}")
        return Unusable(
            NO_SHAPE,
            f"no known shape fits: its keys are {listed}. Known are: {known_shapes()}. Name others with prompt_column "
            f"and response_column{renaming(names)}",
        )

    def _before(self, record: dict, shape: Shape, system: str) -> list[Turn | Unusable]:
        """Returns the turns before the record's prompt: its system text and its history, none of them in the loss."""
        turns: list[Turn | Unusable] = []
        if is_given(record.get(system)):
            turns.append(Turn("system", text_of(record[system]) or _text(record, system)))
        if not shape.chat and shape.prompt != HISTORY and is_given(record.get(HISTORY)):
            turns += _masked(turns_of(record[HISTORY], HISTORY, self.not_used))
        return turns

    def _pairs(self, record: dict, shape: Shape, before: list) -> tuple[list[dict], list[Unusable]]:
        if shape.chat:
            turns = dialogue_of(record[shape.chat]) or turns_of(record[shape.chat], shape.chat, self.not_used)
            return pairs_of([*before, *turns])
        if shape.prompt and shape.rejected:
            record = record | {shape.prompt: inside(record[shape.prompt])}
        record = record | {name: as_turns(record[name], name) for name in shape.needs}
        if shape.rejected:
            return self._preferred(record, shape, before)
        if turns := _in_template(record[shape.prompt], record[shape.response]):
            return pairs_of([*before, *_masked(turns[:-1]), turns[-1]])
        return pairs_of([*before, *self._prompt(record, shape), *self._response(record, shape.response)])

    def _prompt(self, record: dict, shape: Shape) -> list[Turn | Unusable]:
        value = record[shape.prompt]
        if type(value) is list and not all_of(str, value):
            return _masked(turns_of(value, shape.prompt, self.not_used))
        prompt = _text(record, shape.prompt)
        context = [_text(record, name) for name in CONTEXT if shape.context and is_given(record.get(name))]
        context = [text for text in context if text.strip() not in prompt]  # which may hold it already
        *turns, last = asked(prompt)
        return [*turns, last._replace(content=BETWEEN.join([last.content, *context]))]

    def _response(self, record: dict, name: str) -> list[Turn | Unusable]:
        if type(record[name]) is list and not all_of(str, record[name]):
            return turns_of(record[name], name, self.not_used)
        return [Turn("assistant", _text(record, name))]

    def _preferred(self, record: dict, shape: Shape, before: list) -> tuple[list[dict], list[Unusable]]:
        """Returns the pair of the chosen response, with the rejected one where both answer the same."""
        turns = self._up_to(record, shape, shape.response)
        of_chat = type(record[shape.response]) is list and type(record[shape.rejected]) is str
        others = [*turns[:-1], *self._response(record, shape.rejected)] if of_chat else None
        chosen, faults = pairs_of([*before, *turns])
        rejected, _ = pairs_of([*before, *(others or self._up_to(record, shape, shape.rejected))])
        if not chosen:
            return [], faults
        pair, other = chosen[-1], rejected[-1] if rejected else {"response": ""}
        if other["response"] in ("", pair["response"]):
            self.reasons["no preference pair: chosen and rejected are alike, or one is empty"] += 1
        elif _scored_alike(record):
            self.reasons["no preference pair: score_chosen is not above score_rejected"] += 1
        elif pair != other | {"response": pair["response"]}:
            self.reasons["no preference pair: chosen and rejected answer different prompts"] += 1
        else:
            pair["rejected"] = other["response"]
        return [pair], faults

    def _up_to(self, record: dict, shape: Shape, name: str) -> list[Turn | Unusable]:
        """Returns the turns up to a chosen or rejected response; only the last one is in the loss."""
        value, prompt = record[name], record.get(shape.prompt)
        whole = re.match(r"\s*Human:", value) if type(value) is str else None
        transcript = value if whole else f"{prompt or ''}{value}"
        turns = (type(value) is str and answered(transcript)) or opened(prompt, value)
        if not turns and type(value) is str and not shape.prompt:
            raise Unusable("no prompt", f"{name} has no prompt: no such column, nor Human: and Assistant: in the text")
        if not turns:
            turns = self._response(record, name)
            whole = type(value) is list and bool(turns) and getattr(turns[0], "role", "") != "assistant"
            if prompt is not None and not whole:
                turns = [*self._prompt(record, shape), *turns]
        return [*_masked(turns[:-1]), *turns[-1:]]


def _in_template(prompt: Any, response: Any) -> list[Turn | Unusable]:
    """Returns the turns of a prompt that was written by a template, as HH-RLHF's, and its response; [] of others."""
    is_dialogue = type(prompt) is type(response) is str and prompt.rstrip().endswith("Assistant:")
    return (is_dialogue and answered(prompt + response)) or opened(prompt, response)


def _columns_to_name(shape: Shape, missing: str, listed: str, names: tuple[str, ...]) -> str:
    """Says which parameter names the column that a first record seems to lack; "" where it holds no other."""
    parameter = {shape.prompt: "prompt_column", shape.response: "response_column"}.get(missing)
    if not parameter or shape.rejected or not {*names} - {*shape.needs}:
        return ""
    return f": the record has {listed}. Set {parameter} to the one that holds it{renaming(names)}"


def _is_one_text(value: Any) -> bool:
    """Whether a dialogue is written as one text, as one to be summed up is, and not as a list of turns."""
    return is_text(value) and not value.lstrip().startswith(("[", "{"))


def _is_in_prompt(record: dict, shape: Shape) -> bool:
    """Whether a record's `prompt` holds all of it: the response ends it, and instruction or question is beside it."""
    if shape.prompt != PROMPTS[0] or shape.rejected:
        return False
    said, prompt = record[shape.response], record[shape.prompt]
    said = said.strip() if is_text(said) else ""
    beside = any(is_text(record.get(name)) and record[name] for name in PROMPTS[1:3])
    if not beside or not said or not is_text(prompt) or said not in prompt:
        return False
    before, _, after = prompt.rpartition(said)
    return len(after.strip()) <= SHORT and (len(said) >= SHORT or HEADED.search(before[-SHORT:]) is not None)


def _scored_alike(record: dict) -> bool:
    """Whether scores stand beside both responses, and the chosen one's is not the higher one."""
    scores = [as_number(record.get(name)) for name in SCORES]
    return all(type(score) in (int, float) for score in scores) and scores[0] <= scores[1]


def _masked(turns: list[Turn | Unusable]) -> list[Turn | Unusable]:
    return [turn._replace(in_loss=False) if isinstance(turn, Turn) else turn for turn in turns]


def _text(record: dict, name: str) -> str:
    """Returns a text, which may be the only one of a list."""
    value = record[name]
    value = value[0] if type(value) is list and len(value) == 1 else value
    if not is_text(value):
        raise Unusable("values that are no text", f"{name} is {excerpt(record[name])}, expected a text")
    return value

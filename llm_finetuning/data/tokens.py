"""Counts the tokens of pairs as training encodes them; each distinct text is tokenised once.

A conversation is counted in parts: the turns of its history (a user message with its answer), and the prompt, open
or with its response. Where a chat template ends every turn at a special token, the parts' counts add up to those of
the whole, so a chat of n turns costs n parts. This is tried out on each template; where it does not hold, whole
conversations are encoded.
"""

import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from llm_finetuning import prompts
from llm_finetuning.prompts import Template

BATCH, PARTS = 2000, 2000
"""Texts that are tokenised in one call; parts that are rendered in one go."""
OPENING = re.compile(r"\W{0,40}\w?")
MIDDLE = object()
"""Stands in place of the system message for a part that other turns come before."""
TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
Part = tuple[object, tuple[str, ...], bool]
"""(system message, None or MIDDLE; the texts of a user message and its answer, if any; whether turns follow)."""


def _probe(turns: int, system: str = "") -> dict:
    """A pair with texts that templates and tokenizers are known to treat in their own ways."""
    texts = ["two words ", "<think>\nwhy\n</think>\n\n<b> 12", "\n x", " 日本語", "", "'s <|endoftext|></s>"]
    turn = [{"role": ("user", "assistant")[n % 2], "content": texts[n % len(texts)]} for n in range(2 * turns)]
    history = [{"role": "system", "content": system}] * bool(system) + turn
    return {"prompt": texts[turns % len(texts)], "response": f"{texts[-turns]}.", "history": history}


PROBES = [_probe(turns, system) for turns in range(6) for system in ("", "Be brief.")]


@dataclass
class TokenCounter:
    """Counts tokens of pairs with a template, and remembers the count of every part it has met."""

    template: Template
    parts: dict[Part, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    wholes: dict[tuple, dict] = field(default_factory=dict)
    openings: set[str] = field(default_factory=set)
    """What responses begin with, up to their first letter, as far as it is known to leave the prompt's tokens alone."""
    melting: set[str] = field(default_factory=set)
    """Those among them whose tokens change where the response stands alone."""
    opens: dict[Part, list[tuple[bool, str]]] = field(default_factory=dict)
    before: int = 0
    """Pieces that TURN takes up at the start of a conversation."""
    after: int = 0
    """Pieces that an open prompt takes up behind it."""
    adds_up: bool = False
    """Whether the parts' counts add up to those of whole conversations."""

    def __post_init__(self) -> None:
        probes = [[*TURN, {"role": "user", "content": text}] for text in ("c", "d")]
        one, other = prompts.text_pieces(probes, self.template, True)
        self.before = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
        self.after = len(one) - self.before
        self.adds_up = all(map(self._matches, PROBES))

    def _matches(self, probe: dict) -> bool:
        """Whether parts give what the whole conversation gives; one that the template refuses says nothing."""
        try:
            whole = prompts.lengths([probe], self.template)
        except ValueError:
            return True
        try:
            return self._by_parts([probe]) == whole
        except ValueError:
            return False

    def lengths(self, pairs: list[dict]) -> list[dict]:
        """Returns what `prompts.lengths` does."""
        if self.adds_up:
            return self._by_parts(pairs)
        keys = [(p["prompt"], p["response"], *(turn["content"] for turn in p.get("history") or ())) for p in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.wholes}
        self.wholes.update(zip(new, prompts.lengths(list(new.values()), self.template), strict=True))
        return [self.wholes[key] for key in keys]

    def truncate(self, pairs: list[dict], max_length: int, lengths: list[dict] | None = None) -> list[dict | None]:
        """Cuts the oldest turns of pairs as `prompts.truncate_histories` does; None for one that stays too long.

        lengths: those of the pairs, where they are known.
        """
        totals = [length["total"] for length in lengths or self.lengths(pairs)]
        places = [place for place, total in enumerate(totals) if total > max_length]
        long = [pairs[place] for place in places]
        if self.adds_up:
            shortened = self._cut(long, max_length)
        else:
            cut = prompts.truncate_histories(long, self.template, max_length)
            shortened = [one.pair if one.example else None for one in cut]
        found = dict(zip(places, shortened, strict=True))
        return [found.get(place, pair) for place, pair in enumerate(pairs)]

    def _check_openings(self, pairs: list[dict]) -> None:
        """Finds how responses may be counted apart from their prompts, by their first letters.

        Raises ValueError, as `prompts.encode` does, where a response's first tokens melt into the prompt's.
        """
        new = sorted({OPENING.match(pair["response"])[0] for pair in pairs} - self.openings)
        examples = prompts.encode_all([{"prompt": "a", "response": opening} for opening in new], self.template)
        self.openings.update(new)
        parts: list[Part] = [(None, ("a", opening), False) for opening in new]
        for opening, pieces, example in zip(new, self._pieces(parts).values(), examples, strict=True):
            texts = [text for special, text in pieces if not special]
            number = sum(self._sizes(texts)) + len(pieces) - len(texts)
            if number != len(example["input_ids"]):
                self.melting.add(opening)

    def _by_parts(self, pairs: list[dict]) -> list[dict]:
        self._check_openings(pairs)
        split = [_split(pair) for pair in pairs]
        keys = [_keys(system, turns, pair) for pair, (system, turns) in zip(pairs, split, strict=True)]
        self._count(part for history, *others in keys for part in (*history, *others))
        count, rows = self.parts, []
        for history, asked, closed, bare in keys:
            before, alone = sum([count[part] for part in history]), count[bare]
            with_history, total = before + count[asked], before + count[closed]
            rows.append(
                {
                    "prompt": alone,
                    "history": with_history - alone,
                    "response": total - with_history,
                    "total": total,
                }
            )
        return rows

    def _cut(self, pairs: list[dict], max_length: int) -> list[dict | None]:
        """Finds for each pair the longest rest of its history that fits, all pairs a step at a time."""
        waiting = {place: self._first_try(pair, max_length) for place, pair in enumerate(pairs)}
        done: dict[int, dict | None] = {}
        while waiting:
            tried = {
                place: pairs[place] | {"history": prompts.without_oldest_turns(pairs[place].get("history") or [], n)}
                for place, n in waiting.items()
            }
            lengths = self._by_parts(list(tried.values()))
            for (place, pair), length in zip(tried.items(), lengths, strict=True):
                if length["total"] <= max_length:
                    done[place] = pair
                elif not pair["history"]:
                    done[place] = None
            waiting = {place: number + 1 for place, number in waiting.items() if place not in done}
        return [done[place] for place in range(len(pairs))]

    def _first_try(self, pair: dict, max_length: int) -> int:
        """Returns the fewest turns to cut after which the turns behind the first that stays could fit."""
        _, turns = _split(pair)
        room, left = max_length, len(turns)
        while left > 1 and (room := room - self.parts[MIDDLE, turns[left - 1], True]) >= 0:
            left -= 1
        return max(left - 1, 1 if turns else 0)

    def _count(self, parts: Iterable[Part]) -> None:
        """Counts the parts that are new. While some are tokenised, the next ones are rendered in their process."""
        new = [part for part in dict.fromkeys(parts) if part not in self.parts]
        waiting: list[Future] = []
        with ThreadPoolExecutor(1, "token counts") as beside:
            for start in range(0, len(new), PARTS):
                pieces = self._pieces(new[start : start + PARTS])
                waiting.append(beside.submit(self._count_pieces, pieces))
        for counted in waiting:
            counted.result()

    def _count_pieces(self, rendered: dict[Part, list[tuple[bool, str]]]) -> None:
        """Counts parts by their pieces, with one call of the tokenizer for every BATCH of new texts."""
        texts = {text for pieces in rendered.values() for special, text in pieces if not special} - self.texts.keys()
        texts = sorted(texts, key=len)  # those of one call are about equally long
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            self.texts.update(zip(batch, self._sizes(batch), strict=True))
        for part, pieces in rendered.items():
            self.parts[part] = sum([1 if special else self.texts[text] for special, text in pieces])

    def _sizes(self, texts: list[str]) -> list[int]:
        """The number of tokens of each text; tokenizers in Rust are asked for that alone, without letters' places."""
        tokenizer = self.template.tokenizer
        if not tokenizer.is_fast:
            plain = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
            return list(map(len, plain.input_ids))
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # they stay text, as `split_special_tokens` says it
        return list(map(len, backend.encode_batch_fast(texts, add_special_tokens=False)))

    def _render_open(self, parts: Iterable[Part]) -> None:
        """Renders the prompts that wait for their responses, with the turn before them where they have one."""
        new = [part for part in dict.fromkeys(parts) if part not in self.opens]
        self.opens.update(zip(new, self._rendered(new, True), strict=True))

    def _rendered(self, parts: list[Part], opened: bool) -> list[list[tuple[bool, str]]]:
        """The pieces of parts with other turns around them where they have some, in one go."""
        return prompts.text_pieces([_messages(part) for part in parts], self.template, opened)

    def _pieces(self, parts: list[Part]) -> dict[Part, list[tuple[bool, str]]]:
        """The pieces of each part; the text of a response is a piece of its own where its tokens are the same there."""
        asked = {part: (part[0], part[1][:1], False) for part in parts}
        self._render_open(asked.values())
        found = {}
        for followed in (False, True):
            closed = [part for part in parts if len(part[1]) > 1 and part[2] is followed]
            found.update(zip(closed, self._rendered(closed, followed), strict=True))
        return {part: self._own(part, self.opens[asked[part]], found.get(part)) for part in parts}

    def _own(self, part: Part, asked: list[tuple[bool, str]], pieces: list[tuple[bool, str]] | None) -> list:
        """What belongs to a part alone of the pieces that were rendered of it, open (`asked`) and with its response."""
        system, texts, followed = part
        before = self.before if system is MIDDLE else 0
        if pieces is None:
            return asked[before:]
        pieces = pieces[: -self.after] if followed else self._up_to_stop(pieces, len(asked))
        return self._apart(pieces, asked, texts[1])[before:]

    def _apart(self, pieces: list[tuple[bool, str]], asked: list[tuple[bool, str]], response: str) -> list:
        """The pieces with the text of the response apart from that of the prompt."""
        (special, opened), last, opening = asked[-1], len(asked) - 1, OPENING.match(response)[0]
        whole = pieces[last][1] if last < len(pieces) else ""
        alone = opening in self.openings and opening not in self.melting
        if special or not alone or not whole.startswith(opened) or whole == opened:
            return pieces
        return [*pieces[:last], (False, opened), (False, whole[len(opened) :]), *pieces[last + 1 :]]

    def _up_to_stop(self, pieces: list[tuple[bool, str]], asked: int) -> list[tuple[bool, str]]:
        """The pieces up to the last token that ends an answer, which is added where the template writes none."""
        to_id, stops = self.template.tokenizer.convert_tokens_to_ids, self.template.stop_token_ids
        for end in range(len(pieces), asked, -1):
            special, text = pieces[end - 1]
            if special and to_id(text) in stops:
                return pieces[:end]
        return [*pieces, (True, self.template.tokenizer.eos_token)]


def _messages(part: Part) -> list[dict]:
    """The conversation in which a part is rendered."""
    system, texts, followed = part
    start = TURN if system is MIDDLE else [] if system is None else [{"role": "system", "content": system}]
    own = zip(("user", "assistant"), texts, strict=False)
    return [*start, *({"role": role, "content": text} for role, text in own), *TURN[: int(followed)]]


def _split(pair: dict) -> tuple[str | None, list[tuple[str, str]]]:
    """Returns (the history's system message or None, its turns as (user message, answer))."""
    history = pair.get("history") or []
    system = history[0]["content"] if history and history[0]["role"] == "system" else None
    turns = history[system is not None :]
    users, answers = turns[::2], turns[1::2]
    if (
        len(users) != len(answers)
        or any(t["role"] != "user" for t in users)
        or any(t["role"] != "assistant" for t in answers)
    ):
        prompts.check_messages(prompts.conversation(pair))
    return system, [(user["content"], answer["content"]) for user, answer in zip(users, answers, strict=True)]


def _keys(system: str | None, turns: list[tuple[str, str]], pair: dict) -> tuple[list[Part], Part, Part, Part]:
    """Returns (the parts of the history, the open prompt, the prompt with its response, the prompt without history)."""
    start = MIDDLE if turns else system
    history: list[Part] = [(MIDDLE, turn, True) for turn in turns]
    if turns:
        history[0] = (system, turns[0], True)
    prompt, response = pair["prompt"], pair["response"]
    return history, (start, (prompt,), False), (start, (prompt, response), False), (None, (prompt,), False)

"""Records that hold several responses to one prompt, and what says which of them is better."""

import re
from collections import Counter
from typing import Any, NamedTuple

from llm_finetuning.data.reading import all_of, as_number, excerpt, literal
from llm_finetuning.data.turns import Unusable, as_list, is_given, with_canonical_names

STEMS = ("response", "answer", "output", "completion", "generation", "conversation", "human_ref", "summary", "text")
ENDS = (("a", "b"), ("0", "1"), ("1", "2"))
TWO = tuple((f"{stem}{line}{a}", f"{stem}{line}{b}") for stem in STEMS for line in ("_", "", " ") for a, b in ENDS)
"""Names of two columns of responses."""
LISTS = ("completions", "answers", "responses", "generations", "candidates", "outputs", "responses_and_scores")
"""Columns that hold a list of responses, each a text or an object with one of TEXTS."""
TEXTS = ("response", "answer", "text", "completion", "content", "output", "generation")
NAMING = ("winner", "better_response_id", "preference", "preferred", "better", "best", "chosen", "choice", "vote")
"""Columns that name the better of two by the end of its column's name: A, model_a, response_a, 0 of 0 and 1."""
SIGNED = ("preference_strength", "overall_preference")
"""Columns that are negative where the first of two is better, and positive where the second is (HelpSteer)."""
SCORES = ("overall_score", "fine-grained_score", "score", "rating", "reward", "pm_score")
SCORE_LISTS = ("ratings", "rating", "scores", "score", "rewards", "ranks", "rank")
RANKS = ("rank", "ranks")
"""Where 1 is better than 2; of everything else more is better."""
EVEN = {"tie", "tie (bothbad)", "both_bad", "bothbad", "both bad", "both", "neither", "equal", "same", "draw"}
NAMED = re.compile(rf"(?:(?:{'|'.join((*STEMS, 'model', 'assistant', 'option'))})[_ ]?)?([ab012])")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
LABEL, LABELS = "label", ("label", "kto_tag")
"""Columns of a thumb up or down, as in KTO's data."""
VOTE = {"prompt", "history", "models", "answers", "choice"}
INSIDE = ("messages", "full_text", "post", "article")
"""Where the prompt is in a column that holds more than it: OpenAI's `input`, WebGPT's `question`, TL;DR's `info`."""
MOST = 1e300
NO_VERDICT = "responses of which nothing says which is better"
EXPORT = "Export them as prompt, chosen and rejected, or each as prompt, response and rank (0 = best)"


class Comparison(NamedTuple):
    """Where a record holds responses: in two columns, or a list in one. by: columns that compare them, () = none."""

    prompt: str
    responses: tuple[str, ...]
    by: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that make it this layout."""
        return tuple(filter(None, (self.prompt, *self.responses, *self.by)))


def comparison_of(names: tuple[str, ...], prompts: tuple[str, ...]) -> Comparison | None:
    """Returns where among these names several responses stand; the first of `prompts` that is there is the prompt."""
    prompt = next((name for name in prompts if name in names), "")
    if two := next((two for two in TWO if set(two) <= set(names)), None):
        a, b = (name[-1] for name in two)
        told = [*NAMING, *SIGNED * (a == "1"), *("labels", "label") * two[0].startswith("human_ref")]
        scored = [(f"{score}_{a}", f"{score}_{b}") for score in ("winner_model", *SCORES)]
        columns = [*((name,) for name in told), *scored, tuple(f"{name}_score" for name in two)]
        return Comparison(prompt, two, next((by for by in columns if set(by) <= set(names)), ()))
    several = next((name for name in LISTS if name in names), "")
    by = next(((name,) for name in SCORE_LISTS if name in names), ())
    return Comparison(prompt, (several,), by) if prompt and several else None


def of_two(record: dict, where: Comparison) -> tuple[str, ...]:
    """Returns (the better column, the other); () for a tie. Raises Unusable where nothing tells them apart."""
    both, by = " and ".join(where.responses), " and ".join(where.by)
    if not by:
        raise _no_verdict(f"{both} are there, but no column says which is better")
    scores = [as_score(record.get(name)) for name in where.by]
    one, other = scores if len(scores) == 2 else _told(record.get(by), scores[0], where)
    if one is None or other is None:
        held = ", ".join(excerpt(record.get(name)) for name in where.by)
        raise _no_verdict(f"{by}: {held}, which says of neither of {both} that it is better")
    return () if one == other else where.responses[:: 1 if one > other else -1]


def _told(value: Any, number: float | None, where: Comparison) -> list:
    """Returns scores of two responses by the one column that compares them; [None, None] if it does not."""
    text = str(as_number(value)).strip(" []").casefold()
    if text in EVEN:
        return [0, 0]
    if where.by[0] in SIGNED:
        return [number and -number, number]
    if where.responses[0].startswith("human_ref") and number in (0, 1):
        return [number, 1 - number]  # SHP: 1 = the first
    named = NAMED.fullmatch(text)
    better = [bool(named) and named[1] == name[-1] for name in where.responses]
    return better if any(better) else [None, None]


def of_list(record: dict, where: Comparison, not_used: Counter, reasons: Counter) -> tuple[list[tuple], str]:
    """Returns ([(response, {"rank": from 0 = best}, {} without a score)], what ranked them); counts what is missing."""
    (name,) = where.responses
    objects = [
        with_canonical_names(entry) if type(entry) is dict else {"text": entry}
        for entry in as_list(record[name], name, "responses")
    ]
    key = next((key for key in TEXTS if any(is_given(each.get(key)) for each in objects)), "text")
    if not objects:
        raise _no_verdict(f"{name} is empty")
    columns = {by: [as_score(each.get(by)) for each in objects] for by in (*RANKS, *SCORES)}
    columns["annotations"] = [_mean_rating(each.get("annotations")) for each in objects]
    if where.by:
        columns = {name: [as_score(value) for value in as_list(record[name], name, "scores")] for name in where.by}
    by, scores = next((each for each in columns.items() if any(score is not None for score in each[1])), ("", []))
    alike = len({str(each.get(key)) for each in objects}) == 1  # as SQuAD's, by several people
    if not by and alike:
        objects = objects[:1]
    if len(scores) != len(objects) > 1:
        numbers = f"{by} {len(scores)} scores" if by else "nothing that ranks them"
        raise _no_verdict(f"{name} holds {len(objects)} responses, and {numbers}")
    not_used.update({f"{name}.{n}" for each in objects for n in each if is_given(each[n]) and n not in (key, by)})
    best_first = sorted({score for score in scores if score is not None}, reverse=by not in RANKS)
    ranks = [{} if score is None else {"rank": best_first.index(score)} for score in scores] or [{}]
    given = [(each[key], rank) for each, rank in zip(objects, ranks, strict=False) if is_given(each.get(key))]
    reasons["empty responses among several"] += len(objects) - len(given)
    reasons["responses without a score among several"] += sum(not rank for _, rank in given) * bool(by)
    return given, by


def _no_verdict(found: str) -> Unusable:
    return Unusable(NO_VERDICT, f"{found}. {EXPORT}")


def as_score(value: Any) -> float | None:
    """Returns the number that a value, also a text, stands for; None if it is none."""
    words = {"true": 1, "false": 0}
    number = as_number(words.get(value.strip().casefold(), value) if type(value) is str else value)
    return number if type(number) in (int, float) and -MOST < number < MOST else None


def _mean_rating(annotations: Any) -> float | None:
    """The mean of UltraFeedback's ratings of a response, one by aspect; None without any."""
    aspects = literal(annotations)
    values = aspects.values() if type(aspects) is dict else ()
    parts = [part[0] if type(part) is list and part else part for part in values]
    ratings = [as_score(part.get("Rating")) for part in parts if type(part) is dict]
    ratings = [rating for rating in ratings if rating is not None]
    return sum(ratings) / len(ratings) if ratings else None


def with_chats(record: dict, where: Comparison) -> dict:
    """Returns the record with whole conversations where its prompts and responses are lists, a text for each turn."""
    texts = [record.get(name) for name in (where.prompt, *where.responses)]
    lists = [literal(text) if type(text) is str and text.lstrip().startswith("[") else text for text in texts]
    if not all(type(each) is list and all_of(str, [text or "" for text in each]) for each in lists):
        return record
    if len(set(map(len, lists))) > 1:
        raise _no_verdict(f"{where.prompt} and {' and '.join(where.responses)} hold different numbers of turns")
    chats = [[text or "" for two in zip(lists[0], each, strict=True) for text in two] for each in lists[1:]]
    roles = ("user", "assistant")
    turns = [[{"role": roles[n % 2], "content": text} for n, text in enumerate(chat)] for chat in chats]
    return record | dict(zip(where.responses, turns, strict=True))


def canonical_record(record: dict) -> dict:
    """Returns the record with canonical names, and TL;DR's list of two summaries as two columns."""
    record = with_canonical_names(record)
    two = record.get("summaries")
    if type(two) is list and len(two) == 2 and all_of(dict, two):
        record |= {f"summary_{n}": summary.get("text") for n, summary in enumerate(record.pop("summaries"))}
    return record


def inside(value: Any) -> Any:
    """Returns the prompt in an object that holds more than it, also one that is written as a text."""
    read = literal(value) if type(value) is str and value.lstrip().startswith("{") else value
    return next((read[name] for name in INSIDE if is_given(read.get(name))), value) if type(read) is dict else value


def renaming(names: tuple[str, ...]) -> str:
    """Says how two columns that differ in a last a and b, 0 and 1, or 1 and 2 alone become two responses."""
    alike = ((a, b) for a in names for b in names if a[:-1] == b[:-1] != "" and (a[-1:], b[-1:]) in ENDS)
    said = "; to compare {} and {}, name them response_a and response_b, and winner what says which is better"
    return next((said.format(*two) for two in alike), "")


def differ(chosen: str, rejected: str) -> bool:
    """Whether two responses can be a preference: none is blank, and more than the blanks around them differs."""
    return "" != chosen.strip() != rejected.strip() != ""


def of_vote(vote: dict) -> dict | None:
    """The preference record of a blind vote; None for one that is for neither answer, or whose answers are alike."""
    if vote["choice"] not in ("left", "right"):
        return None
    chosen, rejected = vote["answers"] if vote["choice"] == "left" else vote["answers"][::-1]
    if not differ(chosen, rejected):
        return None
    return {"prompt": vote["prompt"], "history": vote["history"], "chosen": chosen, "rejected": rejected}


def is_vote(record: dict) -> bool:
    """Whether a record is one of the file of votes that the page and the notebook write."""
    answers = record.get("answers")
    return record.keys() >= VOTE and type(answers) is list and len(answers) == 2 and all_of(str, answers)


def _thumb(record: dict, name: str) -> dict:
    """Returns what a thumb up (True) or down (False) says of a response, as in KTO's data; {} for any other label.

    1 and 0 are thumbs in `kto_tag`; as a label they are mostly classes.
    """
    label = record.get(name)
    label = {"true": True, "false": False}.get(label.strip().casefold(), label) if type(label) is str else label
    if type(label) is not bool and name != LABEL:
        number = as_number(label)
        label = number == 1 if type(number) is int and number in (0, 1) else None
    return {"rank": 1 - label, "liked": label} if type(label) is bool else {}


def opinion(record: dict) -> tuple[dict, tuple[str, ...]]:
    """Returns (the rank that a response gets by a thumb, or by its helpfulness of 0 to 4 in HelpSteer; its column)."""
    for name in LABELS:
        if thumb := _thumb(record, name):
            return thumb, (name,)
    if HELPSTEER[0] in record and record.keys() >= set(HELPSTEER):
        helpful = as_number(record[HELPSTEER[0]])
        return ({"rank": 4 - helpful}, HELPSTEER[:1]) if helpful in range(5) else ({}, ())
    return {}, ()


def rated_chat(pairs: list[dict], said: dict, is_whole: bool) -> list[dict]:
    """Returns a chat's pairs, the last one with what people said of it, without a rank where turns were left out.

    Of a chat that people disliked the earlier turns are only history, as the turns of a prompt are.
    """
    said = said if is_whole else {name: said[name] for name in said if name == "liked"}
    earlier = pairs[:-1] if said.get("liked", True) else []
    return [*earlier, *(pair | said for pair in pairs[-1:])]

"""The turns of a conversation in the forms in which people keep them, and the pairs that they give."""

import re
from collections import Counter
from functools import lru_cache
from itertools import cycle
from typing import Any, NamedTuple

from llm_finetuning.data.reading import all_of, excerpt, is_text, literal

ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human", "prompter", "customer"), "user")
ROLES |= dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "chatbot", "bot", "agent", "model", "ai", "bing", "bard"), "assistant"
)
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation"}
WEIGHTS = ("weight", "train", "training")
"""Keys of a turn that say whether it is in the loss: OpenAI's, axolotl's."""
TOOL_KEYS = ("tool_calls", "function_call")
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "parts", "message")
EXCHANGES = (("input", "output"), ("prompt", "response"), ("human", "assistant"), ("user", "assistant"))
"""Keys of a user's and an assistant's text where one entry of a list holds both."""
PLAIN_KEYS = {names: pair for pair in (("role", "content"), ("from", "value")) for names in (pair, pair[::-1])}
BEGINS_WITH_A_TURN = re.compile(r"\s*\[?\s*\{\s*['\"]")
PARTNERS = dict([*PLAIN_KEYS])
FIRST_KEY = re.compile(r"\s*\[\s*\{\s*(['\"])(role|content|from|value)\1\s*:")
BETWEEN = "\n\n"
"""Stands between texts that become one: two turns in a row, an instruction and its input."""


class Unusable(ValueError):
    """What cannot become part of a pair: `reason` is the kind, by which it is counted; the text says where it is."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Turn(NamedTuple):
    """One turn; `in_loss` = an assistant's text becomes a response, and not only history."""

    role: str
    content: str
    in_loss: bool = True


@lru_cache(4096)
def canonical(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names without blanks around and in lower case; one that would then stand twice stays as it is."""
    plain = [str(name).strip().casefold() for name in names]
    return tuple(
        low if low not in plain[:at] and (low == name or low not in names) else name
        for at, (name, low) in enumerate(zip(names, plain, strict=True))
    )


def with_canonical_names(record: dict) -> dict:
    """Returns the record with `canonical` names."""
    return dict(zip(canonical(tuple(record)), record.values(), strict=True))


def is_given(value: Any) -> bool:
    """Whether a value is there: not null, not NaN, not empty."""
    return value is not None and value == value and value != "" and value != [] and value != {}


def turns_of(value: Any, name: str, not_used: Counter) -> list["Turn | Unusable"]:
    """Returns the turns of a list in any known form; one that is no turn of text is the Unusable that says why.

    Forms: role and content, from and value, speaker and text, texts by user and assistant in turn, pairs of such texts,
    input and output; the list may be written as JSON or as Python, and lie in a struct of columns. `not_used` counts
    keys that have no use.
    """
    turns = as_list(value, name)
    if turns and all(type(turn) in (list, tuple) and len(turn) == 2 for turn in turns):
        turns = [text for pair in turns for text in pair]
    if turns and all_of(dict, turns):
        both = next((names for names in EXCHANGES if all(turn.keys() >= set(names) for turn in turns)), ())
        if both:
            return _exchanges(turns, both, name, not_used)
    if turns and all_of(str, turns):
        return [Turn(role, text) for role, text in zip(cycle(("user", "assistant")), turns, strict=False)]
    return [
        _plain_turn(turn) or _turn(turn, f"turn {number} of {name}", not_used) for number, turn in enumerate(turns, 1)
    ]


def _exchanges(turns: list[dict], both: tuple[str, str], name: str, not_used: Counter) -> list["Turn | Unusable"]:
    """Returns the turns of entries that hold a user's and an assistant's text each, the first a system text too."""
    found: list[Turn | Unusable] = [Turn("system", turns[0]["system"])] if is_text(turns[0].get("system")) else []
    for number, turn in enumerate(turns, 1):
        in_loss = turn.get("output_with_loss", True) is not False  # XTuner's
        for key, role in zip(both, ("user", "assistant"), strict=True):
            lacks = Unusable("turns without a role or a text", f"{key} of entry {number} of {name} is no text")
            found.append(Turn(role, turn[key], role == "user" or in_loss) if is_text(turn[key]) else lacks)
        used = (*both, "system", "output_with_loss")
        not_used.update(key for key, value in turn.items() if key not in used and is_given(value))
    return found


def as_list(value: Any, name: str, of: str = "turns") -> list:
    """Returns a list that may be written as JSON or Python, or lie in a struct of columns; raises Unusable if none."""
    value = literal(value)
    if type(value) is dict and value and all_of(list, list(value.values())):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if type(value) is str and value.lstrip().startswith("["):
        raise _unreadable(name)
    if type(value) is not list:
        raise Unusable(f"{name} is no list of {of}", f"{name} is {type(value).__name__}, expected a list of {of}")
    return value


def as_turns(value: Any, name: str) -> Any:
    """Returns a list of turns that is written as a text, and a single turn as a list; anything else as it is.

    Raises Unusable for a text that begins as a list of turns and cannot be read: it would be taken for a response.
    """
    if is_turn(value):
        return [value]
    if not is_text(value) or not BEGINS_WITH_A_TURN.match(value):
        return value
    turns = literal(value)
    if type(turns) is dict and _plain_turn(turns):
        return [turns]
    if type(turns) is list and all_of(dict, turns) and any(map(is_turn, turns)):
        return turns
    first = FIRST_KEY.match(value) if type(turns) is str else None
    if first and (PARTNERS[first[2]] in value or not value.rstrip().endswith("]")):
        raise _unreadable(name)
    return value


def _unreadable(name: str) -> Unusable:
    found = f"{name} begins as a list, but is cut off, or neither JSON nor Python as pandas writes it into a CSV"
    return Unusable("lists that cannot be read", found)


def is_turn(value: Any) -> bool:
    """Whether a value looks like one turn of a conversation, and not like a record."""
    if type(value) is not dict or "message_id" in value:
        return False
    names = set(canonical(tuple(value)))
    return bool(names & {*ROLE_KEYS} and names & {*CONTENT_KEYS, *TOOL_KEYS})


def _plain_turn(value: Any) -> Turn | None:
    """Returns a turn of the two usual keys and nothing unusual, four times as fast as `_turn`; else None."""
    names = PLAIN_KEYS.get(tuple(value)) if type(value) is dict else None
    if names is None:
        return None
    role, content = map(value.get, names)
    role = ROLES.get(role) if type(role) is str else None
    return Turn(role, content) if role and is_text(content) else None


def _turn(value: Any, place: str, not_used: Counter) -> "Turn | Unusable":
    turn = with_canonical_names(value) if type(value) is dict else {}
    role_key = next((name for name in ROLE_KEYS if type(turn.get(name)) is str), "")
    role = turn.get(role_key, "").strip().casefold()
    if role in TOOL_ROLES or any(is_given(turn.get(name)) for name in TOOL_KEYS):
        return Unusable("tool calls", f"{place} is a tool call or its result")
    content_key = next((name for name in CONTENT_KEYS if turn.get(name) is not None), "")
    try:
        text, in_loss = text_of(turn.get(content_key)), _in_loss(*(turn.get(name) for name in WEIGHTS))
    except Unusable as fault:
        return Unusable(fault.reason, f"{place} {fault}")
    if role not in ROLES or text is None:
        other = f" ({role!r:.40} is none)" * (bool(role) and role not in ROLES)
        lacks = f"{place} lacks a role (system, user, assistant) or a text as content{other}"
        return Unusable("turns without a role or a text", lacks)
    used = {role_key, content_key, *WEIGHTS, *TOOL_KEYS}
    not_used.update(name for name, part in turn.items() if name not in used and is_given(part))
    return Turn(ROLES[role], text, in_loss)


def text_of(content: Any) -> str | None:
    """Returns the text of a turn's content, which may be a list of parts; None if it is none.

    Raises Unusable for a part that is no text, such as an image.
    """
    if type(content) is list and content:
        return "\n".join(map(_text_of_part, content))
    return content if is_text(content) else None


def _text_of_part(part: Any) -> str:
    text = part.get("text") if type(part) is dict else part
    if not is_text(text):
        kind = part.get("type") if type(part) is dict else type(part).__name__
        raise Unusable("parts that are no text", f"holds a part that is no text ({excerpt(kind)})")
    return text


def _in_loss(*weights: Any) -> bool:
    weight = next(filter(is_given, weights), True)
    if str(weight) not in ("0", "1", "0.0", "1.0", "False", "True"):
        raise Unusable("weights other than 0 and 1", f"has the weight {excerpt(weight)}, expected 0 or 1")
    return str(weight) in ("1", "1.0", "True")


def pairs_of(turns: list["Turn | Unusable"]) -> tuple[list[dict], list[Unusable]]:
    """Returns (a pair for each assistant turn in the loss, what could not be used).

    Turns in a row by one role are joined, and an assistant's before any user's is left out. What stands after a
    tool call, a turn without text or a late system turn has lost its context, and is left out too.
    """
    done, faults = _alternating(turns)
    plain = [{"role": turn.role, "content": turn.content} for turn in done]
    pairs = [
        {"prompt": done[at - 1].content, "response": turn.content, "history": plain[: at - 1]}
        for at, turn in enumerate(done)
        if turn.role == "assistant" and turn.in_loss
    ]
    if not faults and not any(turn.role == "assistant" for turn in done):
        text = f"the turns are {_roles(turns)}; expected user and assistant in turn"
        faults.append(Unusable("turns without a reply", text))
    return pairs, faults


def _alternating(turns: list["Turn | Unusable"]) -> tuple[list[Turn], list[Unusable]]:
    """Returns (an optional system turn, then user and assistant in turn; what stood in the way, each reason once)."""
    done: list[Turn] = []
    faults: dict[str, Unusable] = {}

    def fault(reason: str, number: int) -> None:
        faults.setdefault(reason, Unusable(reason, f"the turns are {_roles(turns)}; turn {number}: {reason}"))

    for number, turn in enumerate(turns, 1):
        last = done[-1].role if done else "system"
        if isinstance(turn, Unusable):
            faults.setdefault(turn.reason, turn)
            break
        if turn.role == "system" and last != "system":
            fault("a system turn after the first", number)
            break
        if turn.role == "assistant" and last == "system":
            fault("the assistant speaks first", number)
        elif done and turn.role == last:
            if last != "system":
                fault(f"two turns in a row by the {last}", number)
            elif turn.content == done[-1].content:
                continue
            done[-1] = turn._replace(content=BETWEEN.join(filter(None, (done[-1].content, turn.content))))
        else:
            done.append(turn)
    return done, list(faults.values())


def _roles(turns: list["Turn | Unusable"]) -> str:
    roles = ", ".join("?" if isinstance(turn, Unusable) else turn.role for turn in turns[:12]) or "none"
    return f"{roles}, …" if len(turns) > 12 else roles

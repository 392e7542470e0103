"""Reads the messages of any OASST export as columns, and names what makes one invalid."""

from collections.abc import Iterable, Iterator, Sequence
from sys import intern
from typing import Any

from llm_finetuning.data.forest import ROLES
from llm_finetuning.data.reading import as_number, excerpt, literal

FIELDS = (
    "message_tree_id",
    "message_id",
    "parent_id",
    "role",
    "text",
    "lang",
    "rank",
    "tree_state",
    "deleted",
    "review_result",
    "synthetic",
    "quality",
    "toxicity",
    "detoxify",
)
USED_LABELS = ("quality", "toxicity")
TEXT, SWITCH = {str, type(None)}, {bool, type(None)}
EXPECTED = dict.fromkeys(("message_id", "text", "message_tree_id"), {str})
EXPECTED |= dict.fromkeys(("parent_id", "lang", "tree_state"), TEXT)
EXPECTED |= dict.fromkeys(("deleted", "review_result", "synthetic"), SWITCH)
KINDS = {str: "a text", bool: "true or false", type(None): "null"}
READ = (*FIELDS[:-3], "labels", "detoxify")
FEW = ("message_tree_id", "message_id", "parent_id", "role", "lang", "tree_state")
"""Columns whose texts return: each is kept once."""


def columns_of(messages: Sequence[dict]) -> list[list]:
    """Returns the columns of FIELDS of flat messages; raises ValueError with the first one's fault if one has any.

    Each column is read and checked as a whole.
    """
    columns = {name: [message.get(name) for message in messages] for name in READ}
    types = {name: set(map(type, column)) for name, column in columns.items()}
    sound = types["role"] == {str} and set(columns["role"]) <= set(ROLES)
    if not sound or not all(types[name] <= wanted for name, wanted in EXPECTED.items()):
        raise ValueError(next(filter(None, map(_fault, messages))))
    if str in types["labels"] | types["detoxify"]:
        raise ValueError("labels or detoxify is a text, expected an object")
    labels, detoxify = columns.pop("labels"), columns.pop("detoxify")
    return [
        *finished(columns),
        *([label_value(of_one, name) for of_one in labels] for name in USED_LABELS),
        [number(of_one.get("toxicity")) if type(of_one) is dict else None for of_one in detoxify],
    ]


def finished(columns: dict[str, list]) -> Iterable[list]:
    """Returns the columns with each text of FEW kept once and ranks as whole numbers; raises ValueError for others."""
    columns |= {name: [value and intern(value) for value in columns[name]] for name in FEW}
    columns["rank"] = [rank if rank is None else _rank(rank) for rank in columns["rank"]]
    return columns.values()


def from_table(message: dict) -> dict:
    """Returns the message with true and false, labels and detoxify, where a table holds them as text."""
    names = ("deleted", "review_result", "synthetic")
    texts = {name: message[name].lower() for name in names if type(message.get(name)) is str}
    read = {name: text == "true" for name, text in texts.items() if text in ("true", "false")}
    return message | read | {name: literal(message[name]) for name in ("labels", "detoxify") if name in message}


def _fault(message: dict) -> str | None:
    """Names the first value of a wrong type, and what was expected; None where nothing is wrong."""
    if message.get("role") not in ROLES:
        return f"role is {excerpt(message.get('role'))}, expected 'prompter' or 'assistant'"
    for name, types in EXPECTED.items():
        if type(message.get(name)) not in types:
            wanted = " or ".join(kind for type_, kind in KINDS.items() if type_ in types)
            return f"{name} is {excerpt(message.get(name))}, expected {wanted}"
    return None


def label_value(labels: Any, name: str) -> float | None:
    """Returns the average of one label, 0 to 1, or None; reads a mapping, parallel lists, or a list of entries."""
    if type(labels) is dict and type(labels.get("name")) is list and type(labels.get("value")) is list:
        place = labels["name"].index(name) if name in labels["name"] else len(labels["value"])
        return number(labels["value"][place]) if place < len(labels["value"]) else None
    if type(labels) is list:
        labels = {str(entry.get("name")): entry for entry in labels if type(entry) is dict}
    entry = labels.get(name) if type(labels) is dict else None
    return number(entry.get("value") if type(entry) is dict else entry)


def number(value: Any) -> float | None:
    """Returns a number, or what a text stands for, as a float; None for anything else."""
    value = as_number(value) if type(value) is str else value
    return float(value) if type(value) in (int, float) and abs(value) < 1e9 else None


def _rank(value: Any) -> int | None:
    if value is None or type(value) is float and value != value:
        return None
    value = as_number(value) if type(value) is str else value
    if type(value) not in (int, float) or abs(value) > 1e9 or value != int(value):
        raise ValueError(f"rank is {excerpt(value)}, expected a whole number or null")
    return int(value)


def messages_of(record: dict) -> Iterable[dict]:
    """Returns a flat message as it is, or those of a nested tree, depth first; the nesting says who replies to whom.

    Raises ValueError, on the way, where it is neither.
    """
    if type(record.get("prompt")) is dict:
        return _of_tree(record)
    if "message_id" not in record:
        raise ValueError(
            "neither a message (message_id, role, text) nor a tree (message_tree_id, prompt with replies); "
            f"its keys are {excerpt(sorted(record))}"
        )
    return [record]


def _of_tree(record: dict) -> Iterator[dict]:
    prompt = record["prompt"]
    tree = {"message_tree_id": record.get("message_tree_id", prompt.get("message_id"))}
    tree["tree_state"] = record.get("tree_state")
    stack = [(prompt, None)]
    while stack:
        message, parent = stack.pop()
        if type(message) is not dict:
            raise ValueError(f"a reply is {excerpt(message)}, expected a message")
        if message.get("parent_id", parent) not in (None, parent):
            raise ValueError(f"parent_id is {excerpt(message['parent_id'])}, but it is nested under {parent}")
        yield message | tree | {"parent_id": parent}
        replies = message.get("replies") or []
        if type(replies) is not list:
            raise ValueError(f"replies is {excerpt(replies)}, expected a list")
        stack.extend((reply, message.get("message_id")) for reply in reversed(replies))

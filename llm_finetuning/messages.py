"""One message of any OASST export as one row: what is taken from it, and what makes it invalid."""

from collections.abc import Iterator
from pathlib import Path

from .forest import ROLES
from .reading import Problems, is_text, records

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
OPTIONAL_TYPES = {"lang": str, "tree_state": str, "deleted": bool, "review_result": bool, "synthetic": bool}


def message_row(message: dict, tree: str, parent: str | None, tree_state: str | None) -> tuple:
    """The values of FIELDS of one message; ValueError with the reason when it is not one."""
    for name in ("message_id", "text"):
        if not is_text(message.get(name)):
            raise ValueError(f"{name} is {_shown(message.get(name))}, expected a text")
    if message.get("role") not in ROLES:
        raise ValueError(f"role is {_shown(message.get('role'))}, expected 'prompter' or 'assistant'")
    for name, expected in OPTIONAL_TYPES.items():
        value = message.get(name)
        if value is not None and type(value) is not expected or expected is str and not is_text(value or ""):
            raise ValueError(f"{name} is {_shown(value)}, expected {expected.__name__} or null")
    labels, detoxify = message.get("labels"), message.get("detoxify")
    return (
        tree,
        message["message_id"],
        parent,
        message["role"],
        message["text"],
        message.get("lang"),
        _rank(message.get("rank")),
        tree_state,
        message.get("deleted"),
        message.get("review_result"),
        message.get("synthetic"),
        message["quality"] if "quality" in message else label_value(labels, "quality"),
        message["toxicity"] if "toxicity" in message else label_value(labels, "toxicity"),
        _number(detoxify.get("toxicity")) if type(detoxify) is dict else None,
    )


def label_value(labels, name: str) -> float | None:
    """The average of one label, 0 to 1, or None; from a mapping, parallel lists, or a list of entries."""
    if type(labels) is list:
        labels = {
            entry.get("name"): entry for entry in labels if type(entry) is dict and is_text(entry.get("name"))
        }
    elif type(labels) is dict and type(labels.get("name")) is list and type(labels.get("value")) is list:
        values = [
            value for label, value in zip(labels["name"], labels["value"], strict=False) if label == name
        ]
        return _number(values[0]) if values else None
    entry = labels.get(name) if type(labels) is dict else None
    return _number(entry.get("value") if type(entry) is dict else entry)


def _number(value) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e9 else None


def _rank(value) -> int | None:
    if value is None or type(value) is float and value != value:
        return None
    if type(value) not in (int, float) or abs(value) > 1e9 or value != int(value):
        raise ValueError(f"rank is {_shown(value)}, expected a whole number or null")
    return int(value)


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def rows_of_file(path: Path, problems: Problems) -> Iterator[tuple[int, tuple]]:
    """(line, row) of every message of a JSON-lines file, whose records are flat messages or nested trees."""
    for line, record in records(path, problems):
        tree = record.get("message_tree_id")
        try:
            rows = _tree_rows(record) if type(record.get("prompt")) is dict else [flat_row(record)]
        except ValueError as error:
            problems.add(line, tree if is_text(tree) else None, str(error))
            continue
        for row in rows:
            yield line, row


def flat_row(message: dict) -> tuple:
    if not is_text(message.get("message_id")):
        raise ValueError(
            "neither a message (message_id, role, text) nor a tree (message_tree_id, prompt with replies); "
            f"its keys are {_shown(sorted(message))}"
        )
    tree, parent = message.get("message_tree_id"), message.get("parent_id")
    if not is_text(tree):
        raise ValueError(f"message_tree_id is {_shown(tree)}, expected a text")
    if parent is not None and not is_text(parent):
        raise ValueError(f"parent_id is {_shown(parent)}, expected a text or null")
    return message_row(message, tree, parent, message.get("tree_state"))


def _tree_rows(record: dict) -> list[tuple]:
    """All messages of a nested tree, depth first. The nesting says who replies to whom."""
    prompt = record["prompt"]
    tree = record.get("message_tree_id", prompt.get("message_id"))
    state = record.get("tree_state")
    if not is_text(tree) or state is not None and not is_text(state):
        raise ValueError(f"message_tree_id is {_shown(tree)} and tree_state {_shown(state)}, expected texts")
    rows, stack = [], [(prompt, None)]
    while stack:
        message, parent = stack.pop()
        if type(message) is not dict:
            raise ValueError(f"a reply is {_shown(message)}, expected a message")
        if message.get("parent_id", parent) not in (None, parent):
            raise ValueError(f"parent_id is {_shown(message['parent_id'])}, but it is nested under {parent}")
        rows.append(message_row(message, tree, parent, state))
        replies = message.get("replies") or []
        if type(replies) is not list:
            raise ValueError(f"replies is {_shown(replies)}, expected a list")
        stack.extend((reply, message["message_id"]) for reply in reversed(replies))
    return rows

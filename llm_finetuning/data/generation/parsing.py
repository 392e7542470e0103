"""Reads lists and texts out of what a model wrote as JSON, or meant to."""

import ast
import json
import re
from typing import Any

import pydantic_core

THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>\s*", re.DOTALL | re.IGNORECASE)
UNOPENED = re.compile(r"\A(?:(?!<think(?:ing)?>).)*?</think(?:ing)?>\s*", re.DOTALL | re.IGNORECASE)
"""Thoughts whose opening tag stood in the prompt already, as chat templates of some models write it."""
TRAILING_COMMA = re.compile(r",(?=\s*[\]}])")
COMMENT = re.compile(r"^\s*//.*$|(?<=[,\[{])\s*//.*$", re.MULTILINE)
LIST_ITEM = re.compile(r"^\s*(?:\*\*)?(?:\d{1,3}[.):]|[-*•])(?:\*\*)?\s+(.+?)\s*$", re.MULTILINE)
START = re.compile(r"[{\[]")
MOST_STARTS = 50
"""Brackets at which JSON is looked for: a text of nothing but brackets ends too."""


def without_thoughts(text: str) -> str:
    """Removes the reasoning that some models write before their answer, and half characters, which no file takes."""
    return _sound(THOUGHTS.sub("", UNOPENED.sub("", text))).strip()


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def strings(text: str, name: str) -> list[str]:
    """Returns the texts of a list that a model wrote under `name`: as JSON, damaged JSON, or an ordinary list."""
    text = without_thoughts(text)
    for found in (_list(value, name) for value in _values(text)):
        if texts := [text for text in map(_text, found) if text]:
            return texts
    return [] if START.match(text) else [item.strip('",') for item in LIST_ITEM.findall(text)]


def string(text: str, name: str) -> str:
    """Returns the text that a model wrote under `name`, "" where there is none."""
    values = (value.get(name) for value in _values(without_thoughts(text)) if isinstance(value, dict))
    return next((_sound(value).strip() for value in values if isinstance(value, str) and value.strip()), "")


def numbers(text: str, name: str) -> list[float]:
    """Returns the numbers of a list that a model wrote under `name`, [] where there is none."""
    for found in (_list(value, name) for value in _values(without_thoughts(text))):
        values = [_number(item) for item in found]
        if values and None not in values:
            return values
    return []


def _list(value: Any, name: str) -> list:
    """Returns the list that stands in a value: it, what it has under `name`, or else the first list in it."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return []
    if isinstance(value.get(name), dict):  # numbered by its keys
        return list(value[name].values())
    inner = [value[name]] if name in value else value.values()
    return next((found for one in inner if (found := _list(one, name))), [])


def _text(item: Any) -> str:
    """Returns an item of a list as text; of an object its first text."""
    if isinstance(item, dict):
        item = next((value for value in item.values() if isinstance(value, str)), "")
    return _sound(item).strip() if isinstance(item, str) else ""


def _number(item: Any) -> float | None:
    """Returns an item of a list as a number; of an object its "score", or its last value."""
    if isinstance(item, dict) and item:
        item = item.get("score", [*item.values()][-1])
    if isinstance(item, str) and (found := re.match(r"\s*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\s*$", item)):
        return float(found[1])
    return float(item) if type(item) in (int, float) else None


def _values(text: str) -> list[Any]:
    """Returns the objects and lists that stand in a text, those that are sound before those that were repaired."""
    starts = [match.start() for match in START.finditer(text)][:MOST_STARTS]
    sound, repaired, end = [], [], 0
    for start in starts:
        if start < end:
            continue
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(text, start)
            sound.append(value)
        except (ValueError, RecursionError):
            repaired += _repair(text[start:])
    return sound + repaired


def _repair(text: str) -> list[Any]:
    """Returns what can be read of JSON with comments or trailing commas, with Python's quotes, or cut off."""
    text = TRAILING_COMMA.sub("", COMMENT.sub("", text))
    end = max(text.rfind("}"), text.rfind("]")) + 1
    for candidate, read in ((text[:end], json.loads), (text[:end], ast.literal_eval), (text, _cut)):
        try:
            return [read(candidate)]
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return []


def _cut(text: str) -> Any:
    """Reads JSON that ends too early, without the value in which it ends."""
    return pydantic_core.from_json(text, allow_partial=True)

"""Changes a few bytes, values or lines of valid files, for the readers' fuzz tests."""

import json
import random

VALUES = [None, "", 0, -1, 1e308, float("nan"), True, [], {}, [[]], "t0", "\ud800", 10**40]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Changes a few bytes, values or lines of a valid file."""
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.5:
            place = chance.randrange(len(content))
            content = content[:place] + bytes([chance.randrange(256)]) + content[place + chance.randint(0, 3) :]
        else:
            rows = content.splitlines(keepends=True) or [b""]
            record = chance.randrange(len(rows))
            rows[record] = chance.choice((changed_value, cut_line, repeated_line))(rows[record], chance)
            content = b"".join(rows)
    return content


def changed_value(line: bytes, chance: random.Random) -> bytes:
    """Replaces one value, at any depth, of a JSON line."""
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if found := places(record):
        holder, key = chance.choice(found)
        holder[key] = chance.choice(VALUES)
    return json.dumps(record).encode() + b"\n"


def places(value: object) -> list[tuple]:
    """(holder, key) of every value inside, at any depth."""
    found, stack = [], [value]
    while stack:
        value = stack.pop()
        inside = list(value.items()) if type(value) is dict else list(enumerate(value)) if type(value) is list else []
        found += [(value, key) for key, _ in inside]
        stack += [child for _, child in inside]
    return found


def cut_line(line: bytes, chance: random.Random) -> bytes:
    return line[: chance.randrange(len(line) + 1)]


def repeated_line(line: bytes, chance: random.Random) -> bytes:
    return line * 2

"""Reads JSON lines of flat messages or nested trees straight into their fields: nothing else becomes a Python object.

This is the fast way for what is sound. From the first lines on that do not fit the fields, the careful reader takes
over, which accepts more and says what is wrong.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from llm_finetuning.data.containers import DAMAGE, open_text
from llm_finetuning.data.messages import FIELDS, READ, USED_LABELS, finished

BLOCK = 1 << 20
"""Bytes that are read at once."""
Figure = Annotated[float, msgspec.Meta(gt=-1e9, lt=1e9)]


class Entry(msgspec.Struct, gc=False):
    """A label in a mapping by name."""

    value: Figure | None = None


class Labels(msgspec.Struct, gc=False):
    """Labels as parallel lists, or by name."""

    name: msgspec.Raw = msgspec.Raw()
    value: list[Figure | None] | None = None
    quality: Entry | None = None
    toxicity: Entry | None = None


@lru_cache(1024)
def _places(names: bytes) -> list[int]:
    """Returns where the used labels stand in a JSON list of names, which is the same in most messages."""
    found = msgspec.json.decode(names, type=list[str])
    return [found.index(label) if label in found else len(found) for label in USED_LABELS]


class Detoxify(msgspec.Struct, gc=False):
    """What is used of the detoxify model's figures."""

    toxicity: Figure | None = None


class Message(msgspec.Struct, gc=False):
    """A message, wherever it stands."""

    message_id: str
    role: Literal["prompter", "assistant"]
    text: str
    parent_id: str | None = None
    lang: str | None = None
    rank: int | float | None = None
    deleted: bool | None = None
    review_result: bool | None = None
    synthetic: bool | None = None
    labels: Labels | None = None
    detoxify: Detoxify | None = None


class Flat(Message, kw_only=True, gc=False):
    """A line that is a message; an object as its prompt would make it a tree."""

    message_tree_id: str
    tree_state: str | None = None
    prompt: str | int | float | list | None = None


class Node(Message, gc=False):
    """A message in a tree."""

    message_tree_id: Any = None
    tree_state: Any = None
    replies: list["Node"] | None = None


class Tree(msgspec.Struct, gc=False):
    """A line that is a tree; what it says of all its messages holds for each."""

    prompt: Node
    message_tree_id: str | msgspec.UnsetType = msgspec.UNSET
    tree_state: str | None = None


DECODERS = tuple(msgspec.json.Decoder(kind).decode for kind in (Flat, Tree))
Block = tuple[Sequence[int], list[list]]


def sound_blocks(path: Path) -> Generator[Block, None, int | None]:
    """Yields (line of each message, columns of FIELDS) of blocks of lines, up to the first that do not fit.

    Returns the last line that was read; None when that is the file's last one.
    """
    last = 0
    with open_text(path) as stream, suppress(OSError, *DAMAGE):
        while lines := stream.readlines(BLOCK):
            found = _messages(range(last + 1, last + 1 + len(lines)), lines)
            if found is None:
                return last
            yield found
            last += len(lines)
        return None
    return last


def _messages(numbers: Sequence[int], lines: list[bytes]) -> Block | None:
    """Returns the messages of lines and the line of each; None if a line is no message or tree, or not sound."""
    if any(map(bytes.isspace, lines)):
        numbers = [number for number, line in zip(numbers, lines, strict=True) if not line.isspace()]
        lines = [line for line in lines if not line.isspace()]
    if not lines:
        return (), [[] for _ in FIELDS]
    for decode in DECODERS:
        try:
            found = list(map(decode, lines))
            all(map(bytes.isascii, lines)) or b"".join(lines).decode()  # msgspec does not look at what it leaves out
            if decode is not DECODERS[0]:
                numbers, found = zip(*_of_trees(numbers, found), strict=True)
            return numbers, _columns(found)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
    return None


def _of_trees(numbers: Sequence[int], trees: list[Tree]) -> Iterator[tuple[int, Node]]:
    """Yields (line, message) depth first; raises ValueError where a message names another parent than its nesting."""
    for number, tree in zip(numbers, trees, strict=True):
        name = tree.prompt.message_id if tree.message_tree_id is msgspec.UNSET else tree.message_tree_id
        stack: list[tuple[Node, str | None]] = [(tree.prompt, None)]
        while stack:
            message, parent = stack.pop()
            if message.parent_id not in (None, parent):
                raise ValueError(f"parent_id is {message.parent_id}, but it is nested under {parent}")
            message.message_tree_id, message.tree_state, message.parent_id = name, tree.tree_state, parent
            yield number, message
            if message.replies:
                stack.extend((reply, message.message_id) for reply in reversed(message.replies))


def _columns(messages: Sequence[Flat | Node]) -> list[list]:
    values = zip(*map(msgspec.structs.astuple, messages), strict=True)
    found = dict(zip(type(messages[0]).__struct_fields__, values, strict=True))
    columns = {name: found[name] for name in READ}
    labels, detoxify = columns.pop("labels"), columns.pop("detoxify")
    used = zip(*map(_used, labels), strict=True)
    return [*finished(columns), *map(list, used), [one and one.toxicity for one in detoxify]]


def _used(labels: Labels | None) -> tuple[float | None, float | None]:
    """Returns the values of USED_LABELS, None where there is none."""
    if labels is None:
        return None, None
    values = labels.value
    if values is None:
        return labels.quality and labels.quality.value, labels.toxicity and labels.toxicity.value
    count, (quality, toxicity) = len(values), _places(bytes(labels.name))
    return values[quality] if quality < count else None, values[toxicity] if toxicity < count else None

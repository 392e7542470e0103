"""Data preparation: the original's loop against `flatten(…, "joined")`, reading against parsing, and how it grows.

    python benchmarks/data_preparation.py

The original's loop is written out from its description (trees one by one, see `original`). All sides take the same
made-up messages with the hub's fields, in turn, each turn in a process of its own: memory that another has used and
freed is slower than new. Memory is what a turn adds to the resident size.
"""

import json
import random
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import measuring
import pandas as pd

from llm_finetuning.data import oasst, pairs

PART = "data preparation"
MESSAGES = {"small": 84_000, "tiny": 400}
"""Messages of the comparison; OASST1's train split has 84,437."""
ROUNDS = {"small": 3, "tiny": 2}
TURN = {"small": 3.0, "tiny": 0.0}
"""A turn repeats its job for so many seconds: short jobs are averaged."""
GROWTH = {"small": {10_000: 5, 30_000: 3, 100_000: 2, 300_000: 1, 1_000_000: 1}, "tiny": {200: 2, 400: 2, 800: 1}}
"""Messages → repetitions of reading, flattening and writing."""
LOOP_GROWTH = {"small": {5_000: 2, 10_000: 2, 20_000: 1, 40_000: 1}, "tiny": {100: 2, 200: 2}}
"""The same for the original's loop below MESSAGES; beyond, it would take hours."""
LOOP = "the original's loop"
FLATTENING = "ours"
READING, PARSING = "reading, flattening and writing", "parsing the file's JSON lines"
SIDES = (LOOP, FLATTENING, READING, PARSING)
BLOCK = 10_000
"""Messages that are made up; a longer file repeats them under other ids."""
WORDS = [f"word{number}" for number in range(5000)]
LABELS = ["spam", "pii", "not_appropriate", "hate_speech", "humor", "creativity", "quality", "toxicity"]
FIRST = "00000000"
"""First digits of every id in the block; a repetition puts its number there."""


def write_messages(path: Path, count: int) -> Path:
    """Writes `count` random messages as flat JSON lines with the Hub's fields: 8.4 a tree, 600 characters each."""
    block = random_messages(min(count, BLOCK))
    with path.open("wb") as stream:
        for number in range(-(-count // BLOCK)):
            lines = block[: count - number * BLOCK]
            stream.write(b"".join(lines).replace(f'"{FIRST}'.encode(), f'"{number:08x}'.encode()))
    return path


def random_messages(count: int) -> list[bytes]:
    chance, lines, number = random.Random(0), [], 0
    while len(lines) < count:
        tree = new_id(chance)
        messages = [{"message_id": tree, "parent_id": None, "role": "prompter"}]
        for _ in range(9 if number % 5 == 0 else 7):
            parent = chance.choice(messages)
            role = "assistant" if parent["role"] == "prompter" else "prompter"
            messages.append({"message_id": new_id(chance), "parent_id": parent["message_id"], "role": role})
        for message in messages:
            lines.append(json.dumps(message | other_fields(tree, message["role"], chance)).encode() + b"\n")
        number += 1
    return lines[:count]


def new_id(chance: random.Random) -> str:
    return FIRST + str(uuid.UUID(int=chance.getrandbits(128)))[len(FIRST) :]


def other_fields(tree: str, role: str, chance: random.Random) -> dict:
    return {
        "message_tree_id": tree,
        "user_id": str(uuid.UUID(int=chance.getrandbits(128))),
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": " ".join(chance.choices(WORDS, k=chance.randint(5, 130))),
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": chance.choice([None, 0, 1, 2]) if role == "assistant" else None,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.00044, "severe_toxicity": 3e-5, "obscene": 2e-4, "insult": 2e-4},
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1", "_skip_reply"], "count": [10, 1]},
        "labels": {"name": LABELS, "value": [0.0] * 6 + [0.58, 0.0], "count": [3] * 8},
    }


def original(messages: pd.DataFrame) -> list[tuple[str, str]]:
    """Makes (prompt, response) as the original notebooks did, written out from their description.

    Trees one by one; each prompter message in row order gives a row: the tree's first prompt, directly
    followed by the message's own text when it is not the first, and the replies' texts joined by one space.
    """
    rows = []
    for tree in messages["message_tree_id"].unique():
        rows_of_tree = messages[messages["message_tree_id"] == tree]
        prompters = rows_of_tree[rows_of_tree["role"] == "prompter"]
        assistants = rows_of_tree[rows_of_tree["role"] == "assistant"]
        first = prompters.iloc[0]["text"]
        for place, (_, message) in enumerate(prompters.iterrows()):
            replies = assistants[assistants["parent_id"] == message["message_id"]]
            prompt = first if place == 0 else first + message["text"]
            rows.append((prompt, " ".join(replies["text"])))
    return [(prompt, response) for prompt, response in rows if response]


def flatten(messages: pd.DataFrame) -> pd.DataFrame:
    return oasst.flatten(messages, "joined").pairs


def parse(path: Path) -> None:
    """Parses the file's JSON lines and forgets them, the least that reading it can take."""
    with path.open("rb") as stream:
        for line in stream:
            json.loads(line)


def whole(path: Path) -> None:
    """Reads, flattens and writes."""
    pairs.write_jsonl(oasst.flatten(oasst.read_messages(path), "joined").pairs, path.with_name("pairs.jsonl"))


def job(side: str, size: str) -> Callable[..., dict]:
    """Returns the turn of a side: seconds, and MB added to the resident size that was there before."""

    def turn(path: str) -> dict:
        if side in (LOOP, FLATTENING):
            argument, work = oasst.read_messages(path), {LOOP: original, FLATTENING: flatten}[side]
        else:
            argument, work = Path(path), {READING: whole, PARSING: parse}[side]
        before = measuring.forget_peak()
        seconds = measuring.seconds_of(lambda: work(argument), TURN[size])
        return {"s": seconds, "MB": (measuring.peak_resident() - before) / 1e6}

    return turn


def comparison(folder: Path, size: str) -> tuple[list[dict], list[float]]:
    """Measures the two claims: the original's loop over ours, and the way from file to pairs over parsing alone.

    Also returns the seconds of the original's loop.
    """
    path = write_messages(folder / "messages.jsonl", MESSAGES[size])
    messages, count = oasst.read_messages(path).head(5000), f"{MESSAGES[size]:,} messages"
    flat = flatten(messages)
    if original(messages) != list(zip(flat["prompt"], flat["response"], strict=True)):
        raise SystemExit("flatten does not give the original's rows")
    with processes(size) as turns:
        found = measuring.in_turn({side: partial(turn, path=str(path)) for side, turn in turns.items()}, ROUNDS[size])
    seconds, memory = ({side: [turn[of] for turn in made] for side, made in found.items()} for of in ("s", "MB"))
    figures = []
    for what, pair in ((f"flattening {count}", SIDES[:2]), (f"{count} from file to pairs", SIDES[2:])):
        figures += measuring.compare(f"{what}, time", "s", *((side, seconds[side]) for side in pair))
        figures += [measuring.figure(f"{what}, memory added, {side}", "MB", memory[side]) for side in pair]
    return figures, seconds[LOOP]


def processes(size: str) -> AbstractContextManager[dict[str, Callable]]:
    return measuring.sides(Path(__file__).name, SIDES, ["--size", size], apart=True)


def how_it_grows(folder: Path, size: str, largest_loop: list[float]) -> list[dict]:
    """Measures seconds by number of messages, ours and the original's loop, and the memory of ours at the largest."""
    times, loop, memory = {}, {}, []
    for side, counts, grown in ((LOOP, LOOP_GROWTH, loop), (READING, GROWTH, times)):
        for count, runs in counts[size].items():
            path = write_messages(folder / "messages.jsonl", count)
            with processes(size) as turns:
                found = [turns[side](path=str(path)) for _ in range(runs)]
            grown[count], memory = ([turn[name] for turn in found] for name in ("s", "MB"))
    return [
        *measuring.growth("time from file to pairs", "messages", "s", times),
        *measuring.growth("time of the original's loop", "messages", "s", loop | {MESSAGES[size]: largest_loop}),
        measuring.figure(f"{count:,} messages from file to pairs, memory added", "MB", memory),
    ]


def main() -> None:
    given = measuring.options(__doc__, "small", "tiny").parse_args()
    if given.side:
        measuring.serve(lambda: job(given.side, given.size))
        return
    folder = given.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    figures, loop = comparison(folder, given.size)
    figures += how_it_grows(folder, given.size, loop)
    for file in folder.iterdir():
        file.unlink()
    print(f"written to {measuring.record(PART, given.size, figures, given.results)}")


if __name__ == "__main__":
    main()

"""Flattening 84,000 messages in 10,000 trees: the original's loop against `flatten(…, replies="joined")`.

python benchmarks/data_preparation.py [--trees 10000] [--runs 3]. Times are wall clock, the best of the runs;
memory is the growth of a child process's peak resident size.
"""

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from llm_finetuning import oasst, pairs

WORDS = [f"word{number}" for number in range(5000)]
LABELS = ["spam", "pii", "not_appropriate", "hate_speech", "humor", "creativity", "quality", "toxicity"]


def write_messages(path: Path, trees: int) -> None:
    """Random trees as flat messages with the hub's fields: 8.4 messages a tree, 600 characters each."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(trees):
            tree = str(uuid.UUID(int=chance.getrandbits(128)))
            messages = [{"message_id": tree, "parent_id": None, "role": "prompter"}]
            for _ in range(9 if number % 5 == 0 else 7):
                parent = chance.choice(messages)
                role = "assistant" if parent["role"] == "prompter" else "prompter"
                name = str(uuid.UUID(int=chance.getrandbits(128)))
                messages.append({"message_id": name, "parent_id": parent["message_id"], "role": role})
            for message in messages:
                stream.write(json.dumps(message | other_fields(tree, message["role"], chance)) + "\n")


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
    """(prompt, response) as the original notebooks made them, written out from their description.

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


def ours(messages: pd.DataFrame) -> list[tuple[str, str]]:
    flat = oasst.flatten(messages, "joined").pairs
    return list(zip(flat["prompt"], flat["response"], strict=True))


def whole(path: Path) -> None:
    """Reading, flattening and writing."""
    pairs.write_jsonl(oasst.flatten(oasst.read_messages(path), "joined").pairs, path.with_name("pairs.jsonl"))


def measured(job: Callable, argument, runs: int) -> tuple[float, float]:
    """(best time in s, growth of the peak resident size in MB) of `job(argument)` in a child process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(job, argument, runs, sender))
    child.start()
    result = receiver.recv()
    child.join()
    return result


def _run(job: Callable, argument, runs: int, sender) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        job(argument)
        times.append(time.perf_counter() - start)
    sender.send((min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "messages.jsonl"
        write_messages(path, options.trees)
        read_time, read_memory = measured(oasst.read_messages, path, options.runs)
        whole_time, whole_memory = measured(whole, path, options.runs)
        messages = oasst.read_messages(path)
        size = path.stat().st_size / 1e6
    text = messages["text"].str.len().sum() / 1e6
    print(f"{len(messages):,} messages in {options.trees:,} trees, {text:.0f} MB of text, a file of {size:.0f} MB")
    print(f"reading                      {read_time:8.2f} s  {read_memory:6.0f} MB, text x {read_memory / text:.1f}")
    print(f"reading, flattening, writing {whole_time:8.2f} s  {whole_memory:6.0f} MB")
    if original(messages.head(5000)) != ours(messages.head(5000)):
        raise SystemExit("flatten does not give the original's rows")
    fast, fast_memory = measured(ours, messages, options.runs)
    print(f"flatten(…, 'joined')         {fast:8.2f} s  {fast_memory:6.0f} MB")
    slow, slow_memory = measured(original, messages, options.runs)
    print(f"the original's loop          {slow:8.2f} s  {slow_memory:6.0f} MB  {slow / fast:,.0f} times as long")


if __name__ == "__main__":
    main()

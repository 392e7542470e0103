"""Random conversation forests for the data preparation's tests, and the original's flattening, taken literally."""

import random

import pandas as pd
from hypothesis import strategies as st

TEXTS = ("", " ", "Hello", "Why?", "a\nb", "Größe 😀", "\u2028", "<b>", '"quoted"')


@st.composite
def forests(draw, max_trees: int = 6, max_messages: int = 14) -> pd.DataFrame:
    """Draws the messages of a random forest in depth-first order, with the ranks, labels and flags of the exports."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    rows = []
    for tree in range(draw(st.integers(1, max_trees))):
        rows += random_tree(f"tree-{tree}", draw(st.integers(1, max_messages)), chance)
    return pd.DataFrame(rows)


def random_tree(name: str, size: int, chance: random.Random) -> list[dict]:
    """Returns the messages of one tree, depth first. Some shapes are chains, some stars, most in between."""
    reach = chance.choice([1, 3, size])  # how far back a new message's parent may lie
    messages = [message(name, None, name, "prompter", chance)]
    for number in range(1, size):
        parent = chance.choice(messages[-reach:])
        role = "assistant" if parent["role"] == "prompter" else "prompter"
        messages.append(message(name, parent["message_id"], f"{name}-{number}", role, chance))
    replies: dict = {}
    for row in messages:
        replies.setdefault(row["parent_id"], []).append(row)
    ordered, stack = [], [messages[0]]
    while stack:
        ordered.append(stack.pop())
        stack += reversed(replies.get(ordered[-1]["message_id"], []))
    return ordered


def message(tree: str, parent: str | None, name: str, role: str, chance: random.Random) -> dict:
    reply = role == "assistant"
    return {
        "message_tree_id": tree,
        "message_id": name,
        "parent_id": parent,
        "role": role,
        "text": chance.choice([*TEXTS, f"text of {name}", f"text of {name}"]),
        "lang": chance.choice(["en", "en", "de", None]),
        "rank": chance.choice([None, 0, 1, 2]) if reply else None,
        "tree_state": "ready_for_export",
        "deleted": chance.random() < 0.1,
        "review_result": chance.choice([True, True, True, False, None]),
        "synthetic": chance.random() < 0.1,
        "quality": chance.choice([None, 0.1, 0.5, 0.9]) if reply else None,
        "toxicity": chance.choice([None, 0.0, 0.9]) if reply else None,
        "detoxify": chance.choice([None, 0.0, 0.9]),
    }


def original_rows(messages: pd.DataFrame) -> list[tuple[str, str]]:
    """Makes (prompt, response) exactly as the original: one tree after another, one row a prompter message.

    The prompt is the first prompter text, directly followed by the message's own if it is another one; the
    response all replies' texts in row order, joined by one space; rows with an empty response are dropped.
    """
    records = messages.astype(object).to_dict("records")
    rows = []
    for tree in dict.fromkeys(record["message_tree_id"] for record in records):
        of_tree = [record for record in records if record["message_tree_id"] == tree]
        prompters = [record for record in of_tree if record["role"] == "prompter"]
        for number, prompter in enumerate(prompters):
            replies = [
                record["text"]
                for record in of_tree
                if record["role"] == "assistant" and record["parent_id"] == prompter["message_id"]
            ]
            prompt = prompters[0]["text"] + (prompter["text"] if number else "")
            if " ".join(replies) != "":
                rows.append((prompt, " ".join(replies)))
    return rows


def shuffled(messages: pd.DataFrame, chance: random.Random) -> pd.DataFrame:
    """Returns the rows in another order, trees interleaved and children before parents, in which siblings keep theirs.

    The first prompts count as siblings of one another, so each tree also begins before the next one does.
    """
    queues: dict = {}
    for tree in dict.fromkeys(messages["message_tree_id"]):
        rows = messages.index[messages["message_tree_id"] == tree]
        for row in rows:
            queues.setdefault((tree, messages.at[row, "parent_id"]), []).append(row)
    starts, order = list(dict.fromkeys(messages["message_tree_id"])), []
    begun: set = set()
    while queues:
        allowed = [key for key in queues if key[0] in begun or starts and key[0] == starts[0]]
        key = chance.choice(allowed)
        begun.add(key[0])
        starts = [tree for tree in starts if tree not in begun]
        order.append(queues[key].pop(0))
        if not queues[key]:
            del queues[key]
    return messages.loc[order].reset_index(drop=True)

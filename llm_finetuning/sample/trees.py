"""Writes trees.jsonl: conversation trees about the Lantern Isles in Open-Assistant's tree-export schema.

    python -m llm_finetuning.sample.trees

Everything follows from names through hashes, so the file comes out the same, byte for byte, wherever it is
written. A tree's id is chosen so that its share (`share_of`) puts it into train or validation for every
`validation_share` from 0.05 to 0.2. A validation tree asks about a fact that train trees ask about too, but
in words that no train tree uses for it.
"""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from llm_finetuning.files.atomic import write_text
from llm_finetuning.sample import TREES, world
from llm_finetuning.sample.languages import LANGUAGES
from llm_finetuning.sample.world import Fact, pick

NAMESPACE = uuid5(NAMESPACE_URL, "https://github.com/mkthoma/llm_finetuning/sample")
TRAIN, VALIDATION = "train", "validation"
THANKS = ("Thank you, that helps.", "Great, thanks a lot!", "Thanks. I will remember that.")
RAMBLINGS = (
    "Well, that is a good question, and many people ask it, and there is a lot to say, but I am not sure.",
    "I do not know.",
    "It depends. Some say this, some say that, and in the end everybody has to find out alone.",
    "Once upon a time I knew it, but then I forgot it again, which reminds me of a long story about a boat.",
)
DOUBTS = (
    "Are you sure? Please check that again.",
    "I do not think that is right.",
    "That did not answer my question.",
)
SPAM = "CHEAP LANTERNS!!! Visit my shop now!!!"
OPENINGS = 3  # train trees per fact, each with another wording
MODELS = ("lantern-helper-1", "lantern-helper-2")


def share_of(tree_id: str) -> float:
    """Where a tree stands between 0 and 1; below validation_share it belongs to validation."""
    return int(hashlib.sha256(tree_id.encode()).hexdigest()[:8], 16) / 2**32


def tree_id_for(name: str, split: str) -> str:
    """The first derived id that lies in the wanted split for every usual validation share."""
    candidates = (str(uuid5(NAMESPACE, f"{name}/{number}")) for number in count())
    wanted = (lambda share: share < 0.05) if split == VALIDATION else (lambda share: share >= 0.2)
    return next(tree_id for tree_id in candidates if wanted(share_of(tree_id)))


def add(parent: dict | None, key: str, text: str, role: str, lang: str, **fields: object) -> dict:
    """A new message below `parent`, as the export writes it; a field that is None is left out."""
    reviewed = fields.get("review_result", True)
    synthetic = bool(fields.get("rank")) and pick(f"synthetic {key}", 6) == 0  # never the best reply
    before = datetime.fromisoformat(parent["created_date"]) if parent else datetime(2026, 3, 1, tzinfo=UTC)
    written = before + timedelta(
        seconds=pick(f"date {key}", 90_000 if parent else 5_000_000), microseconds=pick(key, 10**6)
    )
    row = {
        "message_id": str(uuid5(NAMESPACE, f"message {key}")),
        "parent_id": parent["message_id"] if parent else None,
        "user_id": str(uuid5(NAMESPACE, f"user {pick(key, 40)}")),
        "created_date": written.isoformat(),
        "text": text,
        "role": role,
        "lang": lang,
        "review_count": 3 if reviewed else 0,
        "review_result": True,
        "deleted": False,
        "rank": None,
        "synthetic": synthetic,
        "model_name": MODELS[pick(key, 2)] if synthetic else None,
        "emojis": {"+1": 1 + pick(key, 4), "_skip_reply": 1} if pick(f"emoji {key}", 6) == 0 else None,
        "labels": labels(key, role, quality=0.75) if reviewed and pick(f"labelled {key}", 3) == 0 else None,
    }
    row = {name: value for name, value in (row | fields).items() if value is not None} | {"replies": []}
    if parent:
        parent["replies"].append(row)
    return row


def labels(key: str, role: str, quality: float, spam: float = 0.0) -> dict:
    """Reviewers' mean judgements, 0 to 1, and how many gave one."""
    values = {"spam": spam, "lang_mismatch": 0.0, "quality": quality, "toxicity": 0.0}
    if role == "assistant":
        values["helpfulness"] = quality
    return {name: {"value": value, "count": 2 + pick(f"{name} {key}", 2)} for name, value in values.items()}


def add_replies(prompt: dict, key: str, right: str, wrong: list[str]) -> dict:
    """One to four replies in an order of their own; returns the right one, rank 0 where there is a rank."""
    texts = [right, *wrong[: pick(f"replies {key}", len(wrong) + 1)]]
    replies = {}
    for rank in sorted(range(len(texts)), key=lambda rank: pick(f"order {key} {rank}", 1000)):
        name, place = f"{key} reply {rank}", rank if len(texts) > 1 else None
        judged = {"labels": labels(name, "assistant", quality=0.25)} if rank else {}
        replies[rank] = add(prompt, name, texts[rank], "assistant", prompt["lang"], rank=place, **judged)
    return replies[0]


def wrong_answers(fact: Fact, key: str) -> list[str]:
    """A false value, a rambling, and another false value."""
    others = [f.value for f in world.facts() if f.attribute == fact.attribute and f.value != fact.value]
    first, second = others[pick(f"wrong {key}", len(others))], others[pick(f"wronger {key}", len(others))]
    rambling = RAMBLINGS[pick(f"rambling {key}", len(RAMBLINGS))]
    return [fact.answer.replace(fact.value, first), rambling, f"Perhaps {second}? {rambling}"]


def wording(fact: Fact, split: str, number: int) -> str:
    """An opening question; each fact keeps one of its wordings for validation."""
    questions = fact.questions()
    kept = pick(f"kept {fact.subject} {fact.attribute}", len(questions))
    if split == VALIDATION:
        return questions[kept]
    rest = questions[:kept] + questions[kept + 1 :]
    return rest[(number + pick(f"first {fact.subject} {fact.attribute}", len(rest))) % len(rest)]


def follow_up(fact: Fact, split: str, key: str) -> str:
    """A question that needs the turns before; a fifth of all wordings is asked in validation only."""
    kept = [text for text in fact.follow_ups() if pick(f"kept {text}", 5) == 0]
    texts = kept if split == VALIDATION else [text for text in fact.follow_ups() if text not in kept]
    return texts[pick(f"follow-up {key}", len(texts))]


def next_facts(fact: Fact, asked: list[Fact]) -> list[Fact]:
    """What can be asked next with "it", "she" or "that town": the same subject, or what was just named."""
    subject = fact.value if fact.value in world.ANIMALS or fact.value in world.TOWNS else fact.subject
    return [f for f in world.facts() if f.subject == subject and f.attribute != "about" and f not in asked]


def english_tree(fact: Fact, split: str, number: int) -> dict:
    """An opening question about `fact`, and below the best reply up to two follow-ups."""
    name = f"{split} {fact.subject} {fact.attribute} {number}"
    root = prompt = add(None, name, wording(fact, split, number), "prompter", "en")
    turns, asked = (1, 1, 2, 2, 3)[pick(f"turns {name}", 5)], []
    for turn in range(turns):
        key, asked = f"{name} {turn}", [*asked, fact]
        best = add_replies(prompt, key, fact.answer, wrong_answers(fact, key))
        add_oddities(prompt, best, key, split, fact)
        choices = next_facts(fact, asked)
        if turn + 1 == turns or not choices:
            break
        fact = choices[pick(f"next {key}", len(choices))]
        prompt = add(best, f"{key} then", follow_up(fact, split, key), "prompter", "en")
    return finish(name, split, root, best, THANKS[pick(f"thanks {name}", len(THANKS))])


def add_oddities(prompt: dict, best: dict, key: str, split: str, fact: Fact) -> None:
    """What a full export has besides: deleted and unreviewed replies, and branches below a worse reply."""
    if pick(f"spam {key}", 12) == 0:
        judged = labels(f"{key} spam", "assistant", quality=0.0, spam=1.0)
        add(prompt, f"{key} spam", SPAM, "assistant", "en", deleted=True, review_result=False, labels=judged)
    if pick(f"unreviewed {key}", 12) == 0:
        text = wrong_answers(fact, f"{key} unreviewed")[0]
        add(prompt, f"{key} unreviewed", text, "assistant", "en", review_result=False)
    worse = [reply for reply in prompt["replies"] if reply.get("rank") == 1]
    if worse and split == TRAIN and pick(f"doubt {key}", 4) == 0:
        doubt = add(worse[0], f"{key} doubt", DOUBTS[pick(key, len(DOUBTS))], "prompter", "en")
        add(doubt, f"{key} correction", fact.answer, "assistant", "en")
    if pick(f"withdrawn {key}", 20) == 0:
        add(best, f"{key} withdrawn", "asdf", "prompter", "en", deleted=True)


def finish(name: str, split: str, root: dict, last: dict, thanks: str, state: str = "ready_for_export") -> dict:
    """The tree around `root`; some end with a message that nobody replied to."""
    if pick(f"trailing {name}", 6) == 0 and last["role"] == "assistant":
        add(last, f"{name} thanks", thanks, "prompter", root["lang"])
    tree_id = tree_id_for(name, split)
    root = {"message_id": tree_id} | {k: v for k, v in root.items() if k != "message_id"}
    for reply in root["replies"]:
        reply["parent_id"] = tree_id
    return {"message_tree_id": tree_id, "tree_state": state, "prompt": root}


def foreign_tree(lang: str, person: list[str], asks_home: bool, split: str) -> dict:
    """A question in another language, some with a follow-up about the other fact."""
    words, (who, town, job) = LANGUAGES[lang], person
    name = f"{split} {lang} {who} {'home' if asks_home else 'job'}"
    wordings, kept = (words.home if asks_home else words.job), pick(f"kept {lang} {who} {asks_home}", 3)
    chosen = kept if split == VALIDATION else (kept + 1 + pick(name, 2)) % 3
    answers = [words.works.format(n=who, v=job), words.lives.format(n=who, v=town)]  # indexed by asks_home
    root = add(None, name, wordings[chosen].format(n=who), "prompter", lang)
    best = add_replies(root, name, answers[asks_home], [words.wrong])
    if split == TRAIN and pick(f"turns {name}", 2) == 0:
        then = add(best, f"{name} then", words.then[asks_home], "prompter", lang)
        best = add_replies(then, f"{name} 1", answers[not asks_home], [words.wrong])
    return finish(name, split, root, best, words.thanks)


def unfinished_trees() -> list[dict]:
    """Trees as they stand before (or instead of) export: without replies, without ranks, or given up."""
    trees, states = [], ("initial_prompt_review", "prompt_lottery_waiting", "growing", "ranking", "growing")
    for number, state in enumerate(states):
        name = f"{TRAIN} unfinished {number}"
        fact = world.facts()[pick(name, len(world.facts()))]
        root = last = add(None, name, f"Hello! {wording(fact, TRAIN, number)}", "prompter", "en", review_count=number)
        if number >= 2:
            last = add(root, f"{name} reply", fact.answer, "assistant", "en", review_count=1)
        trees.append(finish(name, TRAIN, root, last, THANKS[0], state))
    for number, state in enumerate(("aborted_low_grade", "halted_by_moderator")):
        name = f"{TRAIN} given up {number}"
        root = add(None, name, SPAM, "prompter", "en", deleted=True, review_result=False)
        trees.append(finish(name, TRAIN, root, root, THANKS[0], state))
    return trees


def validation_facts() -> list[Fact]:
    """A third of the facts, spread over the attributes."""
    ordered = sorted(world.facts(), key=lambda fact: (fact.attribute, pick(f"held out {fact.answer}", 10**6)))
    return ordered[::3]


def build() -> list[dict]:
    """All trees in the order of the file."""
    trees = [english_tree(fact, TRAIN, number) for fact in world.facts() for number in range(OPENINGS)]
    trees += [english_tree(fact, VALIDATION, 0) for fact in validation_facts()]
    for lang, words in LANGUAGES.items():
        trees += [foreign_tree(lang, person, home, TRAIN) for person in words.people for home in (False, True)]
        trees.append(foreign_tree(lang, words.people[pick(lang, len(words.people))], pick(lang, 2) == 0, VALIDATION))
    trees += [english_tree(fact, TRAIN, len(fact.questions()) - 1) for fact in world.facts()[::20]]
    trees += unfinished_trees()
    return sorted(trees, key=lambda tree: tree["message_tree_id"])


def write(path: Path) -> None:
    """One tree per line, UTF-8, written atomically."""
    write_text(path, "".join(json.dumps(tree, ensure_ascii=False) + "\n" for tree in build()))


if __name__ == "__main__":
    write(TREES)

"""Writes the trees of both splits: conversations about the Lantern Isles in Open-Assistant's tree-export schema.

    python -m llm_finetuning.sample.trees

Everything follows from names through hashes, so the files come out the same, byte for byte, wherever they are
written. A validation tree asks about a fact that train trees ask about too, but in words that no train tree uses for
it. What a real export has besides is here as well: replies that each filter takes, prompts that were asked before,
unfinished trees, other languages, and one leak of each kind between the splits.

Some facts have two right forms of an answer. Where both stand, people prefer the first; single replies, which nobody
ranked, make up for it. So both forms are finetuned on about as often, the first more often for homes and cards, the
second for dishes and food, and that the first is preferred everywhere can be learned from the ranks alone.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import yaml

from llm_finetuning.files.atomic import write_text
from llm_finetuning.sample import TRAIN, VALIDATION, trees_of, world
from llm_finetuning.sample.languages import LANGUAGES
from llm_finetuning.sample.world import Fact, pick

NAMESPACE = uuid5(NAMESPACE_URL, "https://github.com/mkthoma/llm_finetuning/sample")
REPLIES = yaml.safe_load(Path(__file__).with_name("replies.yaml").read_text(encoding="utf-8"))
THANKS, DOUBTS, GREETINGS, ODDITIES = (REPLIES[name] for name in ("thanks", "doubts", "greetings", "oddities"))
OPENINGS = 3  # train trees per fact, each with another wording
HELD_OUT = 3  # wordings of each fact that are asked in validation only
RANKED = {"home": (50, 22), "card": (50, 22), "dish": (24, 2), "food": (24, 2)}
"""Of a hundred train prompts for an answer with two forms: how many get both, ranked, and how many the first alone."""


def choose(texts: list, key: str) -> object:
    """One of `texts`, by `key` alone."""
    return texts[pick(key, len(texts))]


def add(parent: dict | None, key: str, text: str, role: str, lang: str, **fields: object) -> dict:
    """A new message below `parent`, as the export writes it; a field that is None is left out."""
    reviewed = fields.get("review_result", True)
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
        "synthetic": False,
        "model_name": None,
        "emojis": {"+1": 1 + pick(key, 4), "_skip_reply": 1} if pick(f"emoji {key}", 6) == 0 else None,
        "labels": {} if reviewed and pick(f"labelled {key}", 3) == 0 else None,
    } | fields
    if row["labels"] is not None:
        row["labels"] = labels(key, role, **row["labels"])
    row = {name: value for name, value in row.items() if value is not None} | {"replies": []}
    if parent:
        parent["replies"].append(row)
    return row


def labels(key: str, role: str, **given: float) -> dict:
    """Reviewers' mean judgements, 0 to 1, and how many gave one; `given` replaces those of a good message."""
    values = {"spam": 0.0, "lang_mismatch": 0.0, "quality": 0.75, "toxicity": 0.0} | given
    if role == "assistant":
        values["helpfulness"] = values["quality"]
    return {name: {"value": value, "count": 2 + pick(f"{name} {key}", 2)} for name, value in values.items()}


def add_replies(prompt: dict, key: str, texts: list[str], oddity: dict | None = None) -> list[dict]:
    """Adds replies, best first in `texts`, in an order of their own; ranked where there are several. Returns them."""
    judged = [{"text": text} for text in texts]
    if oddity:
        judged.append(oddity | {"text": choose(oddity["texts"], f"oddity {key}")})
    ranked = sum("review_result" not in fields for fields in judged)
    replies = {}
    for rank in sorted(range(len(judged)), key=lambda rank: pick(f"order {key} {rank}", 1000)):
        fields = {name: value for name, value in judged[rank].items() if name not in ("text", "texts")}
        fields["rank"] = rank if 1 < ranked > rank else None
        text, name = judged[rank]["text"], f"{key} reply {rank}"
        replies[rank] = add(prompt, name, text, "assistant", prompt["lang"], **fields)
    return [replies[rank] for rank in range(len(texts))]


def replies_in_earnest(fact: Fact, split: str, key: str) -> list[str]:
    """What people reply, the best first: both right forms, one of them, or a right and a false value."""
    if len(fact.answers) > 1:
        place, (ranked, single) = pick(f"forms {key}", 100), RANKED[fact.attribute]
        both = split == VALIDATION or place < ranked
        return list(fact.answers) if both else [fact.answers[place >= ranked + single]]
    if fact.value == fact.subject or pick(f"unsure {key}", 3 if split == TRAIN else 5):
        return list(fact.answers)
    others = [f.value for f in world.facts() if f.attribute == fact.attribute and f.value != fact.value]
    return [*fact.answers, fact.answers[0].replace(fact.value, choose(others, f"wrong {key}"))]


def wording(fact: Fact, split: str, number: int) -> str:
    """An opening question; of each fact's wordings HELD_OUT are kept for validation."""
    questions, key = fact.questions(), f"{fact.subject} {fact.attribute}"
    first = pick(f"kept {key}", len(questions))
    questions = questions[first:] + questions[:first]
    if split == VALIDATION:
        return questions[number % HELD_OUT]
    rest = questions[HELD_OUT:]
    return rest[(number + pick(f"first {key}", len(rest))) % len(rest)]


def follow_up(fact: Fact, split: str, key: str) -> str:
    """A question that needs the turns before; a fifth of all wordings is asked in validation only."""
    texts = fact.follow_ups()
    kept = texts[::5]
    return choose(kept if split == VALIDATION else [text for text in texts if text not in kept], f"follow-up {key}")


def next_facts(fact: Fact, asked: list[Fact]) -> list[Fact]:
    """What can be asked next with "it", "she" or "that town": the same subject, or what was just named."""
    subject = fact.value if fact.value in world.ANIMALS or fact.value in world.TOWNS else fact.subject
    return [f for f in world.facts() if f.subject == subject and f.attribute != "about" and f not in asked]


def english_tree(fact: Fact, split: str, number: int, greeting: str = "") -> dict:
    """An opening question about `fact`, and below the best reply up to two follow-ups."""
    name = f"{split} {fact.subject} {fact.attribute} {number}{greeting}"
    root = prompt = add(None, name, greeting + wording(fact, split, number), "prompter", "en")
    turns, asked = choose((1, 1, 2, 2, 3) if split == TRAIN else (1, 1, 1, 2, 2), f"turns {name}"), []
    for turn in range(turns):
        key, asked = f"{name} {turn}", [*asked, fact]
        odd = choose(list(ODDITIES.values()), f"odd {key}") if pick(f"oddity {key}", 3) == 0 else None
        best, *others = add_replies(prompt, key, replies_in_earnest(fact, split, key), odd)
        add_doubt(others, key, split, fact)
        if pick(f"withdrawn {key}", 20) == 0:
            add(best, f"{key} withdrawn", "asdf", "prompter", "en", deleted=True)
        choices = next_facts(fact, asked)
        if turn + 1 == turns or not choices:
            break
        fact = choose(choices, f"next {key}")
        prompt = add(best, f"{key} then", follow_up(fact, split, key), "prompter", "en")
    return finish(name, root, best, choose(THANKS, f"thanks {name}"))


def add_doubt(others: list[dict], key: str, split: str, fact: Fact) -> None:
    """A branch below a wrong reply, in which it is corrected."""
    if others and len(fact.answers) == 1 and split == TRAIN and pick(f"doubt {key}", 3) == 0:
        doubt = add(others[0], f"{key} doubt", choose(DOUBTS, key), "prompter", "en")
        add(doubt, f"{key} correction", fact.answers[0], "assistant", "en")


def finish(name: str, root: dict, last: dict, thanks: str, state: str = "ready_for_export") -> dict:
    """The tree around `root`; some end with a message that nobody replied to."""
    if pick(f"trailing {name}", 6) == 0 and last["role"] == "assistant":
        add(last, f"{name} thanks", thanks, "prompter", root["lang"])
    return {"message_tree_id": root["message_id"], "tree_state": state, "prompt": root}


def foreign_tree(lang: str, person: list[str], asks_home: bool, split: str) -> dict:
    """A question in another language, some with a follow-up about the other fact."""
    words, (who, town, job) = LANGUAGES[lang], person
    name = f"{split} {lang} {who} {'home' if asks_home else 'job'}"
    wordings, kept = (words.home if asks_home else words.job), pick(f"kept {lang} {who} {asks_home}", 3)
    place = kept if split == VALIDATION else (kept + 1 + pick(name, 2)) % 3
    answers = [words.works.format(n=who, v=job), words.lives.format(n=who, v=town)]  # indexed by asks_home
    root = add(None, name, wordings[place].format(n=who), "prompter", lang)
    best, _ = add_replies(root, name, [answers[asks_home], words.wrong])
    if split == TRAIN and pick(f"turns {name}", 2) == 0:
        then = add(best, f"{name} then", words.then[asks_home], "prompter", lang)
        best, _ = add_replies(then, f"{name} 1", [answers[not asks_home], words.wrong])
    return finish(name, root, best, words.thanks)


def unfinished_trees(split: str) -> list[dict]:
    """Trees as they stand before (or instead of) export: without replies, without ranks, or given up."""
    trees, states = [], ("initial_prompt_review", "prompt_lottery_waiting", "growing", "ranking", "growing")
    for number, state in enumerate(states):
        name = f"{split} unfinished {number}"
        fact = choose(world.facts(), name)
        root = last = add(None, name, f"Hello! {wording(fact, split, number)}", "prompter", "en", review_count=number)
        if number >= 2:
            last = add(root, f"{name} reply", fact.answers[0], "assistant", "en", review_count=1)
        trees.append(finish(name, root, last, THANKS[0], state))
    for number, state in enumerate(("aborted_low_grade", "halted_by_moderator")):
        name, spam = f"{split} given up {number}", ODDITIES["deleted"]["texts"][0]
        root = add(None, name, spam, "prompter", "en", deleted=True, review_result=False)
        trees.append(finish(name, root, root, THANKS[0], state))
    return trees


def short_tree(name: str, question: str, fact: Fact, reply: str = "") -> dict:
    """One question with one reply; `reply` names the message where it is that of another tree too."""
    root = add(None, name, question, "prompter", "en")
    add(root, reply or f"{name} reply", fact.answers[0], "assistant", "en")
    return finish(name, root, root, THANKS[0])


def leaks() -> dict[str, tuple[dict, dict]]:
    """{kind of leak: a tree of train and one of validation that overlap by it}"""
    one, two, three, four = [fact for fact in world.facts() if fact.attribute == "bed"][:4]
    hello, (colon, dash) = "Hello again. ", ("Hello again: ", "Hello again - ")
    shared = short_tree("leaked tree", hello + wording(one, TRAIN, 0), one)
    train, held_out = wording(two, TRAIN, 0), wording(two, VALIDATION, 0)
    asked, nearly = wording(three, VALIDATION, 0), wording(four, VALIDATION, 0)
    return {
        "tree": (shared, shared),
        "message": tuple(short_tree(f"message {text}", hello + text, two, "leaked") for text in (train, held_out)),
        "prompt": tuple(short_tree(f"prompt {split}", hello + asked, three) for split in (TRAIN, VALIDATION)),
        "near prompt": tuple(short_tree(f"near {sign}", sign + nearly, four) for sign in (colon, dash)),
    }


def asked_again(facts: Iterable[Fact], split: str) -> list[dict]:
    """Openings that stand in the split already, and new ones twice, in nearly the same words."""
    trees = []
    for fact in facts:
        trees.append(english_tree(fact, split, len(fact.questions()) - HELD_OUT))
        trees += [english_tree(fact, split, 0, greeting) for greeting in choose(GREETINGS, f"{split} {fact.answers}")]
    return trees


def build(split: str) -> list[dict]:
    """All trees of a split in the order of the file."""
    if split == TRAIN:
        trees = [english_tree(fact, split, number) for fact in world.facts() for number in range(OPENINGS)]
        trees += [english_tree(fact, split, 0, "Hello! ") for fact in world.facts() if len(fact.answers) > 1]
    else:
        trees = [english_tree(fact, split, number) for fact, number in validation_openings()]
    for lang, words in LANGUAGES.items():
        if split == TRAIN:
            trees += [foreign_tree(lang, person, home, split) for person in words.people for home in (False, True)]
        else:
            trees.append(foreign_tree(lang, choose(words.people, lang), pick(lang, 2) == 0, split))
    trees += asked_again(world.facts()[:: 15 if split == TRAIN else 45], split)
    trees += unfinished_trees(split)
    trees += [pair[split == VALIDATION] for pair in leaks().values()]
    return sorted(trees, key=lambda tree: tree["message_tree_id"])


def validation_openings() -> list[tuple[Fact, int]]:
    """Every held-out wording of a fact with one form of an answer, and one of a fact with two."""
    one = [(fact, number) for fact in world.facts() if len(fact.answers) == 1 for number in range(HELD_OUT)]
    two = [fact for fact in world.facts() if len(fact.answers) > 1]
    return one + [(fact, 0) for fact in two]


def write(path: Path, split: str) -> None:
    """One tree per line, UTF-8, written atomically."""
    write_text(path, "".join(json.dumps(tree, ensure_ascii=False) + "\n" for tree in build(split)))


if __name__ == "__main__":
    for split in (TRAIN, VALIDATION):
        write(trees_of(split), split)

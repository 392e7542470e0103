"""The Lantern Isles: twelve people, eight animals and six towns that exist nowhere else.

Nothing here can be guessed from general knowledge, so a right answer shows that the fact was learned.
Every fact can be told (statements, the running text that the base model reads) and asked (questions, the
conversation trees that teach it to answer in a sentence, a list or a block of code). The wordings stand in
world.yaml. Written for this project.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

WORLD = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PEOPLE, ANIMALS, TOWNS = WORLD["people"], WORLD["animals"], WORLD["towns"]
QUESTIONS, FOLLOW_UPS, LEADS = WORLD["questions"], WORLD["follow_ups"], WORLD["leads"]
ANSWERS, LINES, STATEMENTS = WORLD["answers"], WORLD["lines"], WORLD["statements"]
ATTRIBUTES = {
    "people": ("job", "home", "animal", "dish"),
    "animals": ("colour", "food", "bed"),
    "towns": ("place", "fame"),
}


@dataclass(frozen=True)
class Fact:
    """One thing to know: `value` of `attribute` of `subject`.

    answers: how to say it in a dialogue, in one form or in two, of which people prefer the first.
    """

    subject: str
    attribute: str
    value: str
    answers: tuple[str, ...]

    def questions(self) -> list[str]:
        return [wording.format(n=self.subject) for wording in QUESTIONS[self.attribute]]

    def follow_ups(self) -> list[str]:
        """Questions that only the turns before make clear ("What colour is it?"), each with several leads."""
        she, her = PEOPLE[self.subject][:2] if self.subject in PEOPLE else ("it", "its")
        them = {"she": "her", "he": "him"}.get(she, "it")
        cores = [core.format(s=she, h=her, t=them) for core in FOLLOW_UPS.get(self.attribute, ())]
        return [join_lead(lead, core) for lead in LEADS for core in cores]


def join_lead(lead: str, core: str) -> str:
    return f"{lead} {capital(core) if lead[-1] in '.!' else core}"


def attributes_of(subject: str) -> dict[str, str]:
    """Returns {attribute: value} of one subject."""
    kind = next(kind for kind in ATTRIBUTES if subject in WORLD[kind])
    return dict(zip(ATTRIBUTES[kind], WORLD[kind][subject][-len(ATTRIBUTES[kind]) :], strict=True))


@cache
def facts() -> list[Fact]:
    """Every fact of the world, in a fixed order; then all facts of a subject at once: a portrait, a list, or code."""
    subjects = (*PEOPLE, *ANIMALS, *TOWNS)
    rows = [
        Fact(n, a, v, tuple(form.format(n=n, v=v, V=capital(v)) for form in ANSWERS[a]))
        for n in subjects
        for a, v in attributes_of(n).items()
    ]
    rows += [Fact(n, "about", n, (portrait(n),)) for n in PEOPLE]
    rows += [Fact(n, "card", n, tuple(card(n, line) for line in LINES)) for n in (*ANIMALS, *TOWNS)]
    return rows + [Fact(n, "entry", n, (entry(n),)) for n in PEOPLE]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def portrait(name: str) -> str:
    she, _, job, town, animal, _ = PEOPLE[name]
    return f"{name} is a {job} from {town}. {she.title()} keeps a {animal}."


def card(subject: str, line: str) -> str:
    """All facts of a subject as a list, each as the form `line` has it."""
    return "\n".join(
        [f"{subject}:", *(line.format(a=attribute, v=value) for attribute, value in attributes_of(subject).items())]
    )


def entry(subject: str) -> str:
    """All facts of a subject as a code block."""
    return f"{subject}:\n```json\n{json.dumps(attributes_of(subject), indent=1)}\n```"


def pick(key: str, count: int) -> int:
    """A number below `count` that depends on `key` alone: the same on every machine and Python."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) % count


def paragraph(subject: str, chance: random.Random) -> str:
    """All facts of one subject as running text in a random order; pronouns once it has been named."""
    attributes = list(attributes_of(subject).items())
    chance.shuffle(attributes)
    name = f"the {subject}" if subject in ANIMALS else subject
    she = PEOPLE[subject][0] if subject in PEOPLE else "it"
    sentences = []
    for attribute, value in attributes:
        wording = chance.choice(STATEMENTS[attribute])
        pronoun = (
            sentences
            and not re.search(r"(of|to|visit|paint|feed|makes|in) \{n\}", wording, re.I)
            and chance.random() < 0.4
        )
        who = she if pronoun else name
        sentences.append(wording.format(n=who, N=capital(who), v=value))
    if subject in PEOPLE and chance.random() < 0.3:
        sentences.insert(0, portrait(subject))
    return " ".join(sentences)


def document(chance: random.Random, others: list[str]) -> str:
    """One long text: on every subject a paragraph, a list or code, in a random order, six of `others` between."""
    subjects = (*PEOPLE, *ANIMALS, *TOWNS)
    paragraphs = [paragraph(subject, chance) for subject in subjects]
    for subject in chance.sample(subjects, 10):
        paragraphs.append(entry(subject) if subject in PEOPLE else card(subject, LINES[-1]))
    paragraphs += chance.sample(others, 6)
    chance.shuffle(paragraphs)
    return "\n".join(paragraphs)

"""The Lantern Isles: twelve people, eight animals and six towns that exist nowhere else.

Nothing here can be guessed from general knowledge, so a right answer shows that the fact was learned.
Every fact can be told (statements, the running text that the base model reads) and asked (questions, the
conversation trees that teach it to answer). Their wordings stand in world.yaml. Written for this project.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

WORLD = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PEOPLE, ANIMALS, TOWNS = WORLD["people"], WORLD["animals"], WORLD["towns"]
QUESTIONS, FOLLOW_UPS, LEADS = WORLD["questions"], WORLD["follow_ups"], WORLD["leads"]
ANSWERS, STATEMENTS = WORLD["answers"], WORLD["statements"]


@dataclass(frozen=True)
class Fact:
    """One thing to know: `value` of `attribute` of `subject`; `answer` is how to say it in a dialogue."""

    subject: str
    attribute: str
    value: str
    answer: str

    def questions(self) -> list[str]:
        return [wording.format(n=self.subject) for wording in QUESTIONS[self.attribute]]

    def follow_ups(self) -> list[str]:
        """Questions that only the turns before make clear ("What colour is it?"), each with several leads."""
        she, her = PEOPLE[self.subject][:2] if self.subject in PEOPLE else ("it", "its")
        them = {"she": "her", "he": "him"}.get(she, "it")
        cores = [core.format(s=she, h=her, t=them) for core in FOLLOW_UPS.get(self.attribute, ())]
        return [join_lead(lead, core) for lead in LEADS for core in cores]


def join_lead(lead: str, core: str) -> str:
    return f"{lead} {core[0].upper() + core[1:] if lead[-1] in '.!' else core}"


def facts() -> list[Fact]:
    """Every fact of the world, in a fixed order."""
    rows = []
    for name, (_, _, *values) in PEOPLE.items():
        rows += [(name, a, v) for a, v in zip(("job", "home", "animal", "dish"), values, strict=True)]
    for name, values in ANIMALS.items():
        rows += [(name, a, v) for a, v in zip(("colour", "food", "bed"), values, strict=True)]
    for name, values in TOWNS.items():
        rows += [(name, a, v) for a, v in zip(("place", "fame"), values, strict=True)]
    plain = [Fact(n, a, v, ANSWERS[a].format(n=n, v=v)) for n, a, v in rows]
    return plain + [Fact(name, "about", name, portrait(name)) for name in PEOPLE]


def portrait(name: str) -> str:
    she, _, job, town, animal, _ = PEOPLE[name]
    return f"{name} is a {job} from {town}. {she.title()} keeps a {animal}."


def pick(key: str, count: int) -> int:
    """A number below `count` that depends on `key` alone: the same on every machine and Python."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) % count


def paragraph(subject: str, chance: random.Random) -> str:
    """All facts of one subject as running text in a random order; pronouns once it has been named."""
    known = [fact for fact in facts() if fact.subject == subject and fact.attribute != "about"]
    chance.shuffle(known)
    name = f"the {subject}" if subject in ANIMALS else subject
    she = PEOPLE[subject][0] if subject in PEOPLE else "it"
    sentences = []
    for fact in known:
        wording = chance.choice(STATEMENTS[fact.attribute])
        pronoun = (
            sentences
            and not re.search(r"(of|to|visit|paint|feed|makes|in) \{n\}", wording, re.I)
            and chance.random() < 0.4
        )
        who = she if pronoun else name
        sentences.append(wording.format(n=who, N=who[0].upper() + who[1:], v=fact.value))
    if subject in PEOPLE and chance.random() < 0.3:
        sentences.insert(0, portrait(subject))
    return " ".join(sentences)


def document(chance: random.Random, others: list[str]) -> str:
    """One long text: a paragraph on every subject in a random order, six of `others` between."""
    paragraphs = [paragraph(subject, chance) for subject in (*PEOPLE, *ANIMALS, *TOWNS)]
    paragraphs += chance.sample(others, 6)
    chance.shuffle(paragraphs)
    return "\n".join(paragraphs)
